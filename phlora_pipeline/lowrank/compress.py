"""An existing pair of factors at its smallest size: the SVD of B·A, without ever forming it.

B = Q_B·R_B and Aᵀ = Q_A·R_A give B·A = Q_B·(R_B·R_Aᵀ)·Q_Aᵀ. The matrix in the middle is r × r; its singular values are those
of B·A, and its singular vectors, turned by Q_B and Q_A, are those of B·A. A truncated SVD is the best of its rank (Eckart
and Young, 1936), so that cutting these factors is all there is to do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.lowrank.ritz import signs_fixed


@dataclass(frozen=True, slots=True)
class Compact:
    """scale·B·A by its singular values; those of a smaller rank are the first rows of A and columns of B.

    Attributes:
        A: (b, q, k) float32, √ΣVᵀ, with q = min(d, k, r).
        B: (b, d, q) float32, U√Σ; the entry of largest magnitude of each column is positive.
        singular_values: (b, q) float64, descending; Σσ² is ‖scale·B·A‖_F².
    """

    A: Tensor
    B: Tensor
    singular_values: Tensor


def compact(A: Tensor, B: Tensor, scale: float = 1.0) -> Compact:
    """The whole singular value decomposition of scale·B·A, of a batch.

    The two QR are in float32, whose error is that of the factors' own last digit; what they are multiplied to is in float64,
    so that no σ suffers from the product's condition number, which is that of B times that of A.

    Args:
        A: (b, r, k), finite, of any floating dtype.
        B: (b, d, r).
        scale: of the product; may be negative.
    """
    A, up = _near_one(A)
    B, more = _near_one(B)
    Q_B, R_B = torch.linalg.qr(B)  # (b, d, p), (b, p, r) with p = min(d, r)
    Q_A, R_A = torch.linalg.qr(A.mT)  # (b, k, s), (b, s, r)
    core = R_B.double() @ R_A.double().mT  # (b, p, s)
    U, S, Vh = torch.linalg.svd(core * math.copysign(1.0, scale), full_matrices=False)
    S = S * (abs(scale) * torch.exp2((up + more).double()))[:, None]
    root = S.sqrt().float()[..., None]  # (b, q, 1)
    left, right = root * (Q_B @ U.float()).mT, root * (Vh.float() @ Q_A.mT)  # (b, q, d), (b, q, k)
    B, A = signs_fixed(left, right)
    return Compact(A, B, S)


def _near_one(factors: Tensor) -> tuple[Tensor, Tensor]:
    """In float32, the largest entry of each between 1/2 and 1, and the power of two by which it was larger: squares neither overflow nor vanish."""
    wide = factors.double()
    _, exponent = torch.frexp(wide.abs().amax(dim=(1, 2)))
    return (wide * torch.exp2(-exponent.double())[:, None, None]).float(), exponent
