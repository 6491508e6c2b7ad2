"""llama.cpp, from its own converters to its own runtime."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.servers.environment import NODE, PYTHON, SCRIPTS
from tests.servers.greedy import Answer
from tests.servers.processes import done

_PROGRAM = Path(__file__).with_name("llamacpp.mjs")
_LIBRARY = NODE / "node_modules" / "node-llama-cpp" / "dist" / "index.js"


@dataclass(frozen=True)
class Request:
    """One prompt for the base, or for the base with an adapter; both as GGUF."""

    adapter: Path | None
    prompt: Sequence[int]
    tokens: int


def convert_base(checkpoint: Path, out: Path) -> Path:
    """By llama.cpp's `convert_hf_to_gguf.py`, in float32."""
    return _convert("convert_hf_to_gguf.py", checkpoint, out)


def convert_adapter(adapter: Path, base: Path, out: Path) -> Path:
    """By llama.cpp's `convert_lora_to_gguf.py`, in float32."""
    return _convert("convert_lora_to_gguf.py", adapter, out, "--base", str(base))


def _convert(script: str, source: Path, out: Path, *options: str) -> Path:
    done([str(PYTHON), str(SCRIPTS / script), str(source), *options, "--outtype", "f32", "--outfile", str(out)])
    return out


def names(gguf: Path) -> set[str]:
    """The tensors of a GGUF file."""
    code = "import sys, gguf; print(*(tensor.name for tensor in gguf.GGUFReader(sys.argv[1]).tensors))"
    return set(done([str(PYTHON), "-c", code, str(gguf)]).stdout.split())


def run(base: Path, requests: Sequence[Request], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """One process that serves all of them."""
    node = shutil.which("node")
    assert node, "node is not on PATH"
    asked: list[dict[str, Any]] = [
        {"adapter": request.adapter and str(request.adapter), "prompt": list(request.prompt), "tokens": request.tokens}
        for request in requests
    ]
    stdin = json.dumps({"base": str(base), "requests": asked})
    return done([node, str(_PROGRAM), str(_LIBRARY)], stdin=stdin, check=check)


def answers(base: Path, requests: Sequence[Request]) -> list[Answer]:
    """What it says, request by request."""
    said = json.loads(run(base, requests).stdout)
    return [Answer(tuple(answer["tokens"]), tuple(answer["logprobs"])) for answer in said]
