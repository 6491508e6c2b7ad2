"""Rayleigh–Ritz in float32 on a subspace that was found in any precision: triplets, and all that certifies them.

Three products with D, of as many rows as are kept. V, the orthonormalised rows of U·D, spans the long side's part of the
subspace: half a step of subspace iteration ahead of U, in float32, so that what rounding the range finder left in U is
squared away. V·Dᵀ gives the triplets, D ≈ (D·Vᵀ)·V, and the compression M = V(DᵀD)Vᵀ; its product with D the residual.
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


def refine(op: Operator, U: Tensor, psi: Tensor) -> tuple[Triplets, Compression, Tensor]:
    """Triplets of D in reach of a subspace.

    Args:
        op: D.
        U: (b, p, m), rows that span it, the leading ones first: each row of U·D should be of the size of its own σ.
        psi: (b, s, m), random rows that ride along, for the checks.

    Returns:
        All p triplets, the compression, and ψ·D (b, s, n).
    """
    p = U.shape[1]
    both = op.to_long(torch.cat([U, psi], dim=1), precise=True)  # (b, p + s, n)
    V, seen = straightened(orthonormal(both[:, :p])), both[:, p:]
    VD = op.to_short(V, precise=True)  # (b, p, m)
    F = op.to_long(VD, precise=True)  # (b, p, n)
    C = against(against(F, V), V)
    M = gram(VD)
    return _triplets(V, VD, M), Compression(V, M.cpu(), gram(C).cpu()), seen


def triplets_of(op: Operator, U: Tensor, psi: Tensor) -> tuple[Triplets, Tensor]:
    """Triplets of U·D for orthonormal rows U (b, p, m): D ≈ Uᵀ(U·D), with one product; and ψ·D."""
    p = U.shape[1]
    both = op.to_long(torch.cat([U, psi], dim=1), precise=True)
    UD = both[:, :p]
    turned = _triplets(U, UD, gram(UD))
    return Triplets(turned.long, turned.short, turned.energies), both[:, p:]


def _triplets(V: Tensor, VD: Tensor, M: Tensor) -> Triplets:
    """Triplets of (V·Dᵀ)ᵀ·V: V (b, p, n) orthonormal rows, VD = V·Dᵀ (b, p, m), M = VD·VDᵀ in float64."""
    energies, to_short, to_long = solved(_rotations, M)
    return Triplets(product(to_short, VD), product(to_long, V), energies.cpu())


def _rotations(eigh: Eigh, M: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """σ², and what turns VD and V into rows √σ·u and √σ·v."""
    energies, W = eigh(M)  # ascending
    energies, W = energies.flip(-1), W.flip(-1)
    kept = energies > _VANISHED * energies[..., :1]
    energies = torch.where(kept, energies, 0)
    root = energies.clamp_min(torch.finfo(torch.float32).tiny).pow(0.25)  # √σ
    inverse = torch.where(kept, 1 / root, 0)
    to_short = (inverse.unsqueeze(-1) * W.mT).float()
    return energies, to_short, (torch.where(kept, root, 0).unsqueeze(-1) * W.mT).float()


def signs_fixed(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """B (…, d, q) and A (…, q, k) of rows √σ·u and √σ·v; the largest entry of each column of U positive: the same ΔW, the same bytes."""
    largest = left.abs().argmax(dim=-1, keepdim=True)  # (q, 1)
    signs = torch.where(left.gather(-1, largest) < 0, -1.0, 1.0)
    return (left * signs).mT.contiguous(), right * signs
