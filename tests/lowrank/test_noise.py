"""The noise of rounding: as much as there is, and an edge that finds an update's rank and nothing in rounding alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from jobs.noise import RANKS, SHAPES, SIZES, gaussian, of_rank, rank_of_rounding, update, weight
from phlora_pipeline.lowrank import below_precision, noise, rounding_noise
from phlora_pipeline.lowrank.noise import Noise, threshold

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
ROUNDINGS = [(F32, BF16), (F32, F16), (BF16, F16), (BF16, F32)]


def noise_of(base: Tensor, tuned: Tensor, *stored: torch.dtype) -> Noise:
    [found] = rounding_noise([(base, tuned)], [(stored[0], stored[1]) if stored else (base.dtype, tuned.dtype)])
    return found


def rounded(d: int, k: int, *, rows: float = 0, columns: float = 0) -> tuple[Tensor, Tensor]:
    """A weight and its rounding to bfloat16; rows and columns of sizes that differ by these powers of e."""
    sizes = torch.exp(rows * gaussian(d, 1, seed=7)) * torch.exp(columns * gaussian(1, k, seed=8))
    return weight(d, k) * sizes, (weight(d, k) * sizes).bfloat16()


def squared(values: Tensor) -> float:
    return float(values.double().square().sum())


def largest(base: Tensor, tuned: Tensor) -> float:
    return float(torch.linalg.matrix_norm(tuned.double() - base.double(), 2))


class TestRank:
    @pytest.mark.parametrize("dtype", [BF16, F16])
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("rank", RANKS)
    @pytest.mark.parametrize("shape", [SHAPES[0], pytest.param(SHAPES[1], marks=pytest.mark.slow)])
    def test_above_the_edge_it_is_as_good_as_the_best_or_the_update_is_below_precision(
        self, shape: tuple[int, int], rank: int, size: float, dtype: torch.dtype
    ) -> None:
        found = of_rank(*shape, rank, size, dtype)
        assert below_precision(found.noise.changed) == (dtype is BF16 and size == 1e-5)
        if below_precision(found.noise.changed):
            assert found.ratio < min(1.12, 1 / found.lost)  # what is above is worth more than nothing, even so
        else:
            assert found.rank == rank
            assert found.ratio <= 1.05

    @pytest.mark.parametrize(("before", "after"), ROUNDINGS)
    def test_of_a_weight_that_was_only_rounded_it_is_zero(self, before: torch.dtype, after: torch.dtype) -> None:
        assert not any(rank_of_rounding(96, 160, before, after, seed=seed) for seed in range(10))

    @pytest.mark.slow
    @pytest.mark.parametrize(("before", "after"), ROUNDINGS)
    def test_of_a_hundred_of_them(self, before: torch.dtype, after: torch.dtype) -> None:
        assert sum(not rank_of_rounding(*SHAPES[0], before, after, seed=seed) for seed in range(100)) >= 99

    @pytest.mark.parametrize("after", [F32, F16])
    @pytest.mark.parametrize("rank", [0, 4])
    def test_that_the_base_was_rounded_and_the_tuner_had_more_is_seen(self, rank: int, after: torch.dtype) -> None:
        """Its rounding is in ΔW where the same update from the stored base would have left none."""
        U = update(200, 300, 4, 1e-4 if rank else 0.0)
        elsewhere = noise_of(weight(200, 300).bfloat16(), (weight(200, 300) + U).to(after))
        assert elsewhere.total_sq == pytest.approx(squared(weight(200, 300) - weight(200, 300).bfloat16()), rel=0.05)
        here = noise_of(weight(200, 300).bfloat16(), (weight(200, 300).bfloat16() + U).to(after))
        assert here.total_sq < 0.1 * elsewhere.total_sq


class TestAmount:
    @pytest.mark.parametrize("size", [1e-3, 1e-4])
    @pytest.mark.parametrize("dtype", [BF16, F16])
    def test_it_is_what_rounding_has_done(self, dtype: torch.dtype, size: float) -> None:
        found = of_rank(256, 384, 16, size, dtype)
        assert found.noise.total_sq == pytest.approx(found.noise_sq, rel=0.05)

    def test_of_a_weight_from_a_finer_base_every_entry_is_rounded(self) -> None:
        base, tuned = rounded(256, 384)
        assert noise_of(base, tuned).total_sq == pytest.approx(squared(tuned - base), rel=0.02)

    @pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2])
    @pytest.mark.parametrize("scale", [None, 2.0**-6, 0.013, 0.011])
    def test_of_eight_bits_with_and_without_a_scale(self, scale: float | None, stored: torch.dtype) -> None:
        base = gaussian(256, 384, seed=1) * (scale or 1.0)
        codes = (base / (scale or 1.0)).to(stored)
        tuned = codes if scale is None else codes.float() * scale
        found, truth = noise_of(base, tuned, F32, stored), squared(tuned.float() - base)
        assert 0.95 * truth < found.total_sq < 1.45 * truth
        assert found.edge > largest(base, tuned)

    def test_rows_that_have_not_moved_have_none(self) -> None:
        """Of an embedding a few rows change: those are not masked, and the others are not rounded."""
        base = weight(400, 64).bfloat16()
        tuned, moved = base.clone(), slice(100, 120)
        tuned[moved] = (base[moved].float() + update(20, 64, 2, 1e-3)).bfloat16()
        found, alone = noise_of(base, tuned), noise_of(base[moved], tuned[moved])
        assert found.total_sq == pytest.approx(alone.total_sq, rel=1e-6)
        assert found.changed == pytest.approx(alone.changed)
        assert not below_precision(found.changed)

    @pytest.mark.parametrize(
        ("shape", "seed"), [((7,), 1), ((2, 3, 4, 50), 2), ((300, 1), 3), ((1, 300), 4), ((1, 1), 5)]
    )
    def test_tensors_of_any_shape_have_some(self, shape: tuple[int, ...], seed: int) -> None:
        base = gaussian(*shape, seed=seed)
        found = noise_of(base, base.bfloat16())
        assert 0.1 < found.total_sq / squared(base - base.bfloat16()) < 10
        assert (found.edge > 0) == (len(shape) == 2)

    @pytest.mark.parametrize("tuned", [torch.zeros(0, 4), torch.ones(3, 4), torch.ones(3, 4, dtype=torch.int64)])
    def test_there_is_none_where_nothing_is_or_nothing_differs(self, tuned: Tensor) -> None:
        assert noise_of(tuned.clone(), tuned) == Noise()

    def test_whole_numbers_are_not_rounded(self) -> None:
        found = noise_of(torch.zeros(3, 4, dtype=torch.int64), torch.ones(3, 4, dtype=torch.int64))
        assert found.total_sq == pytest.approx(0, abs=1e-20)
        assert found.changed == 1

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("dtype", [BF16, F16, F32, F64])
    def test_bad_entries_are_no_error_here(self, dtype: torch.dtype, bad: float) -> None:
        noise_of(torch.zeros(5, 6, dtype=dtype), torch.full((5, 6), bad, dtype=dtype))

    def test_views_are_what_they_show(self) -> None:
        base, tuned = rounded(300, 200)
        assert noise_of(base.mT, tuned.mT) == noise_of(base.mT.contiguous(), tuned.mT.contiguous())


class TestEdge:
    @pytest.mark.parametrize(("d", "k"), [(256, 384), (384, 256), (64, 900)])
    @pytest.mark.parametrize("spread", [(0, 0), (0.4, 0), (0, 0.4), (0.3, 0.3)])
    def test_it_is_just_above_what_rounding_alone_has(self, spread: tuple[float, float], d: int, k: int) -> None:
        """Of white noise the threshold is 1.0 to 1.16 times its largest singular value."""
        base, tuned = rounded(d, k, rows=spread[0], columns=spread[1])
        assert 0.75 < largest(base, tuned) / noise_of(base, tuned).edge < 1

    def test_one_row_that_is_much_larger_is_noise_of_its_own(self) -> None:
        base = weight(300, 400)
        base[5] *= 100
        assert 0.7 < largest(base, base.bfloat16()) / noise_of(base, base.bfloat16()).edge < 1

    @pytest.mark.parametrize("spread", [(0, 0), (0.3, 0.3)])
    @pytest.mark.parametrize(("d", "k"), [(1200, 700), (300, 2000)])
    def test_a_sample_says_the_same(
        self, d: int, k: int, spread: tuple[float, float], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pair = rounded(d, k, rows=spread[0], columns=spread[1])
        sampled = noise_of(*pair)
        monkeypatch.setattr(noise, "_SAMPLE", 1 << 30)
        whole = noise_of(*pair)
        assert sampled != whole
        assert sampled.total_sq == pytest.approx(whole.total_sq, rel=0.05)
        assert sampled.edge == pytest.approx(whole.edge, rel=0.08)

    @pytest.mark.parametrize("beta", [0.01, 0.3, 1.0])
    @pytest.mark.parametrize("kept", [0.05, 0.5, 1.0])
    def test_at_the_threshold_a_triplet_is_worth_as_much_as_nothing(self, kept: float, beta: float) -> None:
        """From what is known of one direction x in white noise of unit variance over n: where it goes, and how far it turns."""
        y = threshold(1.0, beta, kept)
        linear = y * y - 1 - beta
        x_sq = (linear + math.sqrt(linear**2 - 4 * beta)) / 2
        cosines = (x_sq**2 - beta) / (x_sq * math.sqrt((x_sq + beta) * (x_sq + 1)))
        assert y == pytest.approx(2 * math.sqrt(x_sq) / kept * cosines, rel=1e-9)
        assert y >= 1 + math.sqrt(beta)

    def test_it_is_gavish_and_donohos(self) -> None:
        assert [round(threshold(1.0, beta), 4) for beta in (1.0, 0.5, 0.05)] == [2.3094, 1.9786, 1.5066]
