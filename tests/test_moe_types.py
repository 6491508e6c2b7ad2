"""Every type of mixture of experts that `servers.toml` says PEFT takes: loaded by it, at full rank, it is the fine-tune."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

from phlora_pipeline import targets
from phlora_pipeline.verify import verify
from tests import models, runs
from tests.test_peft_models import FULL, pytestmark

__all__ = ["pytestmark"]

TYPES = [kind for kind in targets.model_types() if "expert" in targets.server_rules(kind, "peft").kinds]
AS_IN_MEMORY = ["minimax", "lfm2_moe", "qwen2_moe", "deepseek_v3"]
"""Names of single experts are w1 … or gate_proj …; and their config is PEFT's to convert, or ours. Mixtral and others have tests of their own."""

LEFT_OUT = {
    "phimoe": {"block_sparse_moe.gate.weight"},  # called `router` in memory
    "jamba": {"mamba.A_log", "mamba.conv1d.weight", "mamba.dt_proj.weight"},
    "lfm2_moe": {"conv.conv.weight"},
    "qwen3_next": {"linear_attn.conv1d.weight"},
}


def weights(name: str, parameter: Tensor) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias")


@pytest.mark.parametrize(
    ("model_type", "as_in_memory"),
    [*((kind, False) for kind in TYPES if kind != "gpt_oss"), *((kind, True) for kind in AS_IN_MEMORY)],
)
def test_full_rank_is_the_fine_tune(model_type: str, as_in_memory: bool, tmp_path: Path) -> None:
    """Dense layers, shared experts and routers with it; what is left out is named, and is the rest of the difference."""
    base = models.moe(model_type)
    tuned = models.moved(base, where=weights)
    folders = [
        models.save(model, tmp_path / name, as_in_memory=as_in_memory) for model, name in ((base, "b"), (tuned, "t"))
    ]
    out = tmp_path / "out"
    wanted = models.outputs(type(base).from_pretrained(folders[1]).eval())
    runs.extract(folders[0], folders[1], out, rank=FULL, dialect="peft")
    assert verify(*map(str, folders), str(out)).passed
    rows = runs.rows(out).values()
    left_out = [row.tensor for row in rows if row.status == "skipped"]
    assert {name.split(".", 3)[3] for name in left_out} == LEFT_OUT.get(model_type, set())
    assert {row.status for row in rows if row.kind == "expert"} == {"adapted"}
    completed = models.with_tensors_of(folders[0], folders[1], left_out, tmp_path / "completed")
    model = models.loaded(type(base).from_pretrained(completed).eval(), out)
    assert models.distance(models.outputs(model), wanted) < 1e-4
    assert models.distance(models.outputs(base), wanted) > 0.1


@pytest.mark.parametrize("model_type", ["jamba", "lfm2_moe", "qwen3_next"])
def test_what_a_mixer_reads_past_its_modules_is_kept_whole(model_type: str, tmp_path: Path) -> None:
    """Depthwise kernels and dt_proj, by `--carry all`; what is a bare parameter has no place in PEFT."""
    base = models.moe(model_type)
    tuned = models.moved(base, where=models.everything, scale=0.03)
    folders, out = (models.save(base, tmp_path / "b"), models.save(tuned, tmp_path / "t")), tmp_path / "out"
    runs.extract(*folders, out, rank=FULL, dialect="peft", carry="all")
    rows = runs.rows(out).values()
    kept = [row.tensor for row in rows if row.status == "carried"]
    for name in LEFT_OUT[model_type] - {"mamba.A_log"}:
        assert any(tensor.endswith(name) for tensor in kept)
    left_out = [row.tensor for row in rows if row.status == "skipped"]
    completed = models.with_tensors_of(*folders, left_out, tmp_path / "completed")
    model = models.loaded(type(base).from_pretrained(completed).eval(), out)
    assert models.distance(models.outputs(model), models.outputs(tuned)) < 1e-4
    assert verify(*map(str, folders), str(out)).passed


@pytest.mark.parametrize("model_type", ["qwen2_moe", "minimax"])
def test_no_rank_is_worse_than_a_smaller_one(model_type: str, tmp_path: Path) -> None:
    base = models.moe(model_type)
    tuned = models.moved(base, where=weights)
    folders = models.save(base, tmp_path / "b"), models.save(tuned, tmp_path / "t")
    wanted, last = tuned.state_dict(), dict.fromkeys(tuned.state_dict(), float("inf"))
    for rank in (1, 6, FULL):
        runs.extract(*folders, tmp_path / str(rank), rank=rank, dialect="peft")
        merged = models.adapted(base, tmp_path / str(rank)).merge_and_unload().state_dict()
        residuals = {name: float((wanted[name] - merged[name]).norm()) for name in wanted}
        assert all(residuals[name] <= last[name] + 1e-5 for name in wanted)
        last = residuals
    assert max(last.values()) < 1e-3


def test_the_config_names_the_parameters_that_peft_does_not(tmp_path: Path) -> None:
    base = models.moe("qwen2_moe")
    folders = models.save(base, tmp_path / "b"), models.save(models.moved(base, where=weights), tmp_path / "t")
    runs.extract(*folders, tmp_path / "out", rank=6, dialect="peft")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {"experts.gate_up_proj", "experts.down_proj", "model.layers.0.mlp.gate.weight"} <= set(
        config["target_parameters"]
    )
    assert config["rank_pattern"] == config["alpha_pattern"] == {r".*\.experts\.gate_up_proj": 12}
    assert not any("expert" in name and "shared" not in name for name in config["target_modules"])
