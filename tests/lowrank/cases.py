"""Matrices of chosen spectra, what is true of them, and factorisations as a test wants them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from phlora_pipeline import lowrank
from phlora_pipeline.lowrank import PROFILES, Factors, Outcome, Pair, Profile, Settings
from tests.toys import with_spectrum

CPU = torch.device("cpu")

SHORT = {name: replace(PROFILES[name], name=f"short {name}", steps=3, least_block=8) for name in ("cpu", "cpu-bf16")}
"""Profiles whose Krylov bases start with three blocks of eight rows, so that toy matrices are large enough for them."""

SPECTRA: dict[str, Callable[[int], Tensor]] = {
    "power": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -0.6,
    "steep": lambda n: 0.5 ** torch.arange(n, dtype=torch.float64),
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "clustered": lambda n: torch.tensor([3.0, 3.0, 3.0, 1.0, 1.0, *[0.1] * n], dtype=torch.float64)[:n],
    "rank two": lambda n: torch.tensor([3.0, 2.0, *[0.0] * n], dtype=torch.float64)[:n],
    "tiny": lambda n: 1e-18 * torch.arange(n, 0, -1, dtype=torch.float64),
    "huge": lambda n: 1e15 * torch.arange(n, 0, -1, dtype=torch.float64),
}


def delta_of(d: int, k: int, spectrum: str, *, seed: int = 0) -> Tensor:
    """A float32 matrix whose singular values are these, but for rounding."""
    return with_spectrum(d, k, SPECTRA[spectrum](min(d, k)), seed=seed).float()


def energies_of(delta: Tensor) -> Tensor:
    """σ² of a matrix as it is, from an independent float64 decomposition."""
    return torch.linalg.svdvals(delta.double()).square()


def left_by(found: Factors, delta: Tensor) -> float:
    """‖ΔW − B·A‖_F² in float64, entry by entry."""
    return float((delta.double() - found.B.double() @ found.A.double()).square().sum())


def loss_of(found: Factors, delta: Tensor) -> float:
    """E_r(optimal) − E_r of these factors."""
    energies = energies_of(delta)
    return (left_by(found, delta) - float(energies[len(found.singular_values) :].sum())) / float(energies.sum())


def pair_of(delta: Tensor) -> Pair:
    """Two weights whose difference is exactly this."""
    return torch.zeros_like(delta), delta


def outcomes(
    deltas: Sequence[Tensor], wanted: Settings, *, profile: Profile = SHORT["cpu"], names: Sequence[str] = (), **others: Any
) -> list[Outcome]:  # fmt: skip
    called = names or [f"w{number}" for number in range(len(deltas))]
    return lowrank.decompose([pair_of(delta) for delta in deltas], called, wanted, profile, CPU, **others)


def factors_of(delta: Tensor, rank: int, *, profile: Profile = SHORT["cpu"], name: str = "w", **wanted: Any) -> Factors:
    [found] = outcomes([delta], Settings(rank, **wanted), profile=profile, names=[name])
    assert found.factors is not None, found.failure
    return found.factors


def same_bytes(one: Factors, other: Factors) -> bool:
    """Everything that a part stores."""
    numbers = [(each.singular_values, each.residual_sq, each.certificate, each.solver) for each in (one, other)]
    return numbers[0] == numbers[1] and torch.equal(one.A, other.A) and torch.equal(one.B, other.B)


def projector(rows: Tensor) -> Tensor:
    """Onto the span of rows: what does not depend on signs, order or rotations."""
    Q = torch.linalg.qr(rows.double().mT)[0]
    return Q @ Q.mT
