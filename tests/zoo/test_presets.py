"""The paper's setting beside ours: a full SVD and the planned route give the same adapters, within what is certified."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from phlora_pipeline import manifest
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.zoo import latest
from phlora_pipeline.zoo.forecast import Cluster, forecast
from tests import toys
from tests.zoo.nights import Zoo

SHAPES = {"self_attn.q_proj": (640, 640), "self_attn.o_proj": (640, 640), "mlp.up_proj": (896, 640)}


def weights(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        f"model.layers.0.{leaf}.weight": scale * torch.randn(shape, generator=generator)
        for leaf, shape in SHAPES.items()
    }


def moved(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """By updates with the slowly falling spectra of full fine-tunes."""
    spectrum = torch.arange(1, 641, dtype=torch.float64) ** -0.5
    return {
        name: value + toys.with_spectrum(*value.shape, spectrum, seed=seed + number).float()
        for number, (name, value) in enumerate(base.items())
    }


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    base = weights(0)
    made = Zoo(tmp_path / "zoo", "")
    toys.save(made.root / "bases" / "b", base)
    for number in (1, 2):
        made.add(f"m{number}", moved(base, 10 * number))
    return made


def rows(out: str, model: str) -> dict[str, EnergyRow]:
    pointer = latest.read(out, model)
    assert pointer is not None
    return {row.tensor: row for row in manifest.read(f"{out}/{model}/{pointer.version}/energy.parquet")}


def test_auto_is_the_papers_result_within_its_certificate(zoo: Zoo, tmp_path: Path) -> None:
    found: dict[str, dict[str, EnergyRow]] = {}
    for name, extract in (("exact", {"preset": "paper"}), ("auto", {"rank": 32, "targets": "paper"})):
        zoo.out = str(tmp_path / name)
        told = forecast(zoo.config(extract=extract), Cluster(profile="cpu-bf16"))
        assert told.compute_seconds["exact"] > told.compute_seconds["auto"] > 0
        assert zoo.night(extract=extract).exit_code == 0
        found[name] = {
            f"{model} {tensor}": row for model in ("m1", "m2") for tensor, row in rows(zoo.out, model).items()
        }
    assert found["exact"].keys() == found["auto"].keys()
    assert len(found["auto"]) == 6
    for name, ours in found["auto"].items():
        full = found["exact"][name]
        assert (full.solver, full.rank, ours.rank) == ("exact", 32, 32)
        assert ours.solver is not None
        assert ours.solver.startswith("krylov")
        assert ours.certificate is not None
        assert ours.preserved_energy is not None
        assert full.preserved_energy is not None
        assert ours.certificate <= 1e-3
        assert -1e-6 <= full.preserved_energy - ours.preserved_energy <= ours.certificate
