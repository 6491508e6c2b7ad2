"""The subspace: orthonormal, grown in any number of steps, and holding what there is to hold."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank.krylov import KrylovBasis
from phlora_pipeline.lowrank.operator import Dense
from phlora_pipeline.lowrank.panels import orthonormal
from tests.lowrank.cases import SPECTRA, delta_of, energies_of, projector
from tests.toys import with_spectrum

LOW = [torch.float32, torch.bfloat16]


def basis_of(
    deltas: Sequence[Tensor], *, low: torch.dtype = torch.float32, block: int = 8, width: int = 0
) -> KrylovBasis:
    made = KrylovBasis(Dense(torch.stack(list(deltas)), low), [f"w{number}" for number in range(len(deltas))], block)
    made.grow(width)
    return made


def share_held(V: Tensor, delta: Tensor) -> float:
    """Energy of ΔW in the span of V's rows, on the long side, over the most that as many rows can hold."""
    D = delta.double() if len(delta) <= delta.shape[1] else delta.double().mT
    optimum = energies_of(delta)[: len(V)].sum()
    return float((D @ orthonormal(orthonormal(V.unsqueeze(0)))[0].double().mT).square().sum() / optimum)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("spectrum", ["power", "flat", "steep"])
def test_rows_are_orthonormal_or_left_out(spectrum: str, low: torch.dtype) -> None:
    made = basis_of([delta_of(96, 130, spectrum)], low=low, width=48)
    Q = made.rows[0]
    G = Q @ Q.mT
    assert made.width == 48
    # A projector: where all σ are equal, or are soon as small as rounding, there is nothing new but that, and it is left out.
    assert float((G @ G - G).abs().max()) < 3e-5
    assert spectrum != "power" or float((G - torch.eye(48)).abs().max()) < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    d=st.integers(33, 90), k=st.integers(33, 90), block=st.sampled_from([4, 8, 16]),
    spectrum=st.sampled_from(["power", "flat", "steep", "clustered"]), low=st.sampled_from(LOW),
)  # fmt: skip
def test_leading_directions_hold_nearly_all_that_so_many_can(
    d: int, k: int, block: int, spectrum: str, low: torch.dtype
) -> None:
    delta = delta_of(d, k, spectrum)
    made = basis_of([delta], low=low, block=block, width=32)
    V = made.leading(4)[0]
    inner = V @ V.mT
    assert float((inner - torch.diag(inner.diag())).abs().max()) < 1e-2 * float(inner[0, 0])
    assert inner.diag().tolist() == pytest.approx(energies_of(delta)[:4].tolist(), rel=0.1)
    assert 0.97 < share_held(V, delta) < 1 + 1e-6


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(("d", "k"), [(80, 60), (60, 80)])
def test_an_exactly_low_rank_matrix_is_found_whole(d: int, k: int, low: torch.dtype) -> None:
    sigma = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    delta = with_spectrum(d, k, sigma).float()
    V = basis_of([delta], low=low, width=16).leading(5)[0]
    D = delta if d <= k else delta.mT
    rows = torch.linalg.svd(D.double())[2][:5]
    assert torch.dist(projector(V), rows.mT @ rows) < (1e-4 if low == torch.float32 else 2e-2)
    assert share_held(V, delta) == pytest.approx(1, abs=1e-6 if low == torch.float32 else 1e-4)


def test_it_is_the_krylov_space() -> None:
    """span{DΩ, GDΩ, G²DΩ} with G = DDᵀ, in float64 and by the book."""
    delta = delta_of(40, 50, "flat") + 0.1 * delta_of(40, 50, "power", seed=1)
    made = basis_of([delta], block=3, width=9)
    D = delta.double()
    blocks = [made.rows[0, :3].double()]
    for _ in range(2):
        blocks.append(blocks[-1] @ D @ D.mT)
    assert torch.dist(projector(made.rows[0]), projector(torch.cat(blocks))) < 1e-3


def test_more_products_never_hold_less() -> None:
    delta = delta_of(96, 96, "power")
    shares = [share_held(basis_of([delta], width=width).leading(8)[0], delta) for width in (8, 16, 24, 32, 48)]
    assert all(later >= earlier - 1e-6 for earlier, later in itertools.pairwise(shares))
    assert shares[0] < 0.99 < shares[-1]


@pytest.mark.parametrize("low", LOW)
def test_growing_in_two_goes_is_growing_in_one(low: torch.dtype) -> None:
    delta = delta_of(96, 96, "power")
    one, two = (basis_of([delta], low=low, width=width) for width in (40, 16))
    two.leading(8)
    two.grow(40)
    assert torch.equal(one.leading(8), two.leading(8))


def test_growing_adds_whole_blocks_until_it_is_wide_enough() -> None:
    made = basis_of([delta_of(96, 96, "flat")], block=8)
    assert made.width == 8
    made.grow(17)
    assert made.width == 24
    made.grow(20)
    assert made.width == 24


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_where_the_matrix_ends_the_basis_is_zero(rank: int) -> None:
    """Dependent directions are dropped, and not orthogonalised noise: the rank is found, and nothing breaks down."""
    delta = with_spectrum(64, 64, torch.tensor([3.0, 2.0, 1.0])[:rank]).float() if rank else torch.zeros(64, 64)
    Q = basis_of([delta], width=32).rows[0]
    assert float(Q.norm(dim=-1).round(decimals=3).sum()) >= rank
    V = basis_of([delta], width=32).leading(8)[0]
    assert share_held(V, delta) == pytest.approx(1, abs=1e-5) if rank else not V.any()


@pytest.mark.parametrize("low", LOW)
def test_matrices_of_a_batch_are_apart(low: torch.dtype) -> None:
    deltas = [delta_of(48, 64, name, seed=3) for name in ("power", "flat", "steep", "rank two")]
    made = basis_of(deltas, low=low, width=24)
    together = made.leading(4)
    for index, delta in enumerate(deltas):
        alone = KrylovBasis(Dense(delta.unsqueeze(0), low), [f"w{index}"], 8)
        alone.grow(24)
        wanted = share_held(alone.leading(4)[0], delta)
        assert share_held(together[index], delta) == pytest.approx(wanted, abs=1e-5 if low == torch.float32 else 2e-3)


def test_some_of_a_batch_grow_on() -> None:
    deltas = [delta_of(48, 64, name) for name in SPECTRA if name not in {"tiny", "huge"}]
    made = basis_of(deltas, width=16)
    picked = made.pick([3, 1], Dense(torch.stack([deltas[3], deltas[1]]), torch.float32))
    assert torch.equal(picked.leading(4), made.leading(4)[[3, 1]])
    picked.grow(24)
    assert (picked.width, made.width) == (24, 16)
    assert share_held(picked.leading(4)[0], deltas[3]) >= share_held(made.leading(4)[3], deltas[3]) - 1e-6


def test_another_name_starts_elsewhere() -> None:
    delta = delta_of(48, 48, "flat")
    op = Dense(delta.unsqueeze(0), torch.float32)
    one, same, other = (KrylovBasis(op, [name], 8).rows for name in ("a", "a", "b"))
    assert torch.equal(one, same)
    assert torch.dist(projector(one[0]), projector(other[0])) > 1
