"""No wrong factorisation gets by: each of the four facts, broken on its own; and right ones are not suspected."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank import checks
from phlora_pipeline.lowrank.full import exact, gram_eigen
from phlora_pipeline.lowrank.operator import Dense
from phlora_pipeline.lowrank.panels import gaussian
from phlora_pipeline.lowrank.ritz import Triplets
from phlora_pipeline.lowrank.routes import CHECK_ROWS
from tests.lowrank.cases import CPU, SPECTRA, delta_of, energies_of

Parts = tuple[Tensor, Tensor, Tensor]
"""short (q, m), long (q, n), σ² (q)."""


def problem_of(
    delta: Tensor, rank: int, change: Callable[[Tensor, Tensor, Tensor], Parts] | None = None, *, name: str = "w"
) -> str:
    """What the checks say of the true factors of ΔW, once they are changed."""
    op = Dense(delta.unsqueeze(0), torch.float32)
    found, *_ = exact(op, rank)
    parts = found.short[0].clone(), found.long[0].clone(), found.energies[0].clone()
    short, long, energies = change(*parts) if change else parts
    psi = gaussian([name], "check", CHECK_ROWS, op.shape[1], CPU)
    changed = Triplets(short.unsqueeze(0), long.unsqueeze(0), energies.unsqueeze(0))
    [told] = checks.problems(changed, [float(delta.double().square().sum())], psi, op.to_long(psi, precise=True))
    return told


@pytest.mark.parametrize("spectrum", [name for name in SPECTRA if name not in {"tiny", "huge"}])
@pytest.mark.parametrize(("d", "k"), [(30, 30), (50, 20), (20, 50), (1, 9), (9, 1), (1, 1)])
@pytest.mark.parametrize("rank", [1, 4, 50])
def test_true_factors_pass(d: int, k: int, spectrum: str, rank: int) -> None:
    assert problem_of(delta_of(d, k, spectrum), min(rank, d, k)) == ""


@pytest.mark.parametrize("d", [1, 3])
def test_a_long_row_of_equal_entries_passes(d: int) -> None:
    """As of a vocabulary whose tokens all move alike: float32 sums of so many entries of one sign are off by a hundredth."""
    delta = torch.full((d, 1 << 20), 0.3)
    op, psi = Dense(delta.unsqueeze(0), torch.float32), gaussian(["w"], "check", CHECK_ROWS, d, CPU)
    found, _, seen, spectrum = gram_eigen(op, 1, psi, torch.float64)
    assert checks.problems(found, [float(delta.double().square().sum())], psi, seen, spectrum.sum(dim=1).tolist()) == [
        ""
    ]


@settings(max_examples=50, deadline=None)
@given(name=st.text(max_size=12), rank=st.integers(1, 20), seed=st.integers(0, 99))
def test_true_factors_pass_under_every_name(name: str, rank: int, seed: int) -> None:
    """Random rows are others for each tensor; none of them may cast suspicion on what is right."""
    assert problem_of(delta_of(20, 30, "power", seed=seed), rank, name=name) == ""


def one_nan(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    short[2, 3] = math.nan
    return short, long, energies


def one_infinity(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    long[0, 0] = math.inf
    return short, long, energies


def energies_that_are_none(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    energies[1] = math.nan
    return short, long, energies


def rotated_on_one_side(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    """Still orthogonal rows of the right lengths, where two σ agree: but they belong to other v."""
    angle = torch.tensor(0.05)
    turn = torch.tensor([[torch.cos(angle), torch.sin(angle)], [-torch.sin(angle), torch.cos(angle)]])
    short[:2] = turn @ short[:2]
    return short, long, energies


def not_orthogonal(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    long[1] = long[1] + 0.01 * long[0]
    return short, long, energies


def a_row_twice(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    short[1], long[1], energies[1] = short[0], long[0], energies[0]
    return short, long, energies


def swapped_vectors(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    """Unit vectors exchanged on one side, with every length as it should be."""
    lengths = energies.pow(0.25).float().unsqueeze(-1)
    return (short / lengths)[[1, 0, *range(2, len(short))]] * lengths, long, energies


def one_sign(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    short[0] *= -1
    return short, long, energies


def larger(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    """By a thousandth in all three: consistent among themselves, and not with ΔW."""
    return short * 1.001**0.5, long * 1.001**0.5, energies * 1.001**2


def of_another_matrix(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    other, *_ = exact(Dense(delta_of(30, 40, "clustered", seed=9).unsqueeze(0), torch.float32), len(short))
    return other.short[0], other.long[0], other.energies[0]


def a_value_without_its_vectors(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    short[1], long[1] = 0, 0
    return short, long, energies


def vectors_without_their_value(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    energies[1] = 0
    return short, long, energies


def all_zero(short: Tensor, long: Tensor, energies: Tensor) -> Parts:
    return 0 * short, 0 * long, 0 * energies + 1e-3


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (one_nan, "not finite"),
        (one_infinity, "not finite"),
        (energies_that_are_none, "orthogonal"),
        (rotated_on_one_side, "another matrix"),
        (not_orthogonal, "not orthogonal"),
        (a_row_twice, "not orthogonal"),
        (swapped_vectors, "another matrix"),
        (one_sign, "another matrix"),
        (larger, "another matrix|not add up"),
        (of_another_matrix, "another matrix"),
        (a_value_without_its_vectors, "not orthogonal"),
        (vectors_without_their_value, "not orthogonal"),
        (all_zero, "orthogonal"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_mutant_is_refused_and_the_broken_fact_told(change: Callable[..., Parts], told: str) -> None:
    assert re.search(told, problem_of(delta_of(30, 40, "clustered"), 4, change))


def test_energies_that_exceed_the_whole_are_refused() -> None:
    """Parseval: nothing else would tell that ‖ΔW‖_F² itself is of another tensor."""
    op = Dense(delta_of(20, 30, "power").unsqueeze(0), torch.float32)
    found, *_ = exact(op, 4)
    psi = gaussian(["w"], "check", CHECK_ROWS, 20, CPU)
    norm_sq = float(energies_of(op.dense()[0]).sum())
    for wrong in (0.3 * norm_sq, 100 * norm_sq):
        [told] = checks.problems(found, [wrong], psi, op.to_long(psi, precise=True))
        assert "energies do not add up" in told


def test_factors_with_more_energy_than_the_whole_are_refused_where_nothing_is_left_to_be_seen() -> None:
    op = Dense(delta_of(20, 30, "rank two").unsqueeze(0), torch.float32)
    found, *_ = exact(op, 2)
    psi = gaussian(["w"], "check", CHECK_ROWS, 20, CPU)
    norm_sq = float(energies_of(op.dense()[0]).sum())
    for share, told in ((1.0, False), (0.999, True)):
        [text] = checks.problems(found, [share * norm_sq], psi, op.to_long(psi, precise=True))
        assert ("energies do not add up" in text) == told


@pytest.mark.parametrize("share", [0.9, 0.999, 1.001])
def test_a_whole_spectrum_must_add_up(share: float) -> None:
    """Leading triplets that are left out are missed there alone: what is left is a right factorisation of its kind."""
    op = Dense(delta_of(20, 30, "power").unsqueeze(0), torch.float32)
    found, *_ = exact(op, 4)
    psi = gaussian(["w"], "check", CHECK_ROWS, 20, CPU)
    norm_sq = float(energies_of(op.dense()[0]).sum())
    for total, told in ((norm_sq, ""), (share * norm_sq, f"energies do not add up: all σ² are {share:.6f} of ‖ΔW‖²")):
        assert checks.problems(found, [norm_sq], psi, op.to_long(psi, precise=True), [total]) == [told]


def test_each_of_a_batch_is_judged_alone() -> None:
    deltas = torch.stack([delta_of(20, 30, "power", seed=seed) for seed in range(3)])
    op = Dense(deltas, torch.float32)
    found, *_ = exact(op, 4)
    found.short[1, 0] *= -1
    psi = gaussian(["a", "b", "c"], "check", CHECK_ROWS, 20, CPU)
    norms_sq = [float(delta.double().square().sum()) for delta in deltas]
    told = checks.problems(found, norms_sq, psi, op.to_long(psi, precise=True))
    assert [bool(text) for text in told] == [False, True, False]


def test_what_random_rows_see_lies_between_its_limits_but_for_the_stated_probability() -> None:
    """χ² of 2h degrees of freedom is below x as often as a Poisson count of mean x/2 reaches h."""
    half = CHECK_ROWS // 2
    low, high = (limit * half for limit in checks._SEEN)
    below = math.fsum(math.exp(-low) * low**k / math.factorial(k) for k in range(half, half + 30))
    above = math.fsum(math.exp(-high) * high**k / math.factorial(k) for k in range(half))
    assert below + above <= 1e-9


@pytest.mark.parametrize("lost", [0.01, 0.1])
def test_a_residual_that_random_rows_do_not_see_is_refused(lost: float) -> None:
    """σ² of the last triplet is told too small: Σσ² and what ψ sees are then less than ‖ΔW‖_F² together."""
    told = problem_of(
        delta_of(30, 40, "rank two"), 2, lambda short, long, energies: (short, long, energies * (1 - lost))
    )
    assert told
