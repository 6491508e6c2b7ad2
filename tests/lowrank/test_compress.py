"""The SVD of B·A from its factors is that of the product: Eckart–Young, nested, whatever the factors' rank and size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phlora_pipeline import lowrank
from phlora_pipeline.lowrank import Compact, compact
from tests import toys

SHAPES = [(40, 30, 8), (30, 40, 8), (64, 64, 64), (5, 50, 8), (50, 5, 8), (6, 7, 20), (3, 4, 1)]


def factors(
    d: int, k: int, r: int, *, batch: int = 3, seed: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(batch, r, k, generator=generator), torch.randn(batch, d, r, generator=generator)
    return A.to(dtype), B.to(dtype)


def product(found: Compact, rank: int) -> Tensor:
    return found.B[..., :rank].double() @ found.A[:, :rank].double()


@pytest.mark.parametrize(("d", "k", "r"), SHAPES)
@pytest.mark.parametrize("scale", [1.0, 0.37, -2.5])
def test_every_rank_is_the_truncated_svd_of_the_product(scale: float, d: int, k: int, r: int) -> None:
    A, B = factors(d, k, r)
    whole = scale * B.double() @ A.double()
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    found = compact(A, B, scale)
    q = min(d, k, r)
    assert (found.A.shape, found.B.shape) == ((3, q, k), (3, d, q))
    assert torch.allclose(found.singular_values, S[:, :q], rtol=1e-5, atol=1e-6 * float(S.max()))
    for rank in range(1, q + 1):
        best = (U[..., :rank] * S[:, None, :rank]) @ Vh[:, :rank]
        limit, own = (whole - best).norm(dim=(1, 2)), (whole - product(found, rank)).norm(dim=(1, 2))
        assert (own <= limit + 1e-5 * whole.norm(dim=(1, 2))).all()


def test_the_energies_are_those_of_the_product() -> None:
    A, B = factors(40, 30, 8)
    found = compact(A, B, 1.5)
    wanted = (1.5 * B.double() @ A.double()).square().sum(dim=(1, 2))
    assert torch.allclose(found.singular_values.square().sum(dim=1), wanted, rtol=1e-6)


def test_the_leading_subspaces_are_the_products() -> None:
    """Projectors, not vectors: where σ repeats, the vectors are free."""
    sigma = torch.tensor([5.0, 5.0, 3.0, 1.0, 0.1])
    whole = toys.with_spectrum(24, 18, sigma, seed=3)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    mix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    B, A = (U[:, :5] * S[:5]) @ mix, torch.linalg.solve(mix, Vh[:5])
    found = compact(A[None], B[None])
    for rank in (2, 3, 4):
        left = found.B[0, :, :rank].double() / found.singular_values[0, :rank].sqrt()
        assert torch.allclose(left @ left.mT, U[:, :rank] @ U[:, :rank].mT, atol=1e-5)
        right = found.A[0, :rank].double() / found.singular_values[0, :rank, None].sqrt()
        assert torch.allclose(right.mT @ right, Vh[:rank].mT @ Vh[:rank], atol=1e-5)


def test_both_factors_have_the_roots_of_the_singular_values() -> None:
    found = compact(*factors(40, 30, 8))
    for gram in (found.A @ found.A.mT, found.B.mT @ found.B):
        assert torch.allclose(gram.double(), torch.diag_embed(found.singular_values), atol=1e-4 * float(gram.max()))


def test_rank_deficient_and_zero_factors() -> None:
    A, B = factors(20, 16, 6, batch=4)
    B[0, :, 3:] = B[0, :, :3]
    A[1] = 0
    B[2] = 0
    A[3, 1:] = A[3, :1]
    found = compact(A, B)
    whole = B.double() @ A.double()
    assert torch.allclose(product(found, 6), whole, atol=1e-4)
    ranks = (found.singular_values > 1e-5 * found.singular_values.max()).sum(dim=1)
    assert ranks.tolist() == [3, 0, 0, 1]
    assert found.A.isfinite().all()
    assert found.B.isfinite().all()


@pytest.mark.parametrize(("up", "down"), [(1e30, 1e-30), (1e-38, 1e20), (1e35, 1e35), (1e-30, 1e-30)])
def test_sizes_near_the_ends_of_float32(up: float, down: float) -> None:
    """Of factors whose squares overflow or vanish the singular values are right, and so is the product where float32 holds it."""
    A, B = factors(20, 16, 4, batch=1)
    found, plain = compact(A * down, B * up), compact(A, B)
    assert torch.allclose(found.singular_values / up / down, plain.singular_values, rtol=1e-4)
    assert torch.allclose(product(found, 4) / up / down, product(plain, 4), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_of_other_dtypes_it_is_that_of_their_values(dtype: torch.dtype) -> None:
    A, B = factors(20, 16, 4, dtype=dtype)
    found = compact(A, B)
    assert torch.allclose(product(found, 4), B.double() @ A.double(), atol=1e-4)


def test_a_batch_is_its_members_one_by_one() -> None:
    A, B = factors(33, 21, 7, batch=5)
    found = compact(A, B)
    for index in range(5):
        alone = compact(A[index : index + 1], B[index : index + 1])
        assert torch.allclose(alone.A[0], found.A[index], atol=1e-5)
        assert torch.allclose(alone.B[0], found.B[index], atol=1e-5)


def test_a_smaller_rank_is_as_good_as_extracting_it_from_the_merged_update() -> None:
    """To 1e-5 of the energy, through both of the package's roads."""
    decay = torch.arange(1, 129).double() ** -0.4
    whole = toys.with_spectrum(256, 192, decay, seed=5)
    U, S, Vh = torch.linalg.svd(whole, full_matrices=False)
    A, B = (Vh[:128] * S[:128, None]).float(), U[:, :128].float()
    found = compact(A[None], B[None], 0.5)
    delta = 0.5 * B @ A
    settings = lowrank.Settings(32, "exact")
    [extracted] = lowrank.decompose(
        [(torch.zeros_like(delta), delta)], ["w"], settings, lowrank.PROFILES["cpu"], torch.device("cpu")
    )
    assert extracted.factors is not None
    total = delta.double().square().sum()
    kept = 1 - (delta.double() - product(found, 32)[0]).square().sum() / total
    wanted = 1 - extracted.factors.residual_sq / total
    assert abs(float(kept - wanted)) < 1e-5
    by_sigma = found.singular_values[0, :32].square().sum() / found.singular_values.square().sum()
    assert abs(float(by_sigma - wanted)) < 1e-5
