"""A compressed adapter, loaded by PEFT: at the rank it had it is the original, below it is the best of its rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import lora
from phlora_pipeline.compress import CompressResult, compress
from phlora_pipeline.merge import merge
from phlora_pipeline.verify import verify
from tests import loras, models, runs
from tests.lora.test_fit import FORMS

pytestmark = loras.PEFT_WARNS


def deltas(folder: Path) -> dict[str, Tensor]:
    """Module → scale·B·A of each expert, in float64."""
    modules = lora.open_adapter(str(folder)).modules
    found = {}
    for name, module in modules.items():
        A, B = module.factors()
        found[name] = module.scale * B.double() @ A.double()
    return found


def assert_best_of_rank(found: Tensor, whole: Tensor, rank: int) -> None:
    """No worse than the truncated SVD of each expert's update, to float32."""
    for own, full in zip(found, whole, strict=True):
        sigma = torch.linalg.svdvals(full)
        limit = float(sigma[rank:].square().sum())
        assert float((full - own).square().sum()) <= limit + 1e-8 * float(sigma.square().sum())


@pytest.mark.parametrize("dialect", ["peft", "portable"])
@pytest.mark.parametrize("form", FORMS)
def test_at_its_own_rank_it_is_the_original(form: str, dialect: str, tmp_path: Path) -> None:
    name, settings = FORMS[form]
    base = {**models.MODELS, "gpt-oss": models.gpt_oss}[name]()
    original = loras.trained(base, tmp_path / "a", **settings)
    most = max([settings["r"], *settings.get("rank_pattern", {}).values()])
    result = compress(str(tmp_path / "a"), str(tmp_path / "out"), rank=most, dialect=dialect)  # type: ignore[arg-type]
    assert result.summary.preserved_energy == pytest.approx(1)
    wanted = models.outputs(original)
    assert models.distance(models.outputs(base), wanted) > 1e-3
    load = models.adapted if "bias" in settings else models.loaded  # PEFT takes one adapter with biases
    assert models.distance(models.outputs(load(base, tmp_path / "out")), wanted) < 1e-5


@pytest.mark.parametrize("form", ["plain", "rslora", "patterns", "embeddings", "conv1d", "experts", "mixtral stacks"])
def test_below_it_is_the_best_of_its_rank(form: str, tmp_path: Path) -> None:
    name, settings = FORMS[form]
    base = {**models.MODELS, "gpt-oss": models.gpt_oss}[name]()
    loras.trained(base, tmp_path / "a", **settings)
    result = compress(str(tmp_path / "a"), str(tmp_path / "out"), rank=2, dialect="peft")
    assert (result.rank, result.written_rank) == (2, 2)
    assert result.adapter_bytes < result.original_bytes
    assert (tmp_path / "out" / "adapter_model.safetensors").stat().st_size == result.adapter_bytes
    before, after = deltas(tmp_path / "a"), deltas(tmp_path / "out")
    assert set(before) == set(after)
    for module, whole in before.items():
        assert_best_of_rank(after[module], whole, 2)
    models.loaded(base, tmp_path / "out")
    for row in runs.rows(tmp_path / "out").values():
        if row.status == "adapted":
            sigma = torch.linalg.svdvals(before[row.module]).square().sum(dim=0)
            assert row.delta_norm == pytest.approx(float(sigma.sum().sqrt()), rel=1e-5)
            assert row.preserved_energy == pytest.approx(float(sigma[:2].sum() / sigma.sum()), abs=1e-6)
            lost = (before[row.module] - after[row.module]).square().sum() / before[row.module].square().sum()
            assert row.written_energy == pytest.approx(1 - float(lost), abs=1e-6)


class Convolutions(torch.nn.Module):
    """A kernel of each dimension; 1×1 as well."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = torch.nn.Conv1d(5, 6, 3), torch.nn.Conv2d(6, 7, 3)
        self.point, self.three = torch.nn.Conv2d(7, 8, 1), torch.nn.Conv3d(1, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.point(self.two(self.one(x)[:, :, None, :].expand(-1, -1, 6, -1).contiguous()))
        return self.three(flat.reshape(flat.shape[0], 1, 8, flat.shape[2], -1)).flatten()


@torch.no_grad()
def test_convolutions(tmp_path: Path) -> None:
    torch.manual_seed(2)
    base = Convolutions().eval()
    original = loras.trained(base, tmp_path / "a", r=4, lora_alpha=7, target_modules=["one", "two", "point", "three"])
    x = torch.randn(2, 5, 9)
    wanted = original(x)
    for rank, close in ((4, True), (2, False)):
        compress(str(tmp_path / "a"), str(tmp_path / f"r{rank}"), rank=rank, dialect="peft")
        found = models.loaded(base, tmp_path / f"r{rank}")(x)
        assert (models.distance(found, wanted) < 1e-5) == close
    before, after = deltas(tmp_path / "a"), deltas(tmp_path / "r2")
    for module, whole in before.items():
        assert_best_of_rank(after[module], whole, 2)


@pytest.mark.parametrize(("name", "carry"), [("llama", "all"), ("mixtral", "none")])
def test_it_is_verified_by_what_it_keeps_of_the_fine_tune(name: str, carry: str, tmp_path: Path) -> None:
    """Its manifest's shares are of the original adapter; against what it makes of the base they are all of it."""
    base = models.MODELS[name]()
    folders = [
        models.save(model, tmp_path / side)
        for side, model in (("base", base), ("tuned", models.moved(base, where=models.everything)))
    ]
    out = tmp_path / "out"
    runs.extract(*folders, tmp_path / "a", rank=16, dialect="peft", carry=carry)
    result = compress(str(tmp_path / "a"), str(out), rank=4, dialect="peft")
    found = verify(*map(str, folders), str(out))
    assert found.passed
    before = verify(*map(str, folders), str(tmp_path / "a")).written_energy
    assert found.written_energy == pytest.approx(before * result.summary.written_energy, abs=1e-4)
    merge(str(folders[0]), str(out), str(tmp_path / "merged"))
    again = verify(str(folders[0]), str(tmp_path / "merged"), str(out))
    assert again.passed
    assert again.written_energy == pytest.approx(1, abs=1e-6)
    (out / "adapter_model.safetensors").unlink()
    (out / "adapter_model.safetensors").write_bytes((tmp_path / "a" / "adapter_model.safetensors").read_bytes())
    assert any(
        "is not the file that run.json tells of" in told for told in verify(*map(str, folders), str(out)).problems
    )


def test_keys_of_single_experts_keep_one_rank(tmp_path: Path) -> None:
    """As adapters of transformers 4 have them; PEFT stacks them as it loads, and wants one rank for all."""
    base = models.MODELS["mixtral"]()
    generator = torch.Generator().manual_seed(1)
    tensors, prefix = {}, "base_model.model.model.layers"
    for layer in range(2):
        for expert in range(4):
            for leaf, d, k in (("w1", 48, 32), ("w3", 48, 32), ("w2", 32, 48)):
                at = f"{prefix}.{layer}.block_sparse_moe.experts.{expert}.{leaf}"
                decay = torch.arange(1, 5).float() ** -(0.2 + expert)
                tensors[f"{at}.lora_A.weight"] = torch.randn(4, k, generator=generator) * decay[:, None]
                tensors[f"{at}.lora_B.weight"] = 0.3 * torch.randn(d, 4, generator=generator)
    (tmp_path / "a").mkdir()
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["w1", "w2", "w3"],
        "task_type": "CAUSAL_LM",
    }
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    result = compress(str(tmp_path / "a"), str(tmp_path / "out"), energy=0.9, dialect="peft")
    assert min(result.ranks.values()) < max(result.ranks.values())
    shapes = {
        tensor.shape[0]
        for key, tensor in load_file(tmp_path / "out" / "adapter_model.safetensors").items()
        if "lora_A" in key
    }
    assert shapes == {max(result.ranks.values())}
    compress(str(tmp_path / "a"), str(tmp_path / "same"), rank=4)
    wanted = models.outputs(models.adapted(base, tmp_path / "a"))
    assert models.distance(models.outputs(models.adapted(base, tmp_path / "same")), wanted) < 1e-5
    assert models.distance(models.outputs(base), wanted) > 1e-2


def kohya_file(path: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(6)
    shapes = {
        "lora_unet_down_blocks_0_attn_to_q": ((6, 40), (24, 6)),
        "lora_unet_mid_block_conv": ((6, 5, 3, 3), (24, 6, 1, 1)),
        "lora_te1_text_model_fc1": ((3, 16), (8, 3)),
    }
    tensors: dict[str, Tensor] = {}
    for number, (name, (down, up)) in enumerate(shapes.items()):
        tensors[f"{name}.lora_down.weight"] = torch.randn(down, generator=generator).half()
        tensors[f"{name}.lora_up.weight"] = torch.randn(up, generator=generator).half()
        if number:
            tensors[f"{name}.alpha"] = torch.tensor(2.0 * number).half()
    save_file(tensors, path, metadata={"ss_network_dim": "6", "ss_network_alpha": "2", "ss_sd_model_name": "sdxl"})
    return tensors


@pytest.mark.parametrize("asked", [{"rank": 2}, {"energy": 0.8}, {"rank": 6}], ids=str)
def test_kohyas_keys_stay_kohyas(asked: dict[str, float], tmp_path: Path) -> None:
    kohya_file(tmp_path / "style.safetensors")
    result: CompressResult = compress(
        str(tmp_path / "style.safetensors"), str(tmp_path / "out"), dtype="float32", **asked
    )  # type: ignore[arg-type]
    before, after = deltas(tmp_path / "style.safetensors"), deltas(tmp_path / "out")
    assert set(before) == set(after) == set(result.ranks)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    for name, whole in before.items():
        rank = result.ranks[name]
        assert_best_of_rank(after[name], whole, rank)
        assert tensors[f"{name}.lora_down.weight"].shape[0] == rank == float(tensors[f"{name}.alpha"])
    assert lora.open_adapter(str(tmp_path / "out")).metadata == {
        "ss_network_dim": str(result.rank), "ss_network_alpha": str(result.rank), "ss_sd_model_name": "sdxl",
    }  # fmt: skip
