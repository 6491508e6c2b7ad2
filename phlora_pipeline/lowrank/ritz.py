"""Rayleigh–Ritz in float32 on a subspace that was found in any precision: triplets, and all that certifies them.

Two products with D, of as many rows as are kept. V is the subspace on the long side; U, the orthonormalised rows of V·Dᵀ, is
half a step of subspace iteration ahead of it, in float32, so that what rounding the range finder left in V is squared away.
U·D gives the triplets, D ≈ Uᵀ(U·D). V·Dᵀ gives the compression M = V(DᵀD)Vᵀ, and both its residual: V·Dᵀ lies in the span
of U, so that V(DᵀD) = (V·Dᵀ·Uᵀ)·(U·D) without another product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.lowrank.operator import Operator, gram, product
from phlora_pipeline.lowrank.panels import against, orthonormal, straightened
from phlora_pipeline.lowrank.small import Eigh, solved

_VANISHED = 1e-12
"""σ² below this share of σ_1² is rounding of float32: the pair is zero."""


@dataclass(frozen=True, slots=True)
class Triplets:
    """Leading singular triplets of a batch, σ in descending order.

    Attributes:
        short: (b, q, m) float32, rows √σ·u on the short side; zero where σ is.
        long: (b, q, n) float32, rows √σ·v.
        energies: (b, q) float64 on the CPU: σ².
    """

    short: Tensor
    long: Tensor
    energies: Tensor

    def turned(self) -> Triplets:
        """Those of Dᵀ."""
        return Triplets(self.long, self.short, self.energies)

    def pick(self, rows: list[int]) -> Triplets:
        """Of some matrices of the batch."""
        return Triplets(self.short[rows], self.long[rows], self.energies[rows])

    def leading(self, q: int) -> Triplets:
        """The first q."""
        return Triplets(self.short[:, :q], self.long[:, :q], self.energies[:, :q])


@dataclass(frozen=True, slots=True)
class Compression:
    """What a subspace V of dimension p tells about G = DᵀD.

    Attributes:
        V: (b, p, n) float32, orthonormal rows, or zero ones.
        M: (b, p, p) float64 on the CPU: V·G·Vᵀ.
        S: (b, p, p) float64 on the CPU: C·Cᵀ with C = V·G·(I − VᵀV).
    """

    V: Tensor
    M: Tensor
    S: Tensor

    def pick(self, rows: list[int]) -> Compression:
        """Of some matrices of the batch."""
        return Compression(self.V[rows], self.M[rows], self.S[rows])


def refine(op: Operator, found: Tensor, psi: Tensor) -> tuple[Triplets, Compression, Tensor]:
    """Triplets of D in reach of a subspace.

    Args:
        op: D.
        found: (b, p, n), rows that span it, the leading ones first: near to right singular vectors, of any lengths.
        psi: (b, s, n), random rows that ride along, for the checks.

    Returns:
        All p triplets, the compression, and ψ·Dᵀ (b, s, m).
    """
    p = found.shape[1]
    V = straightened(orthonormal(found))
    both = op.to_short(torch.cat([V, psi], dim=1), precise=True)  # (b, p + s, m)
    VD, seen = both[:, :p], both[:, p:]
    U = straightened(orthonormal(VD))
    UD = op.to_long(U, precise=True)  # (b, p, n)
    F = product(product(VD, U.mT), UD)
    C = against(against(F, V), V)
    return _triplets(U, UD), Compression(V, gram(VD).cpu(), gram(C).cpu()), seen


def triplets_of(op: Operator, U: Tensor, psi: Tensor) -> tuple[Triplets, Tensor]:
    """Triplets of D ≈ Uᵀ(U·D) for orthonormal rows U (b, p, m), with one product; and ψ·D (b, s, n) for ψ (b, s, m)."""
    p = U.shape[1]
    both = op.to_long(torch.cat([U, psi], dim=1), precise=True)
    return _triplets(U, both[:, :p]), both[:, p:]


def _triplets(U: Tensor, UD: Tensor) -> Triplets:
    """Triplets of Uᵀ·(U·D): U (b, p, m) orthonormal rows, UD = U·D (b, p, n)."""
    energies, to_short, to_long = solved(_rotations, gram(UD))
    return Triplets(product(to_short, U), product(to_long, UD), energies.cpu())


def _rotations(eigh: Eigh, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ², and what turns U and U·D into rows √σ·u and √σ·v."""
    energies, W = eigh(M)  # ascending
    energies, W = energies.flip(-1), W.flip(-1)
    kept = energies > _VANISHED * energies[..., :1]
    energies = torch.where(kept, energies, 0)
    root = energies.clamp_min(torch.finfo(torch.float32).tiny).pow(0.25)  # √σ
    inverse = torch.where(kept, 1 / root, 0)
    to_long = (inverse.unsqueeze(-1) * W.mT).float()
    return energies, (torch.where(kept, root, 0).unsqueeze(-1) * W.mT).float(), to_long


def signs_fixed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """B (…, d, q) and A (…, q, k) of rows √σ·u and √σ·v; the largest entry of each column of U positive: the same ΔW, the same bytes."""
    largest = left.abs().argmax(dim=-1, keepdim=True)  # (q, 1)
    signs = torch.where(left.gather(-1, largest) < 0, -1.0, 1.0)
    return (left * signs).mT.contiguous(), right * signs
