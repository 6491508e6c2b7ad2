"""ΔW from whatever is stored: exact differences, honest norms, and bad entries by name."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank import delta as forming
from phlora_pipeline.lowrank.delta import first_nonfinite, form_delta, scale_, scale_exponent, sum_of_squares, to_host

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def formed(base: Tensor, tuned: Tensor) -> tuple[Tensor, list[float]]:
    out = torch.empty(base.shape)
    return out, form_delta(base, tuned, out).tolist()


def squared(values: Tensor) -> float:
    return float(values.double().square().sum())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("tuned_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_delta_is_formed_in_float32_whatever_is_stored(base_dtype: torch.dtype, tuned_dtype: torch.dtype) -> None:
    """Two neighbours in bfloat16 differ by exactly one ulp; subtracting in bfloat16 would round others."""
    base = normal(33, 65).to(base_dtype)
    tuned = (base.double() * 1.003).to(tuned_dtype)
    out, sums = formed(base, tuned)
    expected = (tuned.double() - base.double()).float()
    assert torch.equal(out, expected)
    assert sums == pytest.approx([squared(base), squared(tuned), squared(expected)], rel=1e-6)


def test_mixed_dtypes_are_subtracted_exactly() -> None:
    base = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    tuned = torch.tensor([[1.0 + 2**-20, 3.0]], dtype=torch.float32)
    assert formed(base, tuned)[0].tolist() == [[2**-20, 0.0]]


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[1.0 + 1e-10]], dtype=torch.float64)),
        (torch.tensor([2**40]), torch.tensor([2**40 + 1])),
        (torch.tensor([2**30], dtype=torch.int32), torch.tensor([2**30 + 1], dtype=torch.int32)),
    ],
)
def test_a_change_that_float32_cannot_hold_is_no_zero(base: Tensor, tuned: Tensor) -> None:
    assert formed(base, tuned)[1][2] > 0


@pytest.mark.parametrize("shape", [(), (7,), (0, 4), (2, 3, 4, 5)])
def test_tensors_of_any_shape_have_norms(shape: tuple[int, ...]) -> None:
    base, tuned = normal(*shape), normal(*shape, seed=1)
    out, sums = formed(base, tuned)
    assert torch.equal(out, tuned - base)
    assert sums == pytest.approx([squared(base), squared(tuned), squared(out)], rel=1e-6)


def test_views_are_what_they_show() -> None:
    base, tuned = normal(40, 30).mT, normal(60, 40, seed=1)[::2]
    assert torch.equal(formed(base, tuned)[0], tuned - base)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_the_rounded_copy_is_that_of_the_float32_difference(low: torch.dtype, stored: torch.dtype) -> None:
    base, tuned = normal(33, 65).to(stored), normal(33, 65, seed=1).to(stored)
    out, rounded = torch.empty(33, 65), torch.empty(33, 65, dtype=low)
    sums = form_delta(base, tuned, out, rounded).tolist()
    assert torch.equal(rounded, out.to(low))
    assert sums == pytest.approx([squared(base), squared(tuned), squared(out), squared(out - rounded)], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_how_it_is_cut_into_pieces_changes_no_entry(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = normal(31, 17).to(dtype), normal(31, 17, seed=1).to(dtype)
    whole, norms = formed(base, tuned)
    monkeypatch.setattr(forming, "CHUNK", 100)
    monkeypatch.setattr(forming, "_CACHED", 90)
    monkeypatch.setattr(forming, "_RUN", 10)
    out, sums = formed(base, tuned)
    assert torch.equal(out, whole)
    assert sums == pytest.approx(norms, rel=1e-6)
    assert float(sum_of_squares(whole)) == pytest.approx(squared(whole), rel=1e-14)


class TestNorms:
    """‖ΔW‖_F² decides E_r: a share of it that rounding has taken would look like a loss, or hide one."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(300, 700), (1100, 1000)])
    def test_of_random_entries(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        base = (0.02 * normal(*shape)).to(dtype)
        tuned = (base.double() + 1e-3 * normal(*shape, seed=1).double()).to(dtype)
        out, sums = formed(base, tuned)
        assert sums == pytest.approx([squared(base), squared(tuned), squared(out)], rel=3e-6)

    @settings(max_examples=20, deadline=None)
    @given(value=st.floats(0.5, 2.0, width=32))
    def test_of_entries_that_are_all_the_same(self, value: float) -> None:
        """Their roundings have one sign and add up, where those of random entries cancel."""
        base = torch.full((512, 512), 3.0)
        out, sums = formed(base, base + value)
        assert sums[2] == pytest.approx(squared(out), rel=5e-6)

    def test_do_not_overflow_where_float32_squares_do(self) -> None:
        assert formed(torch.zeros(1, 4), torch.full((1, 4), 1e30))[1][2] == pytest.approx(4e60, rel=1e-6)

    @pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-19, 1.0, 1e15, 1e30, 3e38])
    def test_in_all_of_float32s_range(self, size: float) -> None:
        tuned = size * torch.rand(300, 300, generator=torch.Generator().manual_seed(0))
        assert formed(torch.zeros(300, 300), tuned)[1][2] == pytest.approx(squared(tuned), rel=3e-6)

    def test_of_a_tiny_part_beside_a_large_one(self) -> None:
        """Pieces are summed each for itself: what one loses to underflow, the whole would not have shown."""
        tuned = torch.cat([torch.full((600, 1000), 1e-25), torch.full((600, 1000), 1e3)])
        assert formed(torch.zeros(1200, 1000), tuned)[1][2] == pytest.approx(squared(tuned), rel=3e-6)


class TestNonfinite:
    @pytest.mark.parametrize("side", ["base", "tuned"])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_a_bad_entry_shows_in_the_norm_and_is_found(self, value: float, dtype: torch.dtype, side: str) -> None:
        sides = {"base": torch.zeros(5, 7, dtype=dtype), "tuned": torch.zeros(5, 7, dtype=dtype)}
        sides[side][2, 3] = sides[side][4, 6] = value
        assert not math.isfinite(formed(**sides)[1][2])
        assert first_nonfinite(**sides) == (2, (2, 3))

    def test_infinities_that_cancel_are_no_number(self) -> None:
        same = torch.tensor([1.0, math.inf])
        assert not math.isfinite(formed(same, same)[1][2])
        assert first_nonfinite(same, same) == (1, (1,))

    def test_a_difference_that_overflows_is_bad_though_both_sides_are_finite(self) -> None:
        base, tuned = torch.full((2, 2), -3e38), torch.full((2, 2), 3e38)
        assert formed(base, tuned)[1] == pytest.approx([4 * 9e76, 4 * 9e76, math.inf], rel=1e-6)
        assert first_nonfinite(base, tuned) == (4, (0, 0))

    def test_the_first_of_many_pieces_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(forming, "CHUNK", 10)
        base, tuned = torch.zeros(3, 4, 5), torch.zeros(3, 4, 5)
        tuned[1, 2, 3] = tuned[2, 0, 0] = math.nan
        assert first_nonfinite(base, tuned) == (2, (1, 2, 3))

    @pytest.mark.parametrize("shape", [(), (3,), (0, 4)])
    def test_nothing_is_found_where_nothing_is(self, shape: tuple[int, ...]) -> None:
        assert first_nonfinite(torch.zeros(shape), torch.ones(shape)) is None

    def test_a_scalar_has_an_empty_index(self) -> None:
        assert first_nonfinite(torch.tensor(0.0), torch.tensor(math.nan)) == (1, ())

    def test_only_what_is_bad_in_the_difference_counts(self) -> None:
        """Float64 entries beyond float32's range, the same on both sides: the difference is zero."""
        base = torch.tensor([[1e300, 0.0]], dtype=torch.float64)
        tuned = torch.tensor([[1e300, math.nan]], dtype=torch.float64)
        assert first_nonfinite(base, tuned) == (1, (0, 1))


class TestScale:
    @settings(max_examples=100, deadline=None)
    @given(norm=st.floats(1e-44, 1e42))
    def test_it_brings_the_norm_near_to_one(self, norm: float) -> None:
        exponent = scale_exponent(norm**2)
        assert 2.0**-21 <= math.ldexp(norm, exponent) <= 2.0**21
        assert exponent == 0 or 0.5 <= math.ldexp(norm, exponent) < 1

    @pytest.mark.parametrize("exponent", [-140, -127, -31, 0, 1, 30, 120])
    def test_it_is_exact_and_can_be_undone(self, exponent: int) -> None:
        values = normal(50).mul_(2.0 ** -(exponent // 2))  # neither under- nor overflows on its way
        scaled = scale_(values.clone(), exponent)
        assert scaled.double().tolist() == [math.ldexp(value, exponent) for value in values.double().tolist()]
        assert torch.equal(scale_(scaled, -exponent), values)

    def test_the_smallest_number_can_be_brought_to_one(self) -> None:
        assert scale_(torch.tensor([2.0**-149]), 149).item() == 1.0


def test_small_tensors_come_to_the_host_as_lists() -> None:
    assert to_host(torch.tensor([[1.0, 2.0]])) == [[1.0, 2.0]]
    assert to_host(torch.tensor(3.0)) == 3.0
