"""What LoRA factors keep of ΔW: E_r of eq. 5, and what rounding them costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import CHUNK


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
    rows = max(1, CHUNK // X.shape[1])
    for start in range(0, len(X), rows):
        total += X[start : start + rows].double().mT @ Y[start : start + rows].double()
    return total
