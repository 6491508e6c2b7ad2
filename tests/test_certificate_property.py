"""True loss ≤ certificate, in every case that hypothesis thinks of; and it finds out where a certificate is wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank import (
    PROFILES,
    SOLVERS,
    Factors,
    Pair,
    Profile,
    Settings,
    Solver,
    decompose,
    krylov,
    operator,
    solve,
)
from phlora_pipeline.lowrank import certificate as formulas
from phlora_pipeline.lowrank.ritz import Compression
from phlora_pipeline.lowrank.routes import Round
from tests.lowrank.cases import CPU, SHORT
from tests.toys import with_spectrum

LOSSY = 1e-6
"""Of ‖ΔW‖_F²: a loss that the rounding term alone would not cover."""

SPECTRA: dict[str, Callable[[Tensor, float], Tensor]] = {
    "power law": lambda i, a: i ** -(0.05 + 1.95 * a),
    "flat": lambda i, a: torch.ones_like(i),
    "rank-deficient": lambda i, a: (i <= 1 + a * len(i) / 2) * i**-0.3,
    "clustered": lambda i, a: 10.0 ** -torch.floor(4 * a * i / len(i)),
    "one dominating": lambda i, a: torch.where(i == 1, 1.0, 10 ** (-4 * a)),
    "geometric": lambda i, a: (0.99 - 0.6 * a) ** i,
}
KINDS = (*SPECTRA, "noise", "rounding noise", "dominating columns")


@dataclass(frozen=True)
class Case:
    """A pair of weights, and how far the iteration goes: where it is `dimmed`, Ω has less or nothing of v_1."""

    kind: str
    shape: tuple[int, int]
    rank: int
    seed: int = 0
    shade: float = 0.5
    exponent: int = 0
    low: str = "cpu"
    block: int = 4
    blocks: int = 2
    spare: int = 0
    degree: int = 6
    dimmed: float = 1.0

    def pair(self) -> Pair:
        d, k = self.shape
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "rounding noise":
            base = (0.02 * torch.randn(d, k, generator=generator)).bfloat16()
            moved = base.float() + 10 ** (-5 + 3 * self.shade) * torch.randn(d, k, generator=generator)
            return base, moved.bfloat16()
        if self.kind in SPECTRA:
            index = torch.arange(1, min(d, k) + 1, dtype=torch.float64)
            delta = with_spectrum(d, k, SPECTRA[self.kind](index, self.shade), seed=self.seed)
            delta /= torch.linalg.norm(delta)
        else:
            delta = torch.randn(d, k, generator=generator, dtype=torch.float64) / math.sqrt(d * k)
            if self.kind == "dominating columns":
                delta *= torch.where(torch.rand(k, generator=generator) < 0.05, 1.0, 10 ** (-3 * self.shade))
        delta = (delta * 10.0**self.exponent).float()
        return torch.zeros_like(delta), delta

    def round(self) -> Round:
        rank = min(self.rank, *self.shape)
        width = max(self.block * self.blocks, rank + self.spare)
        return Round(rank, self.block, width, rank + self.spare, self.degree)


CASES = st.builds(
    Case,
    kind=st.sampled_from(KINDS),
    shape=st.one_of(
        st.tuples(st.integers(40, 200), st.integers(40, 300)),
        st.tuples(st.integers(40, 300), st.integers(40, 200)),
        st.tuples(st.integers(1, 200), st.integers(1, 300)),
        st.tuples(st.just(1), st.integers(1, 300)) | st.tuples(st.integers(1, 300), st.just(1)),
    ),
    rank=st.integers(1, 24),
    seed=st.integers(0, 2**20),
    shade=st.floats(0, 1),
    exponent=st.one_of(st.just(0), st.integers(-30, 30)),
    low=st.sampled_from(["cpu", "cpu-bf16"]),
    block=st.integers(1, 8),
    blocks=st.integers(1, 3),
    spare=st.integers(0, 4),
    degree=st.integers(1, 30),
    dimmed=st.sampled_from([1.0, 0.1, 1e-3, 0.0]),
)


def delta_of(pair: Pair) -> Tensor:
    return pair[1].float() - pair[0].float()


def losses(delta: Tensor, factors: Factors) -> Tensor:
    """E_r(optimal) − E_r(ours) in float64, for every r that the factors hold: ‖D‖² − ‖D − BA‖² = 2⟨D, BA⟩ − ‖BA‖²."""
    D, B, A = delta.double(), factors.B.double(), factors.A.double()
    D, B = D / (size := torch.linalg.norm(D)), B / size
    inner = ((B.mT @ D) * A).sum(dim=1).cumsum(0)
    own = ((B.mT @ B) * (A @ A.mT)).cumsum(0).cumsum(1).diagonal()
    return torch.linalg.svdvals(D)[: len(A)].square().cumsum(0) - (2 * inner - own)


@contextmanager
def stopped_early(case: Case, delta: Tensor) -> Iterator[None]:
    """One round of Krylov and no other."""

    def dimmed(*args: Any) -> Tensor:
        omega = gaussian(*args)
        if case.dimmed == 1:
            return omega
        D = delta.double() if delta.shape[0] <= delta.shape[1] else delta.double().mT
        v = torch.linalg.svd(D, full_matrices=False)[2][:1].float()
        return omega - (1 - case.dimmed) * (omega @ v.mT) @ v

    gaussian = krylov.gaussian
    with (
        mock.patch.object(solve, "planned", return_value=([case.round()], "exact")),
        mock.patch.object(krylov, "gaussian", dimmed),
    ):
        yield


@contextmanager
def slice_by_slice() -> Iterator[None]:
    """ΔW is never resident, in slices of a few columns."""
    module = sys.modules["phlora_pipeline.lowrank.decompose"]  # the package calls a function by its name
    with mock.patch.object(module, "is_blocked", return_value=True), mock.patch.object(operator, "CHUNK", 1 << 10):
        yield


def loss_and_certificate(pair: Pair, name: str, wanted: Settings, profile: Profile) -> tuple[float, float]:
    """The largest true loss of any rank, and what is said of it; a ΔW of zeros has neither."""
    [outcome] = decompose([pair], [name], wanted, profile, CPU)
    delta = delta_of(pair)
    if not delta.any():
        assert outcome.factors is None
        return 0.0, 0.0
    assert outcome.factors is not None, outcome.failure
    return float(losses(delta, outcome.factors).max()), outcome.factors.certificate


def stopped(case: Case) -> tuple[float, float]:
    pair = case.pair()
    wanted = Settings(case.rank, "krylov", tolerance=math.inf)
    with stopped_early(case, delta_of(pair)):
        return loss_and_certificate(pair, f"layers.{case.seed}", wanted, PROFILES[case.low])


def many(examples: int) -> settings:
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


@pytest.mark.slow
def test_a_certificate_holds_wherever_the_iteration_stops() -> None:
    seen: list[float] = []

    @many(2100)
    @given(CASES)
    def holds(case: Case) -> None:
        loss, certificate = stopped(case)
        assert loss <= certificate
        seen.append(loss)

    holds()
    assert len(seen) >= 2000
    assert sum(loss > LOSSY for loss in seen) >= len(seen) / 4


@pytest.mark.slow
@many(800)
@given(
    case=CASES,
    solver=st.sampled_from(SOLVERS),
    profiles=st.sampled_from([PROFILES, SHORT, SHORT]),
    energy=st.none() | st.floats(0.01, 1),
    tolerance=st.sampled_from([1e-3, 1e-6, 1.0]),
    sliced=st.booleans(),
)
def test_a_certificate_holds_whatever_the_route(
    case: Case, solver: Solver, profiles: dict[str, Profile], energy: float | None, tolerance: float, sliced: bool
) -> None:
    wanted = Settings(case.rank, solver, tolerance, energy)
    with slice_by_slice() if sliced else nullcontext():
        loss, certificate = loss_and_certificate(case.pair(), f"layers.{case.seed}", wanted, profiles[case.low])
    assert loss <= certificate


def _compressed(change: Callable[[Compression, int], Compression]) -> AbstractContextManager[Any]:
    def bound(found: Compression, tails: Sequence[float], rank: int) -> list[list[float]]:
        return optimum_bound(change(found, rank), tails, rank)

    optimum_bound = solve.optimum_bound
    return mock.patch.object(solve, "optimum_bound", bound)


def no_inflation() -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(mock.patch.object(formulas, "chi_square_quantile", lambda degrees, _: float(degrees)))
    stack.enter_context(mock.patch.object(formulas, "_PANEL_ROUNDING", 1.0))
    return stack


def no_tail() -> AbstractContextManager[Any]:
    return mock.patch.object(solve, "tail_bound", lambda op, V, names, *_: [0.0] * len(names))


def no_residual() -> AbstractContextManager[Any]:
    return _compressed(lambda found, rank: replace(found, S=torch.zeros_like(found.S)))


def one_block_less() -> AbstractContextManager[Any]:
    """P is what is left of G without all of V; M and S lack its last rows."""

    def without(found: Compression, rank: int) -> Compression:
        p = max(rank, found.M.shape[1] - 4)
        return replace(found, M=found.M[:, :p, :p], S=found.S[:, :p, :p])

    return _compressed(without)


def no_rounding_term() -> AbstractContextManager[Any]:
    return mock.patch.object(formulas, "_ROUNDING", 0.0)


TRAPS = [
    Case(kind, (40, 60), rank, seed=seed, shade=0.1, blocks=1, spare=spare, degree=degree, dimmed=dimmed)
    for seed in range(3)
    for kind in ("rank-deficient", "dominating columns")
    for rank in (1, 3)
    for spare in (3, 9)
    for degree in (3, 20)
    for dimmed in (0.0, 0.1)
] + [Case("clustered", (7, 7), 4, seed=200, shade=0.26, low="cpu-bf16", block=6, spare=6, degree=7, dimmed=0.0)]
"""Directions that the range finder hardly sees, above a tail without others to make up for them."""


def violations(cases: Sequence[Case]) -> Iterator[Case]:
    for case in cases:
        loss, certificate = stopped(case)
        if not loss <= certificate + 1e-10:
            yield case


def test_a_certificate_falls_into_none_of_the_traps() -> None:
    assert list(violations(TRAPS)) == []


@pytest.mark.parametrize("mutant", [no_inflation, no_tail, no_residual, one_block_less, no_rounding_term])
def test_a_certificate_that_lacks_a_term_is_caught(mutant: Callable[[], AbstractContextManager[Any]]) -> None:
    with mutant():
        assert any(violations(TRAPS))
