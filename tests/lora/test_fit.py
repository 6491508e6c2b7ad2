"""base + what we read of an adapter is what PEFT merges of it, tensor by tensor, for every form that PEFT saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import checkpoint, lora
from phlora_pipeline.errors import RequestError
from tests import loras, models, toys

pytestmark = loras.PEFT_WARNS

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 9, "use_rslora": True, "target_modules": "all-linear"}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "k_proj", "up_proj"],
            "rank_pattern": {"q_proj": 3, r"layers\.1\.mlp\.up_proj": 7, "proj": 5},
            "alpha_pattern": {r"^model.layers.0.self_attn.k_proj": 11},
        },
    ),
    "embeddings": ("llama", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "lm_head", "o_proj"]}),
    "conv1d": ("gpt2", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn", "c_fc", "wte"]}),
    "lora_bias": ("bert", {"r": 4, "lora_alpha": 3, "lora_bias": True, "target_modules": ["query", "dense"]}),
    "bias all": ("bert", {"r": 4, "bias": "all", "target_modules": ["query"]}),
    "bias lora_only": ("bert", {"r": 4, "bias": "lora_only", "target_modules": ["query"]}),
    "modules_to_save": ("bert", {"r": 4, "target_modules": ["value"], "modules_to_save": ["classifier", "LayerNorm"]}),
    "orthogonal": ("llama", {"r": 4, "init_lora_weights": "orthogonal", "target_modules": ["q_proj"]}),
    "experts": (
        "gpt-oss",
        {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "router.weight"]},
    ),
    "one parameter": ("gpt-oss", {"r": 3, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}),
    "mixtral stacks": (
        "mixtral",
        {"r": 3, "target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    ),
    "rank of a stack": (
        "qwen3-moe",
        {"r": 2, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
         "rank_pattern": {"experts.down_proj": 5}},
    ),
}  # fmt: skip


def merged_by_us(fit: lora.Fit, base: checkpoint.Checkpoint) -> dict[str, Tensor]:
    """Every tensor of the base that the adapter touches, with what it adds."""
    found: dict[str, Tensor] = {}
    for name, item in fit.whole.items():
        [found[name]] = checkpoint.read_tensors([item.ref])
    for name, delta in fit.deltas.items():
        [before] = checkpoint.read_tensors([delta.tensor])
        found[name] = before + delta.rows().reshape(before.shape)
    for name, module in fit.biases.items():
        before, bias = checkpoint.read_tensors([base.tensors[name], module.bias])
        found[name] = before + module.scale * bias
    return found


@pytest.mark.parametrize("form", FORMS)
def test_base_and_delta_is_what_peft_merges(form: str, tmp_path: Path) -> None:
    name, settings = FORMS[form]
    base = {**models.MODELS, "gpt-oss": models.gpt_oss}[name]()
    peft_model = loras.trained(base, tmp_path / "adapter", **settings)
    merged = peft_model.merge_and_unload()
    models.save(base, tmp_path / "base")
    models.save(merged, tmp_path / "merged")
    opened = checkpoint.open_checkpoint(str(tmp_path / "base"))
    fit = lora.fit(lora.open_adapter(str(tmp_path / "adapter")), opened)
    ours = merged_by_us(fit, opened)
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    changed = {name for name, value in wanted.items() if not torch.equal(value, before[name])}
    stacks = {name for name in changed if wanted[name].ndim == 3}
    assert changed - stacks <= set(ours)
    assert changed
    for name in changed - stacks:
        assert torch.allclose(ours[name], wanted[name], atol=1e-6), name
    for name in stacks:  # gpt-oss
        at, _, leaf = name.rpartition(".")
        for expert, value in enumerate(wanted[name]):
            assert torch.allclose(ours[f"{at}.{expert}.{leaf}.weight"], value, atol=1e-6), name
    for name in set(ours) & set(before) - changed:
        assert torch.equal(ours[name], before[name])


def test_rows_of_a_delta_are_the_rows_of_the_whole(tmp_path: Path) -> None:
    for name in ("plain", "embeddings", "conv1d", "mixtral stacks"):
        kind, settings = FORMS[name]
        base = models.MODELS[kind]()
        loras.trained(base, tmp_path / name / "adapter", **settings)
        models.save(base, tmp_path / name / "base")
        opened = checkpoint.open_checkpoint(str(tmp_path / name / "base"))
        for delta in lora.fit(lora.open_adapter(str(tmp_path / name / "adapter")), opened).deltas.values():
            whole = delta.rows()
            # A product's last digits depend on its shape.
            torch.testing.assert_close(
                torch.cat([delta.rows(0, 5), delta.rows(5)]), whole, rtol=0, atol=1e-6 * float(whole.abs().max())
            )


def test_an_adapter_of_another_base_is_refused_by_name(tmp_path: Path) -> None:
    loras.trained(models.MODELS["llama"](), tmp_path / "adapter", r=4, target_modules=["q_proj", "k_proj"])
    adapter = lora.open_adapter(str(tmp_path / "adapter"))
    wider = toys.save(tmp_path / "wider", toys.llama_tensors(kv=32))
    with pytest.raises(
        RequestError, match=r"k_proj is 16 × 32, model.layers.0.self_attn.k_proj.weight of the base is \[32, 32\]"
    ):
        lora.fit(adapter, checkpoint.open_checkpoint(str(wider)))
    shorter = toys.save(tmp_path / "shorter", toys.llama_tensors(layers=1))
    with pytest.raises(RequestError, match=r"the base has no model.layers.1.self_attn.k_proj"):
        lora.fit(adapter, checkpoint.open_checkpoint(str(shorter)))


def test_a_base_that_was_saved_without_its_head_has_shorter_names(tmp_path: Path) -> None:
    base = models.MODELS["llama"]()
    loras.trained(base, tmp_path / "adapter", r=4, target_modules=["q_proj", "k_proj"])
    models.save(base.model, tmp_path / "base")
    fit = lora.fit(lora.open_adapter(str(tmp_path / "adapter")), checkpoint.open_checkpoint(str(tmp_path / "base")))
    assert sorted(fit.deltas) == sorted(f"layers.{n}.self_attn.{p}_proj.weight" for n in (0, 1) for p in "qk")


def test_a_grown_vocabulary_is_the_adapters_own(tmp_path: Path) -> None:
    """PEFT saves the resized embedding beside its factors; these are added to that, and not to the base's."""
    base = models.MODELS["llama"]()
    models.save(base, tmp_path / "base")
    base.resize_token_embeddings(70)
    model = loras.trained(base, tmp_path / "adapter", r=4, target_modules=["embed_tokens", "lm_head"])
    opened = checkpoint.open_checkpoint(str(tmp_path / "base"))
    ours = merged_by_us(lora.fit(lora.open_adapter(str(tmp_path / "adapter")), opened), opened)
    merged = model.merge_and_unload().state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert ours[name].shape == (70, 32)
        assert torch.allclose(ours[name], merged[name], atol=1e-6)


def test_a_tied_outputs_pair_is_told_apart(tmp_path: Path) -> None:
    base = models.MODELS["llama-tied"]()
    loras.trained(base, tmp_path / "adapter", r=4, target_modules=["embed_tokens", "lm_head"])
    models.save(base, tmp_path / "base")
    fit = lora.fit(lora.open_adapter(str(tmp_path / "adapter")), checkpoint.open_checkpoint(str(tmp_path / "base")))
    assert list(fit.deltas) == ["model.embed_tokens.weight"]
    assert fit.tied is not None
    assert fit.tied.name == "lm_head"


def test_kohyas_names_and_kernels(tmp_path: Path) -> None:
    """By the flattened names, with 1×1 kernels spelt as matrices or as kernels, and with or without an alpha."""
    shapes = {"down.0.attn.to_q": (8, 6), "down.0.conv": (8, 5, 3, 3), "mid.proj": (8, 6, 1, 1)}
    generator = torch.Generator().manual_seed(3)
    base = toys.save(
        tmp_path / "unet",
        {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()},
        {},
    )
    q, conv, proj = (f"lora_unet_{name.replace('.', '_')}" for name in shapes)
    tensors = {
        f"{q}.lora_down.weight": torch.randn(2, 6, generator=generator), f"{q}.lora_up.weight": torch.randn(8, 2, generator=generator),
        f"{conv}.lora_down.weight": torch.randn(4, 5, 3, 3, generator=generator), f"{conv}.lora_up.weight": torch.randn(8, 4, 1, 1, generator=generator),
        f"{conv}.alpha": torch.tensor(1.0),
        f"{proj}.lora_down.weight": torch.randn(2, 6, generator=generator), f"{proj}.lora_up.weight": torch.randn(8, 2, generator=generator),
        f"{proj}.alpha": torch.tensor(3.0, dtype=torch.float16),
    }  # fmt: skip
    save_file(tensors, tmp_path / "style.safetensors")
    fit = lora.fit(lora.open_adapter(str(tmp_path / "style.safetensors")), checkpoint.open_checkpoint(str(base)))
    for (name, shape), scale in zip(shapes.items(), (1, 1 / 4, 3 / 2), strict=True):
        key = f"lora_unet_{name.replace('.', '_')}"
        down, up = tensors[f"{key}.lora_down.weight"].flatten(1), tensors[f"{key}.lora_up.weight"].flatten(1)
        wanted = scale * (up @ down)
        assert torch.allclose(fit.deltas[f"{name}.weight"].rows(), wanted, atol=1e-6)
        assert fit.deltas[f"{name}.weight"].tensor.shape == shape
