"""Adapters of per-tensor ranks, in the real PEFT: the same outputs as the uniform one of the same factors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import PreTrainedModel

from phlora_pipeline import targets
from phlora_pipeline.verify import verify
from tests import models, runs

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True` and a tied layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to True but the target module is:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def decaying(base: PreTrainedModel) -> PreTrainedModel:
    """A fine-tune whose matrices moved along spectra that fall at rates of their own."""
    tuned = models.moved(base, where=models.matrices, scale=1.0)
    originals = dict(base.named_parameters())
    with torch.no_grad():
        for number, (name, parameter) in enumerate(tuned.named_parameters()):
            if parameter.ndim < 2:
                continue
            U, S, Vh = torch.linalg.svd(parameter - originals[name], full_matrices=False)
            falling = torch.arange(1, S.shape[-1] + 1) ** -(0.5 + 0.25 * (number % 5))
            parameter.copy_(originals[name] + (U * (0.4 * falling * S[..., :1])[..., None, :]) @ Vh)
    return tuned


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "bert", "gpt2", "mixtral", "qwen3-moe"])
def test_own_ranks_are_the_uniform_adapter(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, rules = models.MODELS[name](), targets.server_rules
    folders = models.save(base, tmp_path / "base"), models.save(decaying(base), tmp_path / "tuned")
    runs.extract(*folders, tmp_path / "own", dialect="peft", energy=0.8)
    assert verify(*map(str, folders), str(tmp_path / "own")).passed
    with monkeypatch.context() as patched:  # the very same factors, for servers that read no pattern
        patched.setattr(targets, "server_rules", lambda *asked: replace(rules(*asked), per_tensor_ranks=False))
        runs.extract(*folders, tmp_path / "uniform", dialect="peft", energy=0.8)
    config = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert len(set(config["rank_pattern"].values())) > 2
    assert all(key.startswith("^") for key in config["rank_pattern"])
    assert not any(".experts" in key for key in config["rank_pattern"])
    assert json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())["rank_pattern"] == {}
    dtype = torch.float32 if name in {"mixtral", "qwen3-moe"} else torch.float64  # experts' kernel knows no float64
    own, even = (models.outputs(models.loaded(base, tmp_path / which).to(dtype)) for which in ("own", "uniform"))
    assert models.distance(own, even) < (1e-5 if dtype == torch.float32 else 1e-9)
    assert models.distance(own, models.outputs(base.to(dtype))) > 0.1
    sizes = {which: (tmp_path / which / "adapter_model.safetensors").stat().st_size for which in ("own", "uniform")}
    assert sizes["own"] < sizes["uniform"]


def test_peft_gives_each_layer_the_rank_and_the_scale_that_the_file_has(tmp_path: Path) -> None:
    base = models.MODELS["qwen2"]()
    folders = models.save(base, tmp_path / "base"), models.save(decaying(base), tmp_path / "tuned")
    runs.extract(*folders, tmp_path / "out", dialect="vllm", energy=0.8)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    model = models.loaded(base, tmp_path / "out")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == len(tensors) // 2
    assert len({layer.r["default"] for layer in layers.values()}) > 2
    for name, layer in layers.items():
        assert layer.r["default"] == tensors[f"{name}.lora_A.weight"].shape[0]
        assert layer.scaling["default"] == 1
