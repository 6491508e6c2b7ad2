"""Triplets in reach of a subspace: never more energy than there is, all of it where the subspace is right."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank.operator import Dense
from phlora_pipeline.lowrank.panels import gaussian, orthonormal
from phlora_pipeline.lowrank.ritz import Triplets, refine, triplets_of
from tests.lowrank.cases import CPU, delta_of, energies_of, projector
from tests.toys import with_spectrum

SHAPES = [(20, 20), (30, 14), (14, 30)]


def op_of(*deltas: Tensor) -> Dense:
    return Dense(torch.stack(deltas), torch.float32)


def short_side(delta: Tensor) -> Tensor:
    """D in float64."""
    return delta.double() if len(delta) <= delta.shape[1] else delta.double().mT


def random_rows(rows: int, columns: int, purpose: str = "range") -> Tensor:
    panel = gaussian(["w"], purpose, rows, columns, CPU)
    return orthonormal(orthonormal(panel))


def psi_for(op: Dense, side: int = 2) -> Tensor:
    """Random rows on the long side, or on the short one, 1."""
    return gaussian([f"w{number}" for number in range(op.shape[0])], "check", 3, op.shape[side], CPU)


def left_vectors(delta: Tensor, p: int) -> Tensor:
    """True left singular vectors of D, as rows."""
    return torch.linalg.svd(short_side(delta))[0][:, :p].mT.float().unsqueeze(0)


def right_vectors(delta: Tensor, p: int) -> Tensor:
    """True right ones."""
    return torch.linalg.svd(short_side(delta))[2][:p].float().unsqueeze(0)


def assert_are_triplets(found: Triplets, delta: Tensor, row: int = 0) -> None:
    """Orthogonal rows of squared length σ on both sides, σ descending."""
    sigma = found.energies[row].sqrt()
    assert (found.energies.dtype, found.energies.device.type) == (torch.float64, "cpu")
    assert torch.equal(found.energies[row], found.energies[row].sort(descending=True)[0])
    for side in (found.short[row].double(), found.long[row].double()):
        torch.testing.assert_close(side @ side.mT, torch.diag(sigma), rtol=0, atol=1e-5 * float(sigma[0]))


@pytest.mark.parametrize("spectrum", ["power", "flat", "clustered", "rank two"])
@pytest.mark.parametrize(("d", "k"), SHAPES)
class TestRefine:
    def test_a_right_subspace_gives_the_true_triplets(self, d: int, k: int, spectrum: str) -> None:
        delta = delta_of(d, k, spectrum)
        found, compression, _ = refine(op_of(delta), right_vectors(delta, 5), psi_for(op_of(delta)))
        energies = energies_of(delta)[:5]
        torch.testing.assert_close(found.energies[0], energies, rtol=1e-5, atol=1e-10)
        assert_are_triplets(found, delta)
        product = found.short[0].double().mT @ found.long[0].double()
        left = (short_side(delta) - product).square().sum()
        assert float(left) == pytest.approx(float(energies_of(delta)[5:].sum()), rel=1e-4, abs=1e-9)
        assert float(compression.S[0].abs().max()) < 1e-10

    def test_any_subspace_gives_lower_bounds(self, d: int, k: int, spectrum: str) -> None:
        """Cauchy: Ritz values interlace with the eigenvalues."""
        delta = delta_of(d, k, spectrum)
        found, _, _ = refine(op_of(delta), random_rows(6, max(d, k)), psi_for(op_of(delta)))
        assert_are_triplets(found, delta)
        energies = energies_of(delta)
        assert (found.energies[0] <= energies[:6] * (1 + 1e-5) + 1e-10).all()

    def test_the_compression_is_that_of_the_gram_operator(self, d: int, k: int, spectrum: str) -> None:
        delta = delta_of(d, k, spectrum)
        start = random_rows(6, max(d, k))
        _, found, _ = refine(op_of(delta), start, psi_for(op_of(delta)))
        D, V = short_side(delta), found.V[0].double()
        G = D.mT @ D
        C = V @ G - V @ G @ V.mT @ V
        torch.testing.assert_close(V.mT @ V, projector(start[0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(V @ V.mT @ V, V, rtol=0, atol=1e-5)
        torch.testing.assert_close(found.M[0], V @ G @ V.mT, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found.S[0], C @ C.mT, rtol=1e-4, atol=1e-5)
        assert found.M.dtype == found.S.dtype == torch.float64

    def test_half_a_step_ahead_of_the_subspace(self, d: int, k: int, spectrum: str) -> None:
        """Triplets from the side that V was multiplied to hold at least what V itself does."""
        delta = delta_of(d, k, spectrum)
        V = random_rows(6, max(d, k))
        found, _, _ = refine(op_of(delta), V, psi_for(op_of(delta)))
        held = float((short_side(delta) @ V[0].double().mT).square().sum())
        assert float(found.energies.sum()) >= held * (1 - 1e-6)

    def test_the_random_rows_ride_along(self, d: int, k: int, spectrum: str) -> None:
        delta = delta_of(d, k, spectrum)
        op, D = op_of(delta), short_side(delta)
        psi = psi_for(op)
        seen = refine(op, random_rows(6, max(d, k)), psi)[2]
        torch.testing.assert_close(seen[0].double(), psi[0].double() @ D.mT, rtol=1e-5, atol=1e-5)
        psi = psi_for(op, 1)
        seen = triplets_of(op, left_vectors(delta, 4), psi)[1]
        torch.testing.assert_close(seen[0].double(), psi[0].double() @ D, rtol=1e-5, atol=1e-5)

    def test_triplets_of_true_left_vectors(self, d: int, k: int, spectrum: str) -> None:
        delta = delta_of(d, k, spectrum)
        op = op_of(delta)
        found, _ = triplets_of(op, left_vectors(delta, 5), psi_for(op, 1))
        assert_are_triplets(found, delta)
        assert found.short.shape == (1, 5, min(d, k))
        assert found.long.shape == (1, 5, max(d, k))
        torch.testing.assert_close(found.energies[0], energies_of(delta)[:5], rtol=1e-5, atol=1e-10)


def test_what_rounding_left_in_the_subspace_is_squared_away() -> None:
    """A subspace that is off by ε has lost energy of the order of ε²; half a step of iteration takes most of that back."""
    sigma = torch.cat([torch.linspace(2, 1, 4), torch.full((40,), 0.3)])
    delta = with_spectrum(44, 60, sigma).float()
    V = orthonormal(orthonormal(right_vectors(delta, 4) + 0.1 * gaussian(["w"], "noise", 4, 60, CPU) / 60**0.5))
    found, _, _ = refine(op_of(delta), V, psi_for(op_of(delta)))
    optimum = float(energies_of(delta)[:4].sum())
    held = float((short_side(delta) @ V[0].double().mT).square().sum())
    before, after = 1 - held / optimum, 1 - float(found.energies.sum()) / optimum
    assert 1e-3 < before < 2e-2
    assert 0 < after < before / 10


@settings(max_examples=20, deadline=None)
@given(rank=st.integers(0, 5), p=st.integers(1, 8), size=st.sampled_from([1e-4, 1.0, 1e4]))
def test_a_rank_below_the_subspaces_gives_zero_pairs(rank: int, p: int, size: float) -> None:
    delta = size * with_spectrum(20, 30, torch.arange(rank, 0, -1)).float() if rank else torch.zeros(20, 30)
    found, _, _ = refine(op_of(delta), random_rows(p, 30), psi_for(op_of(delta)))
    zero = found.energies[0] == 0
    assert not found.short[0][zero].any()
    assert not found.long[0][zero].any()
    assert int((~zero).sum()) == min(rank, p)
    assert float(found.energies[0][min(rank, p) :].sum()) <= 1e-10 * size**2
    assert found.short.isfinite().all()
    assert found.long.isfinite().all()


def test_matrices_of_a_batch_are_apart() -> None:
    deltas = [delta_of(16, 24, name) for name in ("power", "flat", "rank two")]
    op = op_of(*deltas)
    V = gaussian(["a", "b", "c"], "range", 5, 24, CPU)
    psi = psi_for(op)
    together, compression, seen = refine(op, V, psi)
    for index in range(3):
        alone = refine(op.pick([index]), V[index : index + 1], psi[index : index + 1])
        torch.testing.assert_close(alone[0].energies[0], together.energies[index], rtol=1e-5, atol=1e-10)
        torch.testing.assert_close(alone[1].M[0], compression.M[index], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(alone[2][0], seen[index])
        one, other = (found.short[row].mT @ found.long[row] for found, row in ((alone[0], 0), (together, index)))
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_leading_subspace_is_the_true_one() -> None:
    delta = with_spectrum(30, 20, torch.tensor([5.0, 4.0, 3.0, 0.5, 0.4])).float()
    found, _ = triplets_of(op_of(delta), left_vectors(delta, 3), psi_for(op_of(delta), 1))
    U, _, Vh = torch.linalg.svd(delta.double())
    torch.testing.assert_close(projector(found.long[0]), U[:, :3] @ U[:, :3].mT, rtol=0, atol=1e-5)
    torch.testing.assert_close(projector(found.short[0]), Vh[:3].mT @ Vh[:3], rtol=0, atol=1e-5)
