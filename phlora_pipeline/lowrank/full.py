"""The routes that decompose all of ΔW: an SVD as in the paper, and the eigenvectors of the smaller Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.operator import Operator
from phlora_pipeline.lowrank.ritz import Triplets, triplets_of

_DRIVERS = ("gesvda", "gesvd")
"""cuSOLVER's, in the order in which they are tried; the CPU in float64 comes after the last. On an H100 the first is ten times as
fast as the second at 4096×4096, and its σ are within 6e-8·σ_1; it refuses some spectra. gesvdj is no faster than gesvd there, and
its vectors are orthogonal to 2e-3 only."""

_UNIT = 2.0**-24
_OF_LARGEST, _OF_OWN = 8, 2
"""A backward stable float32 SVD's σ_i is off by unit roundoff times 8·σ_1 + 2√m·σ_i at most: twice the worst that was seen, of
matrices whose singular values are all the same."""

_OF_SUM, _OF_SUM_ROOT = 24, 0.5
"""And σ_1² + … + σ_i² by (24 + √m/2)·‖D‖_F², besides what of ‖D‖_F² is missing from the sum of all, as where all entries are
alike: twice the worst that was seen. Single errors have either sign."""


def exact(
    op: Operator, rank: int, driver: str | None = None, norms_sq: Sequence[float] | None = None
) -> tuple[Triplets, Tensor, Tensor]:
    """Thin SVD by LAPACK or cuSOLVER, truncated: the paper's own route, and the reference of every other solver.

    Args:
        op: D; ΔW as a whole must fit the device.
        rank: triplets wanted.
        driver: cuSOLVER's; None takes the processor's in float64 on a CPU's behalf of a GPU, or LAPACK's float32 on a CPU.
        norms_sq: ‖D‖_F² of each, where it is known: their sums then tell more than each alone.

    Returns:
        The triplets; (b, rank) float64 on the CPU, whose first i add up to an upper bound of λ_1(G) + … + λ_i(G), λ = σ², and
        bound λ_i each where norms_sq is not given; and all σ (b, m), descending.

    Raises:
        torch.linalg.LinAlgError: it did not converge.
    """
    delta = op.dense()
    if op.device.type == "cpu":
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    elif driver is None:
        U, S, Vh = (part.float().to(op.device) for part in torch.linalg.svd(delta.cpu().double(), full_matrices=False))
    else:
        U, S, Vh = torch.linalg.svd(delta, full_matrices=False, driver=driver)
    root = S[..., :rank].sqrt().unsqueeze(-1)  # (b, q, 1)
    left, right = root * U[..., :rank].mT, root * Vh[..., :rank, :]  # (b, q, d), (b, q, k)
    values = S.double().cpu()
    bounds = _bounds(values, op.shape[1], rank, norms_sq)
    short, long = (right, left) if op.turned else (left, right)
    return Triplets(short, long, values[..., :rank].square()), bounds, values


def _bounds(values: Tensor, m: int, rank: int, norms_sq: Sequence[float] | None) -> Tensor:
    """Of σ² from all σ (b, m) as they were found: what each may be off by, or all together, and what is missing from ‖D‖_F²."""
    slack = _UNIT * (_OF_LARGEST * values[..., :1] + _OF_OWN * math.sqrt(m) * values)
    each = (values + slack).square()[..., :rank]
    if norms_sq is None:
        return each
    norms = torch.tensor(norms_sq, dtype=torch.float64).unsqueeze(-1)
    found = values.square().cumsum(dim=-1)
    together = found[..., :rank] + _UNIT * (_OF_SUM + _OF_SUM_ROOT * math.sqrt(m)) * norms
    sums = torch.minimum(each.cumsum(dim=-1), together) + (norms - found[..., -1:]).clamp_min(0)
    return torch.diff(sums, dim=-1, prepend=torch.zeros_like(norms))


def drivers(device: torch.device) -> tuple[str | None, ...]:
    """What `exact` is tried with on this device, in order."""
    return (None,) if device.type == "cpu" else (*_DRIVERS, None)


def gram_eigen(op: Operator, rank: int, psi: Tensor, dtype: torch.dtype) -> tuple[Triplets, Tensor, Tensor, Tensor]:
    """Leading eigenvectors U of G = DDᵀ, then D ≈ Uᵀ(U·D) in float32: one product of size m·m·n and one `eigh`.

    Forming G squares the condition number, but only U comes of it: σ and v are those of U·D, so that a tiny σ is as
    good as in the other routes. In float64 the eigenvalues are exact to rounding; in float32 their error, at most
    a modest multiple of unit roundoff times √m·λ_1, enters the bounds.

    Returns:
        The triplets, upper bounds of λ_i for i ≤ rank (b, rank) float64 on the CPU, ψ·D, and all λ (b, m), descending.
    """
    values, W = torch.linalg.eigh(op.gram(dtype))
    values = values.double().clamp_min(0).flip(-1).cpu()  # (b, m)
    U = W[..., -rank:].flip(-1).mT.float().contiguous()  # (b, r, m)
    triplets, seen = triplets_of(op, U, psi)
    unit = torch.finfo(dtype).eps
    slack = 8 * unit * math.sqrt(op.shape[1]) * values[..., :1]
    return triplets, values[..., :rank] + slack, seen, values
