"""Rank policies are theorems about singular values: the budget's against exact dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline import ranks
from phlora_pipeline.ranks import Budget, Policy, Spectrum

SIGMAS = st.lists(st.floats(0.01, 100), min_size=1, max_size=4).map(lambda values: tuple(sorted(values, reverse=True)))


@st.composite
def spectra(draw: st.DrawFn, *, least: bool = False) -> dict[str, Spectrum]:
    made = {}
    for index in range(draw(st.integers(1, 4))):
        sigma = draw(SIGMAS)
        total = sum(value * value for value in sigma) * draw(st.floats(1, 2))
        made[f"t{index}"] = Spectrum(sigma, total, draw(st.integers(1, 9)), least=int(least and draw(st.booleans())))
    return made


def cost(some: Mapping[str, Spectrum], assigned: Mapping[str, int]) -> int:
    return sum(some[name].unit * rank for name, rank in assigned.items())


def most_energy(some: Mapping[str, Spectrum], room: int) -> float:
    """By dynamic programming over tensors and room: every assignment is looked at."""
    listed = list(some.values())

    @cache
    def best(index: int, left: int) -> float:
        if index == len(listed):
            return 0.0
        one, kept, found = listed[index], 0.0, float("-inf")
        for rank in range(one.most + 1):
            kept += one.singular_values[rank - 1] ** 2 if rank else 0.0
            if rank >= one.least and rank * one.unit <= left:
                found = max(found, kept + best(index + 1, left - rank * one.unit))
        return found

    return best(0, room)


@given(some=spectra(), room=st.integers(0, 80))
@settings(max_examples=300, deadline=None)
def test_the_greedy_spread_is_optimal_or_short_by_less_than_one_item(some: dict[str, Spectrum], room: int) -> None:
    found = ranks.spread(some, lambda assigned: cost(some, assigned) <= room)
    assert found is not None
    assert cost(some, found) <= room
    kept, best = ranks.energy(some, found), most_energy(some, room)
    largest = max((one.singular_values[0] ** 2 for one in some.values()), default=0.0)
    assert kept <= best * (1 + 1e-12)
    assert kept > best - largest
    everything = all(found[name] == one.most for name, one in some.items())
    if everything:
        assert kept == pytest.approx(best)


@given(some=spectra(), share=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_where_it_stops_exactly_no_assignment_keeps_more(some: dict[str, Spectrum], share: float) -> None:
    items = sorted((-value * value / one.unit, name) for name, one in some.items() for value in one.singular_values)
    taken = items[: round(share * len(items))]
    exact = sum(some[name].unit for _, name in taken)
    found = ranks.spread(some, lambda assigned: cost(some, assigned) <= exact)
    assert found is not None
    assert ranks.energy(some, found) == pytest.approx(most_energy(some, exact))


@given(some=spectra(least=True), room=st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_a_budget_never_keeps_less_than_an_even_rank_of_its_size(some: dict[str, Spectrum], room: int) -> None:
    def fits(assigned: Mapping[str, int]) -> bool:
        return cost(some, assigned) <= room

    found, even = ranks.within(some, [1, 2, 3, 4], fits), ranks.largest_even(some, [1, 2, 3, 4], fits)
    if found is None:
        assert sum(one.unit * one.least for one in some.values()) > room
        return
    assert fits(found)
    assert all(one.least <= found[name] <= one.most for name, one in some.items())
    assert even is None or ranks.energy(some, found) >= ranks.energy(some, even)


@given(some=spectra(), steps=st.sets(st.integers(1, 4), min_size=1).map(sorted), room=st.integers(0, 80))
def test_an_even_rank_is_the_largest_step_that_fits(some: dict[str, Spectrum], steps: list[int], room: int) -> None:
    def fits(assigned: Mapping[str, int]) -> bool:
        return cost(some, assigned) <= room

    clipped = [{name: min(step, one.most) for name, one in some.items()} for step in steps]
    assert ranks.largest_even(some, steps, fits) == next(filter(fits, reversed(clipped)), None)


@given(sigma=SIGMAS, slack=st.floats(1, 2), share=st.floats(0.01, 1))
def test_a_threshold_takes_the_smallest_rank_that_reaches_it(
    sigma: tuple[float, ...], slack: float, share: float
) -> None:
    one = Spectrum(sigma, sum(value * value for value in sigma) * slack, 1)
    kept = [ranks.energy({"t": one}, {"t": rank}) / one.delta_sq for rank in range(one.most + 1)]
    rank = ranks.by_energy(one, share)
    assert kept[rank] >= share - 1e-12 or rank == one.most
    assert kept[rank - 1] < share + 1e-12


@given(sigma=SIGMAS, edge=st.floats(0, 120))
def test_what_stands_above_the_noise_is_kept(sigma: tuple[float, ...], edge: float) -> None:
    rank = ranks.above_noise(Spectrum(sigma, 1.0, 1, edge))
    assert all(value > edge for value in sigma[:rank])
    assert all(value <= edge for value in sigma[rank:])


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("200MB", Budget(200_000_000, "bytes")),
        ("64MiB", Budget(64 << 20, "bytes")),
        (" 1.5 gb ", Budget(1_500_000_000, "bytes")),
        ("4096B", Budget(4096, "bytes")),
        ("12M-params", Budget(12_000_000, "parameters")),
        ("500-params", Budget(500, "parameters")),
    ],
)
def test_budgets_are_read_as_they_are_written(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text", ["", "200", "MB", "-5MB", "0MB", "0.2B", "5 apples", "1e3MB", "nanMB", "5M", "5-paramsMB"]
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as 200MB .* 12M-params"):
        Budget.parse(text)


def test_policies_have_one_name_each() -> None:
    some = [Policy(), Policy(energy=0.9), Policy(noise=True), Policy(budget=Budget(1, "bytes"))]
    assert [(policy.name, policy.chooses) for policy in some] == [
        ("fixed", False), ("energy", True), ("auto", True), ("budget", True),
    ]  # fmt: skip
