"""ΔW → singular values, preserved energy, LoRA factors. Tensors in, tensors out: no storage, no logging, no policy.

Dimensions: `b` tensors of one shape in a batch, `d` rows (outputs) and `k` columns (inputs) of a weight, `r` the rank.
Names are the paper's: `ΔW = W_tuned − W_base` (eq. 1), `ΔW ≈ B·A` (eq. 2), `B = U√Σ` and `A = √ΣVᵀ` (eq. 4; its
Appendix D swaps the two), `E_r = Σ_{i≤r} σ_i² / Σ_i σ_i²` (eq. 5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ENERGY_RANKS = (8, 16, 32, 64, 128, 256, 512)
_WIDE = frozenset({torch.float64, torch.int64, torch.int32})
"""Stored dtypes whose differences float32 would lose: they are formed in float64, and then rounded."""

_CHUNK = 1 << 22
"""Elements that are held in float64 at a time: sums are exact enough, and no temporary is as large as a weight."""


@dataclass(frozen=True, slots=True)
class Svd:
    """A truncated singular value decomposition of a batch, signs fixed.

    Attributes:
        U: (b, d, q), orthonormal columns; the entry of largest magnitude in each is positive.
        S: (b, q), descending.
        Vh: (b, q, k), orthonormal rows.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


Solver = Callable[[Tensor, int], Svd]
"""(ΔW (b, d, k) float32, max_rank) → the leading min(max_rank, d, k) singular triplets of each."""


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of a batch at `max_rank`; those of a smaller rank are their first rows and columns.

    Attributes:
        A: (b, q, k) float32, √ΣVᵀ.
        B: (b, d, q) float32, U√Σ.
        singular_values: (b, q) float32, descending.
        residual_sq: (b,) float64, ‖ΔW − B·A‖_F², measured.
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor
    residual_sq: Tensor


def form_delta(base: Tensor, tuned: Tensor, out: Tensor) -> Tensor:
    """Write `ΔW = W_tuned − W_base` into `out`, in float32, from whatever dtypes are stored.

    The subtraction is never done in a 16-bit dtype: that alone would add up to 5e-4 of relative error.

    Args:
        base, tuned: same shape, any dtype, on the CPU or on `out`'s device.
        out: contiguous float32 of the same shape; overwritten.

    Returns:
        (3,) float64 on `out`'s device: ‖W_base‖_F², ‖W_tuned‖_F², ‖ΔW‖_F². A NaN or an infinity among the entries
        makes the last one not finite, and nothing else does: squares of float32 values cannot overflow float64.
    """
    dtype = torch.float64 if {base.dtype, tuned.dtype} & _WIDE else torch.float32
    flat_out = out.view(-1)
    sums = torch.zeros(3, dtype=torch.float64, device=out.device)
    for start in range(0, out.numel(), _CHUNK):
        piece = slice(start, start + _CHUNK)
        before = base.reshape(-1)[piece].to(out.device, dtype)
        after = tuned.reshape(-1)[piece].to(out.device, dtype)
        torch.sub(after, before, out=flat_out[piece])
        sums += torch.stack([sum_of_squares(before), sum_of_squares(after), sum_of_squares(flat_out[piece])])
    return sums


def to_host(tensor: Tensor) -> Any:
    """A small tensor as (nested) lists: the one place where the device is waited for."""
    return tensor.tolist()


def first_nonfinite(tensor: Tensor) -> tuple[int, tuple[int, ...]] | None:
    """How many entries are NaN or infinite, and the index of the first; None where all are finite."""
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    return (count, tuple(bad.nonzero()[0].tolist())) if count else None


def factorise(delta: Tensor, max_rank: int, solver: Solver) -> Factors:
    """LoRA factors of every ΔW of a batch (eq. 3 and 4), and what they leave.

    Args:
        delta: (b, d, k) float32, finite. Its contents are used up: the residual is formed in its place.
        max_rank: ≥ 1; the factors have q = min(max_rank, d, k) columns and rows.
        solver: one of `SOLVERS`.
    """
    svd = solver(delta, max_rank)
    root = svd.S.sqrt()  # (b, q)
    A = root.unsqueeze(-1) * svd.Vh  # (b, q, k)
    B = svd.U * root.unsqueeze(-2)  # (b, d, q)
    delta.baddbmm_(B, A, alpha=-1)
    residual_sq = torch.stack([sum_of_squares(matrix) for matrix in delta])
    return Factors(A, B, svd.S, residual_sq)


def preserved_energy(singular_values: Sequence[float], delta_norm_sq: float, rank: int) -> float | None:
    """E_r of eq. 5, the total from ‖ΔW‖_F² in float64; None where ΔW = 0 (0/0) or σ_r is not known.

    Args:
        singular_values: descending.
        delta_norm_sq: ‖ΔW‖_F².
        rank: r; one beyond q is known only if the q values are all there are, which is the caller's to say by
            passing min(r, d, k).
    """
    if delta_norm_sq == 0 or rank > len(singular_values):
        return None
    kept = math.fsum(value * value for value in singular_values[:rank])
    return min(kept / delta_norm_sq, 1.0)


def rounding_error_sq(A: Tensor, B: Tensor, A_written: Tensor, B_written: Tensor) -> float:
    """‖B̂Â − BA‖_F² from the factors alone, never forming a (d, k) product.

    With δA = Â − A and δB = B̂ − B the difference is δB·Â + B·δA, whose squared norm needs six r × r products:
    ⟨δBᵀδB, ÂÂᵀ⟩ + 2⟨δBᵀB, ÂδAᵀ⟩ + ⟨BᵀB, δAδAᵀ⟩. Nothing cancels, so it is as accurate when it is tiny.

    Args:
        A, A_written: (r, k), exact and as stored.
        B, B_written: (d, r), exact and as stored.
    """
    # A float32 difference of a number and its rounding is exact (Sterbenz), so float32 holds both δ.
    dA, dB = (A_written.float() - A).mT, B_written.float() - B  # (k, r), (d, r)
    At_written = A_written.float().mT  # (k, r)
    total = (_gram(dB, dB) * _gram(At_written, At_written)).sum()
    total += 2 * (_gram(dB, B) * _gram(At_written, dA)).sum()
    total += (_gram(B, B) * _gram(dA, dA)).sum()
    return float(total)


def _gram(X: Tensor, Y: Tensor) -> Tensor:
    """XᵀY (r, r) in float64 for tall (n, r) factors, a few rows at a time."""
    total = torch.zeros(X.shape[1], Y.shape[1], dtype=torch.float64, device=X.device)
    rows = max(1, _CHUNK // X.shape[1])
    for start in range(0, len(X), rows):
        total += X[start : start + rows].double().mT @ Y[start : start + rows].double()
    return total


def exact(delta: Tensor, max_rank: int) -> Svd:
    """Thin SVD by LAPACK or cuSOLVER, truncated: the paper's own route, and the reference of every other solver."""
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    q = min(max_rank, S.shape[-1])
    return _fix_signs(U[..., :q], S[..., :q], Vh[..., :q, :])


def exact_flops(d: int, k: int) -> float:
    """Floating-point operations of `exact` on one (d, k) matrix: QR first, then a divide-and-conquer SVD.

    Golub and Van Loan, *Matrix Computations*, table 8.6.1 (R-SVD with U₁ and V): 6 m n² + 20 n³ for m ≥ n.
    """
    m, n = max(d, k), min(d, k)
    return 6.0 * m * n * n + 20.0 * n**3


def exact_bytes(d: int, k: int) -> int:
    """Peak bytes of `exact` on one (d, k) float32 matrix beside the matrix itself: a copy, U, Vh and LAPACK's workspace."""
    n = min(d, k)
    return 4 * (2 * d * k + 6 * n * n)


SOLVERS: dict[str, Solver] = {"exact": exact}


def _fix_signs(U: Tensor, S: Tensor, Vh: Tensor) -> Svd:
    """One sign per triplet, so that the same ΔW gives the same bytes: the largest entry of each column of U is positive."""
    largest = U.abs().argmax(dim=-2, keepdim=True)  # (b, 1, q)
    signs = torch.where(U.gather(-2, largest) < 0, -1.0, 1.0).to(U.dtype)  # (b, 1, q)
    # Multiplied out into new memory: a view would keep the whole of U and Vh alive.
    return Svd(U * signs, S.clone(), Vh * signs.mT)


def sum_of_squares(values: Tensor) -> Tensor:
    """Σ x² in float64, through temporaries of `_CHUNK` elements at most."""
    flat = values.reshape(-1)
    total = torch.zeros((), dtype=torch.float64, device=values.device)
    for start in range(0, flat.numel(), _CHUNK):
        piece = flat[start : start + _CHUNK].double()
        total += torch.dot(piece, piece)
    return total
