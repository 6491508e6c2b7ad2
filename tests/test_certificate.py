"""The parts of the certificate, each for itself, and the matrices that it was once wrong about; how tight it is."""

from __future__ import annotations

import math
from dataclasses import replace
from decimal import Decimal, localcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank import PROFILES, Factors, Settings, decompose, solve
from phlora_pipeline.lowrank import certificate as formulas
from phlora_pipeline.lowrank.certificate import certificate, chi_square_quantile, optimum_bound, tail_bound
from phlora_pipeline.lowrank.operator import Dense
from phlora_pipeline.lowrank.ritz import Compression
from tests.toys import with_spectrum

INDEX = torch.arange(1, 257, dtype=torch.float64)


def factors_of(delta: Tensor, profile: str, wanted: Settings) -> Factors:
    pair = (torch.zeros_like(delta), delta)
    [outcome] = decompose([pair], ["layers.0"], wanted, PROFILES[profile], torch.device("cpu"))
    assert outcome.factors is not None, outcome.failure
    return outcome.factors


def true_loss(delta: Tensor, factors: Factors, energies: Tensor | None = None) -> float:
    """E_r(optimal) − E_r(ours) in float64, from the matrices alone."""
    D = delta.double()
    norm_sq = D.square().sum()
    energies = torch.linalg.svdvals(D).square() if energies is None else energies
    left = (D - factors.B.double() @ factors.A.double()).square().sum()
    return float((energies[: len(factors.A)].sum() - (norm_sq - left)) / norm_sq)


@pytest.mark.parametrize("profile", ["cpu", "cpu-bf16"])
@pytest.mark.parametrize("rank", [4, 16])
@pytest.mark.parametrize("tail", [1e-2, 1e-3, 1e-4, 1e-5, "halving"])
def test_a_steep_spectrum_is_certified(tail: float | str, rank: int, profile: str) -> None:
    sigma = 0.5**INDEX if tail == "halving" else torch.cat([torch.ones(1), float(tail) * INDEX[:-1] ** -0.4])
    delta = with_spectrum(256, 300, sigma).float()
    factors = factors_of(delta, profile, Settings(rank, "krylov"))
    assert true_loss(delta, factors) <= factors.certificate
    assert not any("random rows" in note for note in factors.notes), factors.notes


@pytest.mark.parametrize("norm", [1e-30, 1e-37, 1e-40, 1e-43, 1e30])
def test_a_tiny_or_huge_norm_is_certified(norm: float) -> None:
    delta = (norm * with_spectrum(256, 300, INDEX**-0.4)).float()
    factors = factors_of(delta, "cpu-bf16", Settings(4, "krylov"))
    assert true_loss(delta, factors) <= factors.certificate


def test_a_certificate_is_a_number() -> None:
    """A basis much wider than the rank of ΔW: the tail is rounding, and a polynomial of high degree overflows on it."""
    delta = with_spectrum(640, 640, torch.ones(20)).float()
    factors = factors_of(delta, "cpu-bf16", Settings(16, "krylov", tolerance=1e-12))
    assert math.isfinite(factors.certificate)


def test_a_direction_that_the_rounding_hides_is_certified() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.outer(torch.randn(1024, generator=generator).sign(), torch.randn(1024, generator=generator).sign())
    delta = 1 + 0.0019 * hidden  # every entry rounds to 1
    factors = factors_of(delta, "cpu-bf16", Settings(2, "krylov"))
    assert true_loss(delta, factors) <= factors.certificate


def power_law(d: int, k: int, exponent: float) -> Tensor:
    return with_spectrum(d, k, torch.arange(1, min(d, k) + 1, dtype=torch.float64) ** -exponent).float()


SQUARE = [(576, 576, exponent) for exponent in (0.35, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)]


@pytest.mark.parametrize(("d", "k", "exponent"), [*SQUARE, (1024, 1024, 0.35), (512, 2048, 0.35), (512, 2048, 1.0)])
def test_a_certificate_is_tight_on_power_laws(d: int, k: int, exponent: float) -> None:
    delta = power_law(d, k, exponent)
    optimal = torch.linalg.svdvals(delta.double()).square()
    for rank in (16, 32):
        for profile in ("cpu", "cpu-bf16"):
            factors = factors_of(delta, profile, Settings(rank, "krylov"))
            loss = true_loss(delta, factors, optimal)
            assert loss <= factors.certificate < (3 * loss if loss >= 1e-6 else 5e-6), (rank, profile)


@pytest.mark.parametrize("exponent", [0.35, 0.5])
def test_a_certificate_of_a_loss_is_of_its_size_where_the_tail_is_known_well(
    exponent: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the loss of the subspace that it is of: the factors are half a step further, and have lost less."""

    def thorough(*args, **kwargs):
        rounds, last = planned(*args, **kwargs)
        return [replace(step, degree=36) for step in rounds], last

    def noted(found, tails, rank):
        ritz.append(float(torch.linalg.eigvalsh(found.M[0]).flip(-1)[:rank].sum()))
        return optimum_bound(found, tails, rank)

    ritz: list[float] = []
    planned = solve.planned
    monkeypatch.setattr(solve, "planned", thorough)
    monkeypatch.setattr(solve, "optimum_bound", noted)
    delta = power_law(576, 576, exponent)
    pair = (torch.zeros_like(delta), delta)
    early = replace(PROFILES["cpu"], block_per_rank=0.5, steps=7)
    [outcome] = decompose([pair], ["layers.0"], Settings(16, "krylov"), early, torch.device("cpu"))
    energies = torch.linalg.svdvals(delta.double()).square()
    lost = float((energies[:16].sum() - ritz[0]) / energies.sum())
    assert 1e-6 < true_loss(delta, outcome.factors) < 0.8 * lost
    assert lost <= outcome.factors.certificate < 4 * lost


def compression(G: Tensor, V: Tensor) -> tuple[Compression, Tensor]:
    """What V (p, n) tells about G in float64, and P."""
    off = torch.eye(len(G), dtype=torch.float64) - V.mT @ V
    C = V @ G @ off
    return Compression(V.unsqueeze(0), (V @ G @ V.mT).unsqueeze(0), (C @ C.mT).unsqueeze(0)), off @ G @ off


def rotation(n: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    n=st.integers(1, 40),
    share=st.floats(0, 1),
    kept=st.floats(0, 1),
    decay=st.floats(0, 3),
    mixed=st.sampled_from([0.0, 1e-4, 0.03, 0.3, 10.0]),
    seed=st.integers(0, 2**20),
)
def test_each_eigenvalue_is_below_its_bound(
    n: int, share: float, kept: float, decay: float, mixed: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    W = rotation(n, generator)
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -decay
    G = (W * values) @ W.mT
    p = 1 + round(share * (n - 1))
    noise = torch.randn(p, n, generator=generator, dtype=torch.float64)
    V = torch.linalg.qr((W[:, torch.randperm(n, generator=generator)[:p]].mT + mixed * noise).mT)[0].mT
    found, P = compression(G, V)
    rank = 1 + round(kept * (p - 1))
    [bounds] = optimum_bound(found, [float(torch.linalg.matrix_norm(P, 2))], rank)
    assert all(value <= bound + 1e-12 for value, bound in zip(values.tolist(), bounds, strict=False))


def test_an_invariant_subspace_of_the_leading_eigenvectors_is_bounded_by_its_own_eigenvalues() -> None:
    W = rotation(30, torch.Generator().manual_seed(0))
    values = 0.7 ** torch.arange(30, dtype=torch.float64)
    found, P = compression((W * values) @ W.mT, W[:, :10].mT)
    [bounds] = optimum_bound(found, [float(torch.linalg.matrix_norm(P, 2))], 8)
    assert bounds == pytest.approx(values[:8].tolist(), rel=1e-9)


def test_a_certificate_that_is_not_a_number_is_infinite() -> None:
    assert certificate(math.nan, 0.5, 1.0) == math.inf
    assert certificate(math.inf, 0.5, 1.0) == math.inf
    assert 0 < certificate(0.4, 0.5, 1.0) < 1e-6


@pytest.mark.parametrize("probability", [1e-9, 1e-3, 0.2, 0.5, 0.9])
def test_a_quantile_of_two_degrees_of_freedom_is_a_logarithm(probability: float) -> None:
    assert chi_square_quantile(2, probability) == pytest.approx(min(2.0, -2 * math.log1p(-probability)), rel=1e-9)


@pytest.mark.parametrize("probability", [1e-12, 1e-9, 1e-3, 0.2, 0.5])
@pytest.mark.parametrize("degrees", [4, 8, 16, 40])
def test_a_quantile_has_its_probability_below_it(degrees: int, probability: float) -> None:
    with localcontext() as context:
        context.prec = 60
        half = Decimal(chi_square_quantile(degrees, probability)) / 2
        above = sum(half**index / math.factorial(index) for index in range(degrees // 2)) * (-half).exp()
        assert float(1 - above) == pytest.approx(probability, rel=1e-9)


NAMES = [f"layers.{number}" for number in range(1000)]


def tails(delta: Tensor, V: Tensor, guess: float, degree: int, low: torch.dtype = torch.float32) -> Tensor:
    """μ by 1000 names over the true λ_max(P)."""
    op = Dense(delta.expand(len(NAMES), *delta.shape), low)
    found = tail_bound(
        op, V.expand(len(NAMES), *V.shape), NAMES, [guess * largest(delta, V)] * len(NAMES), [1.0] * len(NAMES), degree
    )
    return torch.tensor(found, dtype=torch.float64) / largest(delta, V)


def largest(delta: Tensor, V: Tensor) -> float:
    D, Q = delta.double(), V.double()
    return float(torch.linalg.matrix_norm(D - D @ Q.mT @ Q, 2)) ** 2


def deflated(kind: str) -> tuple[Tensor, Tensor]:
    """A D of norm 1 and three rows of V, with a tail of this kind."""
    generator = torch.Generator().manual_seed(5)
    W = rotation(30, generator)
    sigma = {
        "one direction": torch.tensor([3.0, 2.0, 2.0, 1.0]),
        "flat": torch.tensor([3.0, 2.0, 2.0, *[1.0] * 16]),
        "power law": torch.arange(1, 20) ** -0.5,
    }[kind].double()
    D = (rotation(20, generator)[:, : len(sigma)] * sigma) @ W[: len(sigma)]
    return (D / torch.linalg.norm(D)).float(), W[:3].float()


@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["one direction", "flat", "power law"])
def test_a_tail_is_never_above_its_bound(kind: str, low: torch.dtype) -> None:
    """And it has one, where the polynomials of a guess that is far too low outgrow float32."""
    delta, V = deflated(kind)
    for degree in (1, 2, 3, 9, 36):
        for guess in (0.0, 0.3, 1.0, 3.0):
            found = tails(delta, V, guess, degree, low)
            assert float(found.min()) > 1, (degree, guess)
            assert found.isfinite().all(), (degree, guess)


@pytest.mark.parametrize("kind", ["one direction", "flat", "power law"])
def test_a_bound_of_the_tail_converges_with_the_degree(kind: str) -> None:
    delta, V = deflated(kind)
    medians = [float(tails(delta, V, 0.9, degree).median()) for degree in (1, 3, 9, 36)]
    assert medians == sorted(medians, reverse=True)
    assert medians[-1] < 1.1


def test_a_tail_that_is_no_number_is_bounded_by_nothing_and_spoils_no_other() -> None:
    delta, V = deflated("flat")
    both = Dense(torch.stack([torch.full_like(delta, math.nan), delta]), torch.float32)
    alone = Dense(delta.unsqueeze(0), torch.float32)
    beta = 0.9 * largest(delta, V)
    unknown, known = tail_bound(both, torch.stack([V, V]), NAMES[:2], [beta, beta], [1.0, 1.0], 3)
    assert unknown == math.inf
    assert known == pytest.approx(tail_bound(alone, V.unsqueeze(0), NAMES[1:2], [beta], [1.0], 3)[0], rel=1e-5)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_a_bound_of_the_tail_fails_as_often_as_is_said(degree: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly so where the tail is one direction, and more seldom where others add to what Z sees."""
    monkeypatch.setattr(formulas, "FAILURE", 0.2)
    monkeypatch.setattr(formulas, "_PANEL_ROUNDING", 1.0)
    deviation = math.sqrt(len(NAMES) * 0.2 * 0.8)
    failures = {kind: int((tails(*deflated(kind), 0.01, degree) < 1).sum()) for kind in ("one direction", "power law")}
    assert abs(failures["one direction"] - 0.2 * len(NAMES)) < 4 * deviation
    assert failures["power law"] < 0.2 * len(NAMES) + 4 * deviation
