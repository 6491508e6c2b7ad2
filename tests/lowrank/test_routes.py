"""Which way a weight takes: a pure function of sizes and rates, with costs that grow as the work does."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline.lowrank import routes
from phlora_pipeline.lowrank.routes import PROFILES, SOLVERS, Profile, planned, rounds, seconds

SIDES = st.integers(1, 20_000)
RANKS = st.integers(1, 512)
ANY_PROFILE = st.sampled_from(sorted(PROFILES)).map(PROFILES.__getitem__)
ANY_SOLVER = st.sampled_from(SOLVERS)


def takes_krylov(d: int, k: int, rank: int, profile: Profile) -> bool:
    return bool(planned(d, k, rank, "auto", profile)[0])


class TestPlanned:
    @settings(max_examples=100, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, solver=ANY_SOLVER, profile=ANY_PROFILE, growing=st.booleans())
    def test_it_depends_on_nothing_else_and_on_no_orientation(
        self, d: int, k: int, rank: int, solver: Any, profile: Profile, growing: bool
    ) -> None:
        once = planned(d, k, rank, solver, profile, growing=growing)
        assert planned(d, k, rank, solver, profile, growing=growing) == once
        assert planned(k, d, rank, solver, replace(profile, name="another"), growing=growing) == once

    @settings(max_examples=200, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, solver=ANY_SOLVER, profile=ANY_PROFILE, growing=st.booleans())
    def test_no_basis_is_wider_than_half_of_the_matrix_or_too_narrow_for_its_rank(
        self, d: int, k: int, rank: int, solver: Any, profile: Profile, growing: bool
    ) -> None:
        tried, last = planned(d, k, rank, solver, profile, growing=growing)
        m = min(d, k)
        assert last in {"gram", "exact"}
        for step in tried:
            assert step.rank <= step.kept <= step.width <= m // 2
            assert step.block <= step.width
            assert step.rank == min(rank, m) or growing
            assert step.degree >= 1
        for one, two in itertools.pairwise(tried):
            assert two.width == 2 * one.width or (two is tried[-1] and 1.5 * one.width <= two.width < 2 * one.width)
        assert not tried or solver in {"auto", "krylov"}

    @pytest.mark.parametrize("solver", ["gram", "exact"])
    def test_a_named_route_is_taken_whatever_it_costs(self, solver: Any) -> None:
        assert planned(4096, 4096, 16, solver, PROFILES["cpu"]) == ([], solver)

    @pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
    def test_auto_takes_krylov_for_a_large_weight_and_a_small_rank_alone(self, profile: Profile) -> None:
        assert takes_krylov(4096, 4096, 32, profile)
        assert takes_krylov(2048, 8192, 32, profile)
        assert not takes_krylov(4096, 4096, 4096, profile)
        assert not takes_krylov(64, 64, 64, profile)
        assert not takes_krylov(16, 4096, 8, profile)

    @settings(max_examples=100, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE)
    def test_auto_tries_what_krylov_would_where_that_is_cheaper(
        self, d: int, k: int, rank: int, profile: Profile
    ) -> None:
        every, last = planned(d, k, rank, "krylov", profile)
        tried, behind = planned(d, k, rank, "auto", profile)
        assert behind == last
        assert [replace(step, after=math.inf) for step in tried] == every[: len(tried)]
        m, n = min(d, k), max(d, k)
        limit = routes.whole(d, k, rank, profile)[1]
        assert all(routes.krylov_seconds(m, n, step, profile) < limit for step in tried)

    @settings(max_examples=100, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE)
    def test_the_route_behind_is_the_cheaper_of_the_two(self, d: int, k: int, rank: int, profile: Profile) -> None:
        m, n = min(d, k), max(d, k)
        name, cost = routes.whole(d, k, rank, profile)
        both = {"gram": routes.gram_seconds(m, n, min(rank, m), profile), "exact": routes.exact_seconds(m, n, profile)}
        assert cost == both[name]
        assert cost <= min(both.values()) / 0.9


class TestRounds:
    def test_a_threshold_of_energy_starts_small_and_doubles(self) -> None:
        found = rounds(4096, 128, PROFILES["cpu"], growing=True)
        assert [step.rank for step in found[:4]] == [16, 32, 64, 128]
        assert len({step.block for step in found}) == 1

    def test_a_rank_below_the_first_is_enough_at_once(self) -> None:
        assert {step.rank for step in rounds(4096, 5, PROFILES["cpu"], growing=True)} == {5}

    @settings(max_examples=60, deadline=None)
    @given(m=SIDES, rank=RANKS, profile=ANY_PROFILE, growing=st.booleans())
    def test_effort_never_falls(self, m: int, rank: int, profile: Profile, growing: bool) -> None:
        found = rounds(m, min(rank, m), profile, growing=growing)
        for one, two in itertools.pairwise(found):
            assert (two.rank, two.kept, two.degree) >= (one.rank, one.kept, one.degree)
            assert two.kept > one.kept

    def test_the_last_is_half_of_the_matrix_where_that_is_much_wider(self) -> None:
        profile = replace(PROFILES["cpu"], block_per_rank=0.5, steps=9)
        assert [step.width for step in rounds(1024, 64, profile)] == [288, 512]
        assert [step.width for step in rounds(800, 64, profile)] == [288]

    def test_blocks_as_wide_as_the_rank_need_few(self) -> None:
        profile = replace(PROFILES["cpu"], block_per_rank=0.5, steps=9, least_block=16)
        assert [(step.block, step.width) for step in (rounds(4096, rank, profile)[0] for rank in (1, 16, 17, 32))] == [
            (16, 96), (16, 96), (16, 144), (16, 144)
        ]  # fmt: skip

    def test_a_small_matrix_has_narrower_blocks_before_it_has_none(self) -> None:
        profile = replace(PROFILES["cpu"], block_per_rank=0.5, steps=9, least_block=16)
        found = {m: rounds(m, 4, profile)[:1] for m in (80, 100, 191, 192)}
        assert [(m, *((step.block, step.width) for step in steps)) for m, steps in found.items()] == [
            (80,), (100, (8, 48)), (191, (8, 48)), (192, (16, 96))
        ]  # fmt: skip

    def test_the_dearer_a_further_one_is_the_nearer_the_one_before_must_have_come(self) -> None:
        """Of a matrix that nearly is certified another basis is worth half of a whole decomposition."""
        tried, _ = planned(1024, 1024, 32, "auto", PROFILES["cpu-bf16"])
        limit = routes.whole(1024, 1024, 32, PROFILES["cpu-bf16"])[1]
        shares = [routes.krylov_seconds(1024, 1024, step, PROFILES["cpu-bf16"]) / limit for step in tried]
        assert len(tried) >= 2
        assert tried[0].after == math.inf
        for step, share in zip(tried[1:], shares[1:], strict=True):
            assert share > 0.1
            assert step.after == pytest.approx(6 / share)
        assert {step.after for step in planned(1024, 1024, 32, "krylov", PROFILES["cpu-bf16"])[0]} == {math.inf}
        growing, _ = planned(4096, 4096, 256, "auto", PROFILES["cpu-bf16"], growing=True)
        assert {step.after for step in growing} == {math.inf}

    def test_a_matrix_that_is_too_small_has_none(self) -> None:
        assert rounds(1, 1, PROFILES["cpu"]) == []


class TestCosts:
    @settings(max_examples=100, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE, solver=st.sampled_from(["gram", "exact"]))
    def test_a_larger_matrix_takes_longer(self, d: int, k: int, rank: int, profile: Profile, solver: Any) -> None:
        cost = seconds(d, k, rank, solver, profile)
        assert cost > 0
        assert seconds(d + 100, k, rank, solver, profile) > cost
        assert seconds(d, k + 100, rank, solver, profile) > cost
        assert routes.flops(d + 1, k, rank, solver, profile) > routes.flops(d, k, rank, solver, profile) > 0

    @settings(max_examples=60, deadline=None)
    @given(m=st.integers(1, 8192), n=st.integers(1, 8192), rank=RANKS, profile=ANY_PROFILE)
    def test_a_wider_basis_and_a_larger_matrix_take_krylov_longer(
        self, m: int, n: int, rank: int, profile: Profile
    ) -> None:
        found = [routes.krylov_seconds(m, n, step, profile) for step in rounds(20_000, rank, profile)]
        assert found == sorted(found)
        larger = [routes.krylov_seconds(m + 64, n + 64, step, profile) for step in rounds(20_000, rank, profile)]
        assert all(one < two for one, two in zip(found, larger, strict=True))

    @settings(max_examples=60, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE, factor=st.floats(1.5, 100))
    def test_a_device_that_is_faster_in_everything_is_faster(
        self, d: int, k: int, rank: int, profile: Profile, factor: float
    ) -> None:
        rates = ("low_rate", "float32_rate", "float64_rate", "eigh_rate", "svd_rate", "stream_rate")
        less = {name: getattr(profile, name) / factor for name in ("call", "row")}
        fast = replace(profile, **less, **{name: getattr(profile, name) * factor for name in rates})
        assert seconds(d, k, rank, "auto", fast) < seconds(d, k, rank, "auto", profile)
        once, again = (planned(d, k, rank, "auto", each) for each in (fast, profile))
        assert [replace(step, after=0) for step in once[0]] == [replace(step, after=0) for step in again[0]]
        assert [step.after for step in once[0]] == pytest.approx([step.after for step in again[0]])
        assert once[1] == again[1]

    @pytest.mark.parametrize(
        ("d", "k", "rank", "route"),
        [
            (576, 576, 16, "exact"), (1024, 1024, 32, "exact"), (512, 4096, 64, "exact"), (2048, 2048, 32, "krylov"),
            (2048, 8192, 128, "gram"), (4096, 4096, 16, "krylov"), (4096, 14336, 128, "krylov"), (4096, 4096, 512, "gram"),
        ],
    )  # fmt: skip
    def test_an_h100_takes_what_was_fastest_there(self, d: int, k: int, rank: int, route: str) -> None:
        tried, last = planned(d, k, rank, "auto", PROFILES["sm90"])
        assert ("krylov" if tried else last) == route

    def test_the_svds_are_those_of_the_textbook(self) -> None:
        assert routes.exact_flops(100, 50) == routes.exact_flops(50, 100) == 6 * 100 * 50**2 + 20 * 50**3
        assert routes.exact_flops(200, 200) == pytest.approx(8 * routes.exact_flops(100, 100))

    @settings(max_examples=60, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE, solver=ANY_SOLVER)
    def test_auto_is_planned_no_slower_than_any_route_by_name(
        self, d: int, k: int, rank: int, profile: Profile, solver: Any
    ) -> None:
        assert seconds(d, k, rank, "auto", profile) <= seconds(d, k, rank, solver, profile) / 0.79


class TestMemory:
    def test_the_svd_needs_several_copies_where_the_matrix_is_square(self) -> None:
        square = routes.worker_bytes(1000, 1000, 8, "exact", PROFILES["cpu"])
        assert square >= 7 * 4 * 1000 * 1000
        assert routes.worker_bytes(1000, 10, 8, "exact", PROFILES["cpu"]) < 4 * 4 * 1000 * 10

    @settings(max_examples=60, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE, solver=st.sampled_from(["gram", "exact"]))
    def test_it_does_not_depend_on_orientation(self, d: int, k: int, rank: int, profile: Profile, solver: Any) -> None:
        assert routes.worker_bytes(d, k, rank, solver, profile) == routes.worker_bytes(k, d, rank, solver, profile) >= 0

    @settings(max_examples=60, deadline=None)
    @given(d=SIDES, k=SIDES, rank=RANKS, profile=ANY_PROFILE, solver=ANY_SOLVER)
    def test_a_gpu_needs_less_than_a_processor_and_least_for_slices(
        self, d: int, k: int, rank: int, profile: Profile, solver: Any
    ) -> None:
        here = routes.device_bytes(d, k, rank, solver, profile)
        assert here >= 4 * d * k
        assert here <= routes.worker_bytes(d, k, rank, solver, profile) or routes.is_blocked(d, k, "cpu")
        slices = routes.device_bytes(d, k, rank, solver, profile, sliced=True)
        assert slices == routes.device_bytes(k, d, rank, solver, profile, sliced=True)

    def test_slices_take_next_to_nothing_of_a_gpu_but_for_the_full_svd(self) -> None:
        whole, slices = (
            routes.device_bytes(128_256, 8192, 32, "auto", PROFILES["sm80"], sliced=sliced) for sliced in (False, True)
        )
        assert 6 * 128_256 * 8192 < whole < 8 * 128_256 * 8192
        assert slices < whole / 2
        assert routes.device_bytes(128_256, 8192, 32, "exact", PROFILES["sm80"], sliced=True) > whole

    def test_a_processor_forms_only_what_is_huge_slice_by_slice(self) -> None:
        assert routes.is_blocked(128_000, 8192, "cpu")
        assert not routes.is_blocked(4096, 11008, "cpu")
        assert not routes.is_blocked(128_000, 8192, "cuda")


class TestProfile:
    @pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
    @pytest.mark.parametrize(
        "name",
        ["low_rate", "float32_rate", "float64_rate", "eigh_rate", "svd_rate", "stream_rate", "call", "block_per_rank"],
    )
    def test_a_rate_that_is_none_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ValueError, match="positive numbers"):
            replace(PROFILES["cpu"], **{name: value})

    def test_a_basis_has_two_blocks_or_more(self) -> None:
        with pytest.raises(ValueError, match="2 blocks or more"):
            replace(PROFILES["cpu"], steps=1)

    def test_committed_ones_are_under_their_names(self) -> None:
        assert all(profile.name == name for name, profile in PROFILES.items())
        assert {"cpu", "cpu-bf16", "sm80", "sm90", "other"} <= set(PROFILES)
