"""A threshold of energy instead of a rank, from the command to the written adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from phlora_pipeline.errors import RequestError
from phlora_pipeline.lowrank import solve
from phlora_pipeline.verify import verify
from tests import runs, toys

WIDE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Each matrix of the fine-tune moved along a spectrum that falls at its own rate."""
    folder = tmp_path_factory.mktemp("pair")
    base = toys.llama_tensors(layers=1, hidden=64, inner=96)
    tuned = dict(base)
    matrices = sorted(name for name, value in base.items() if value.ndim == 2)
    for number, name in enumerate(matrices):
        d, k = base[name].shape
        sigma = torch.arange(1, min(d, k) + 1).double() ** -(0.3 + 0.2 * number)
        tuned[name] = base[name] + toys.with_spectrum(d, k, sigma, seed=number).float()
    return toys.save(folder / "base", base), toys.save(folder / "tuned", tuned)


@pytest.mark.parametrize("threshold", [0.3, 0.9, 0.999])
@pytest.mark.parametrize("dialect", ["peft", "portable"])
def test_each_tensor_has_the_smallest_rank_that_reaches_the_threshold(
    threshold: float, dialect: str, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    result = runs.extract(*pair, tmp_path / "out", energy=threshold, dialect=dialect)
    adapted = [row for row in runs.rows(tmp_path / "out").values() if row.rank is not None]
    assert adapted
    for row in adapted:
        squares = torch.tensor(row.singular_values).double().square().cumsum(0) / row.delta_norm**2
        assert row.rank == len(row.singular_values)
        assert squares[-1] >= threshold - 1e-6
        assert row.rank == 1 or squares[-2] < threshold
        assert row.reason == ""
    assert len({row.rank for row in adapted}) > 1
    assert result.rank == max(row.rank for row in adapted)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == result.written_rank >= result.rank
    ranks = {row.module: row.rank for row in adapted}
    for key, value in load_file(tmp_path / "out" / "adapter_model.safetensors").items():
        module = re.sub(r"^base_model\.model\.|\.lora_.*$", "", key)
        assert (result.written_rank if dialect == "portable" else ranks[module]) in value.shape
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out")).passed


def test_a_threshold_that_is_not_reached_at_the_cap_says_so(pair: tuple[Path, Path], tmp_path: Path) -> None:
    result = runs.extract(*pair, tmp_path / "out", energy=0.99, max_rank=4)
    capped = [row for row in runs.rows(tmp_path / "out").values() if "not reached" in row.reason]
    assert capped
    assert all(row.rank == 4 and row.preserved_energy < 0.99 for row in capped)
    assert result.rank == 4


def test_the_same_command_again_finds_it_there(pair: tuple[Path, Path], tmp_path: Path) -> None:
    first = runs.extract(*pair, tmp_path / "out", energy=0.5)
    again = runs.extract(*pair, tmp_path / "out", energy=0.5)
    assert (again.outcome, again.rank, again.written_rank, again.version) == (
        "exists", first.rank, first.written_rank, first.version,
    )  # fmt: skip


def test_a_large_matrix_reaches_its_threshold_without_a_full_decomposition(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = toys.llama_tensors(layers=1, hidden=1200, kv=64, inner=1300)
    tuned = dict(base)
    tuned[WIDE] = base[WIDE] + toys.with_spectrum(1300, 1200, torch.arange(1, 41).double() ** -0.7).float()
    folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned)
    monkeypatch.setattr(solve.full, "exact", None)
    monkeypatch.setattr(solve.full, "gram_eigen", None)
    runs.extract(*folders, tmp_path / "out", energy=0.8, solver="krylov")
    row = runs.rows(tmp_path / "out")[WIDE]
    squares = torch.arange(1, 41).double() ** -1.4
    assert row.rank == 1 + int((squares.cumsum(0) / squares.sum() < 0.8).sum())
    assert row.solver.startswith("krylov")


@pytest.mark.parametrize("energy", [0, -0.1, 1.01, float("nan")])
def test_a_threshold_outside_of_0_and_1_is_refused(energy: float, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="energy"):
        runs.extract(*pair, tmp_path / "out", energy=energy)
