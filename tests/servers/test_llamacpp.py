"""llama.cpp serves one base with several of our adapters, by its own converters; and what it does with a tied delta."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.servers import checkpoints, greedy, llamacpp
from tests.servers.checkpoints import PROMPTS, TOKENS, Family
from tests.servers.environment import MARKS
from tests.servers.llamacpp import Request

pytestmark = MARKS

TIED = {"tied": 8}


def requests(adapter: Path | None) -> list[Request]:
    return [Request(adapter, prompt, TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_every_adapter_of_one_base_gives_pefts_tokens(kind: str, tmp_path: Path) -> None:
    family = checkpoints.make(kind, tmp_path)
    base = llamacpp.convert_base(family.base, tmp_path / "base.gguf")
    converted = {
        adapter: llamacpp.convert_adapter(adapter, family.base, tmp_path / f"{name}.gguf")
        for name, adapter in family.adapters.items()
    }
    chosen = [None, *family.adapters.values()]
    asked = [request for adapter in chosen for request in requests(adapter and converted[adapter])]
    found = llamacpp.answers(base, asked)
    models = [greedy.load(family.base, adapter) for adapter in chosen]
    wanted = [greedy.answer(model, prompt, TOKENS) for model in models for prompt in PROMPTS]
    for one, other in zip(found, wanted, strict=True):
        greedy.assert_same(one, other)
    assert len({answer.tokens for answer in found}) == len(asked)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """For PEFT: its adapter has the delta on both ends."""
    return checkpoints.make("llama-tied", tmp_path_factory.mktemp("tied"), ranks=TIED, dialect="peft")


def without(adapter: Path, fragment: str, out: Path) -> Path:
    """The adapter less the tensors whose names have the fragment in them."""
    out.mkdir()
    shutil.copy(adapter / "adapter_config.json", out)
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {key: value for key, value in tensors.items() if fragment not in key}
    assert 0 < len(kept) < len(tensors)
    save_file(kept, out / "adapter_model.safetensors")
    return out


def test_a_tied_delta_on_both_ends_is_converted_and_not_loaded(tied: Family, tmp_path: Path) -> None:
    """A tied base has no output of its own to be adapted."""
    base = llamacpp.convert_base(tied.base, tmp_path / "base.gguf")
    adapter = llamacpp.convert_adapter(tied.adapters["tied"], tied.base, tmp_path / "adapter.gguf")
    assert {"token_embd.weight.lora_a", "output.weight.lora_a"} <= llamacpp.names(adapter)
    assert "output.weight" not in llamacpp.names(base)
    ended = llamacpp.run(base, requests(adapter), check=False)
    assert ended.returncode != 0
    assert "LoRA tensor 'output.weight' does not exist in base model" in ended.stderr


def test_a_tied_delta_on_the_embedding_alone_is_converted_loaded_and_ends_the_process(
    tied: Family, tmp_path: Path
) -> None:
    """It is taken for the output's as well, with its factors the wrong way round. So our portable adapters leave it out."""
    base = llamacpp.convert_base(tied.base, tmp_path / "base.gguf")
    half = without(tied.adapters["tied"], "lm_head", tmp_path / "half")
    adapter = llamacpp.convert_adapter(half, tied.base, tmp_path / "adapter.gguf")
    ended = llamacpp.run(base, requests(adapter), check=False)
    assert ended.returncode < 0
    assert "GGML_ASSERT(ggml_can_mul_mat(a, b)) failed" in ended.stderr


def test_a_tied_delta_on_both_ends_is_served_where_the_base_is_written_untied(tied: Family, tmp_path: Path) -> None:
    """The remedy: a base GGUF with an output of its own, the same numbers as its embedding."""
    untied = tmp_path / "untied"
    shutil.copytree(tied.base, untied)
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(tied.base / "model.safetensors")
    both = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    save_file(both, untied / "model.safetensors", metadata={"format": "pt"})
    base = llamacpp.convert_base(untied, tmp_path / "base.gguf")
    adapter = llamacpp.convert_adapter(tied.adapters["tied"], untied, tmp_path / "adapter.gguf")
    model = greedy.load(tied.base, tied.adapters["tied"])
    for found, prompt in zip(llamacpp.answers(base, requests(adapter)), PROMPTS, strict=True):
        greedy.assert_same(found, greedy.answer(model, prompt, TOKENS))


def test_a_portable_adapter_of_a_tied_base_is_served(tied: Family, tmp_path: Path) -> None:
    """What the three above are the reason for."""
    portable = checkpoints.extract(tied.base, tied.tuned["tied"], tmp_path / "portable", rank=TIED["tied"])
    base = llamacpp.convert_base(tied.base, tmp_path / "base.gguf")
    adapter = llamacpp.convert_adapter(portable, tied.base, tmp_path / "adapter.gguf")
    model = greedy.load(tied.base, portable)
    for found, prompt in zip(llamacpp.answers(base, requests(adapter)), PROMPTS, strict=True):
        greedy.assert_same(found, greedy.answer(model, prompt, TOKENS))
