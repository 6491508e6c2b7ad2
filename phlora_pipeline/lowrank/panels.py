"""Thin panels of rows: random ones that depend on a tensor's name alone, orthonormal ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.operator import gram, product
from phlora_pipeline.lowrank.small import Eigh, solved

_DEPENDENT = 1e-12
"""Eigenvalues of a Gram matrix of unit rows below this share of the largest belong to dependent rows: they are rounding."""

_SPURIOUS = 0.01
"""Squared length that is left, of rows that were orthonormal, where they turn out to have been rounding."""


def gaussian(names: Sequence[str], purpose: str, rows: int, columns: int, device: torch.device) -> Tensor:
    """(b, rows, columns) float32 of independent N(0, 1), a function of each tensor's name and of the purpose alone.

    Drawn on the device, where it takes no time: the same numbers on every device of a kind, in every batch.
    """
    generator = _generator(device)

    def one(name: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:7])
        return torch.randn(rows, columns, generator=generator.manual_seed(seed), device=device)

    return torch.stack([one(name) for name in names])


def _generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)


def whitener(panel: Tensor) -> Tensor:
    """R (b, l, l) float32 such that the rows of R·panel are orthonormal, or zero in place of dependent ones.

    From the eigenvectors of the float64 Gram matrix of the rows brought to unit length (SVQB: Stathopoulos and Wu, 2002):
    much cheaper than Householder's QR on a thin panel, and nothing can break down. Applied twice it is exact to rounding.
    """
    [R] = solved(_whitening, gram(panel), torch.linalg.vector_norm(panel, dim=-1))
    return R


def _whitening(eigh: Eigh, squares: Tensor, lengths: Tensor) -> tuple[Tensor]:
    lengths = lengths.double()  # (b, l)
    inverse = torch.where(lengths > 0, 1 / lengths.clamp_min(torch.finfo(torch.float32).tiny), 0)
    values, W = eigh(squares * inverse.unsqueeze(-1) * inverse.unsqueeze(-2))  # ascending
    kept = values > _DEPENDENT * values[..., -1:]
    roots = torch.where(kept, values.clamp_min(_DEPENDENT * 1e-6).rsqrt(), 0)
    R: Tensor = roots.unsqueeze(-1) * W.mT * inverse.unsqueeze(-2)
    return (R.float(),)


def orthonormal(panel: Tensor) -> Tensor:
    """The panel's rows made orthonormal once; dependent ones become zero."""
    return product(whitener(panel), panel)


def straightened(panel: Tensor) -> Tensor:
    """Rows that are orthonormal but for rounding made so, each moved as little as can be (Löwdin, 1950).

    Directions that are mostly gone, since they were nothing but rounding when they were brought to unit length, are left
    out: PᵀP is then still a projector.
    """
    [R] = solved(_straightening, gram(panel))
    return product(R, panel)


def _straightening(eigh: Eigh, squares: Tensor) -> tuple[Tensor]:
    values, W = eigh(squares)
    roots = torch.where(values > _SPURIOUS, values.clamp_min(_SPURIOUS).rsqrt(), 0)
    R: Tensor = (W * roots.unsqueeze(-2)) @ W.mT
    return (R.float(),)


def against(panel: Tensor, Q: Tensor) -> Tensor:
    """The panel less its part in the span of Q's orthonormal rows: P − (P·Qᵀ)·Q."""
    if len(panel) == 1:
        return torch.addmm(panel[0], panel[0] @ Q[0].mT, Q[0], alpha=-1).unsqueeze(0)
    return torch.baddbmm(panel, panel @ Q.mT, Q, alpha=-1)
