"""The numerics, as theorems: Eckart–Young, chosen spectra, projectors instead of vectors."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline import lowrank
from tests.toys import with_spectrum

SHAPES = [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1), (1, 1)]
SPECTRA = {
    "power": lambda n: torch.arange(1, n + 1, dtype=torch.float64) ** -0.6,
    "flat": lambda n: torch.ones(n, dtype=torch.float64),
    "rank two": lambda n: torch.tensor([3.0, 2.0, *[0.0] * n], dtype=torch.float64)[:n],
    "tiny": lambda n: 1e-18 * torch.arange(n, 0, -1, dtype=torch.float64),
    "huge": lambda n: 1e15 * torch.arange(n, 0, -1, dtype=torch.float64),
}


def delta_of(d: int, k: int, spectrum: str) -> tuple[Tensor, Tensor]:
    sigma = SPECTRA[spectrum](min(d, k))
    return with_spectrum(d, k, sigma).float().unsqueeze(0), sigma


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize(("d", "k"), SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 50])
def test_no_rank_r_matrix_is_closer(d: int, k: int, rank: int, spectrum: str) -> None:
    """Eckart–Young: ‖ΔW − BA‖_F² = Σ_{i>r} σ_i², with σ from an independent float64 decomposition."""
    delta, _ = delta_of(d, k, spectrum)
    sigma = torch.linalg.svdvals(delta[0].double())
    total = float(sigma.square().sum())
    factors = lowrank.factorise(delta.clone(), rank, lowrank.exact)
    assert factors.A.shape == (1, min(rank, d, k), k)
    assert factors.B.shape == (1, d, min(rank, d, k))
    tail = float(sigma[rank:].square().sum())
    left = float((delta[0].double() - factors.B[0].double() @ factors.A[0].double()).square().sum())
    assert left == pytest.approx(tail, rel=1e-5, abs=1e-11 * total)
    assert float(factors.residual_sq[0]) == pytest.approx(left, rel=1e-5, abs=1e-11 * total)


@pytest.mark.parametrize("spectrum", ["power", "flat", "tiny", "huge"])
def test_factors_share_the_singular_values_equally(spectrum: str) -> None:
    """Eq. 4: BᵀB = AAᵀ = Σ_r, so neither factor is larger than the other."""
    delta, sigma = delta_of(30, 20, spectrum)
    factors = lowrank.factorise(delta, 5, lowrank.exact)
    wanted = torch.diag(sigma[:5]).float()
    torch.testing.assert_close(factors.B[0].mT @ factors.B[0], wanted, rtol=1e-4, atol=1e-5 * float(sigma[0]))
    torch.testing.assert_close(factors.A[0] @ factors.A[0].mT, wanted, rtol=1e-4, atol=1e-5 * float(sigma[0]))


def test_the_subspace_is_the_true_one() -> None:
    """Vectors have free signs and rotations; the projector has not."""
    sigma = torch.tensor([5.0, 4.0, 3.0, 0.5, 0.4], dtype=torch.float64)
    exact = with_spectrum(30, 20, sigma)
    svd = lowrank.exact(exact.float().unsqueeze(0), 3)
    U = torch.linalg.svd(exact)[0][:, :3]
    torch.testing.assert_close(svd.U[0].double() @ svd.U[0].double().mT, U @ U.mT, atol=1e-5, rtol=0)


def test_factors_of_a_smaller_rank_are_slices() -> None:
    delta, _ = delta_of(30, 20, "power")
    large, small = (lowrank.factorise(delta.clone(), rank, lowrank.exact) for rank in (8, 3))
    assert torch.equal(large.A[:, :3], small.A)
    assert torch.equal(large.B[:, :, :3], small.B)


def test_batch_size_changes_no_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(5, 24, 16, generator=generator)
    together = lowrank.factorise(delta.clone(), 4, lowrank.exact)
    for index in range(5):
        alone = lowrank.factorise(delta[index : index + 1].clone(), 4, lowrank.exact)
        assert torch.equal(alone.A[0], together.A[index])
        assert torch.equal(alone.B[0], together.B[index])


def test_the_largest_entry_of_each_left_vector_is_positive() -> None:
    generator = torch.Generator().manual_seed(3)
    delta = torch.randn(4, 24, 16, generator=generator)
    for sign in (1.0, -1.0):
        U = lowrank.exact(sign * delta, 6).U
        largest = U.gather(1, U.abs().argmax(dim=1, keepdim=True))
        assert (largest > 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_delta_is_formed_in_float32_whatever_is_stored(dtype: torch.dtype) -> None:
    """Two neighbours in bfloat16 differ by exactly one ulp; subtracting in bfloat16 would round others."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(33, 65, generator=generator).to(dtype)
    tuned = (base.double() * 1.003).to(dtype)
    out = torch.empty(33, 65)
    base_sq, tuned_sq, delta_sq = lowrank.form_delta(base, tuned, out).tolist()
    expected = (tuned.double() - base.double()).float()
    assert torch.equal(out, expected)
    for found, values in ((base_sq, base), (tuned_sq, tuned), (delta_sq, expected)):
        assert found == pytest.approx(float(values.double().square().sum()), rel=1e-12)


def test_mixed_dtypes_are_subtracted_exactly() -> None:
    base = torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16)
    tuned = torch.tensor([[1.0 + 2**-20, 3.0]], dtype=torch.float32)
    out = torch.empty(1, 2)
    lowrank.form_delta(base, tuned, out)
    assert out.tolist() == [[2**-20, 0.0]]


@pytest.mark.parametrize(
    ("base", "tuned"),
    [
        (torch.tensor([[1.0]], dtype=torch.float64), torch.tensor([[1.0 + 1e-10]], dtype=torch.float64)),
        (torch.tensor([2**40]), torch.tensor([2**40 + 1])),
    ],
)
def test_a_change_that_float32_cannot_hold_is_no_zero(base: Tensor, tuned: Tensor) -> None:
    out = torch.empty(base.shape)
    assert lowrank.form_delta(base, tuned, out)[2].item() > 0


def test_norms_do_not_overflow_where_float32_squares_do() -> None:
    out = torch.empty(1, 4)
    sums = lowrank.form_delta(torch.zeros(1, 4), torch.full((1, 4), 1e30), out)
    assert sums[2].item() == pytest.approx(4e60, rel=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_bad_entry_shows_in_the_norm_and_is_found(value: float) -> None:
    tuned = torch.zeros(5, 7)
    tuned[2, 3] = tuned[4, 6] = value
    out = torch.empty(5, 7)
    assert not math.isfinite(lowrank.form_delta(torch.zeros(5, 7), tuned, out)[2].item())
    assert lowrank.first_nonfinite(out) == (2, (2, 3))
    assert lowrank.first_nonfinite(torch.zeros(3)) is None


def test_sums_over_several_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "_CHUNK", 100)
    base, tuned = torch.randn(31, 17), torch.randn(31, 17)
    out = torch.empty(31, 17)
    sums = lowrank.form_delta(base, tuned, out)
    assert torch.equal(out, tuned - base)
    assert sums[2].item() == pytest.approx(float((tuned - base).double().square().sum()), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    sigma=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True)),
    rank=st.integers(1, 12),
)
def test_preserved_energy_is_the_papers_ratio_and_never_falls(sigma: list[float], rank: int) -> None:
    total = sum(value**2 for value in sigma)
    energy = lowrank.preserved_energy(sigma, total, min(rank, len(sigma)))
    assert energy == pytest.approx(sum(value**2 for value in sigma[:rank]) / total)
    previous = lowrank.preserved_energy(sigma, total, max(1, min(rank, len(sigma)) - 1))
    assert energy is not None
    assert previous is not None
    assert energy >= previous - 1e-15


def test_preserved_energy_is_not_known_for_nothing_and_beyond_what_was_computed() -> None:
    assert lowrank.preserved_energy([], 0.0, 1) is None
    assert lowrank.preserved_energy([1.0, 0.5], 2.0, 3) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounding_error_equals_the_product_formed_in_full(dtype: torch.dtype) -> None:
    delta, _ = delta_of(40, 30, "power")
    factors = lowrank.factorise(delta, 6, lowrank.exact)
    A, B = factors.A[0], factors.B[0]
    A_written, B_written = A.to(dtype), B.to(dtype)
    direct = float((B_written.double() @ A_written.double() - B.double() @ A.double()).square().sum())
    found = lowrank.rounding_error_sq(A, B, A_written, B_written)
    assert found == pytest.approx(direct, rel=1e-6, abs=1e-14)
    assert (found > 1e-9) == (dtype != torch.float32)


def test_work_and_memory_grow_as_the_algorithm_does() -> None:
    assert lowrank.exact_flops(100, 50) == lowrank.exact_flops(50, 100)
    assert lowrank.exact_flops(200, 200) == pytest.approx(8 * lowrank.exact_flops(100, 100))
    assert lowrank.exact_bytes(1000, 10) < 3 * 4 * 1000 * 10
