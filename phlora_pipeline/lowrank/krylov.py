"""Block Krylov: the subspace in which the leading left singular vectors of D lie, found by products with thin panels.

span{DΩ, (DDᵀ)DΩ, …, (DDᵀ)^q DΩ} for a random Ω, every block kept, each orthogonalised twice against all before it. On the
flat spectra of full fine-tunes it is far ahead of subspace iteration with as many products (Musco and Musco, 2015), and
blocks narrower than the rank, with more steps, need fewer columns in all (Meyer, Musco and Musco, 2024). The products may
be of low precision: only the subspace comes of them, and the energy that it holds depends on it in second order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import to_host
from phlora_pipeline.lowrank.operator import Operator, product
from phlora_pipeline.lowrank.panels import against, gaussian, orthonormal, straightened


class KrylovBasis:
    """A growing orthonormal basis on the short side of a batch."""

    def __init__(self, op: Operator, names: Sequence[str], block: int) -> None:
        """Start with one block.

        Args:
            op: D.
            names: of the tensors: they seed Ω.
            block: rows per step.
        """
        self._op = op
        omega = gaussian(names, "range", block, op.shape[2], op.device)
        first = straightened(orthonormal(op.to_short(omega)))
        self._Q = [first]  # each (b, block, m)
        self._Z = [op.to_long(first)]  # each (b, block, n): Q·D in low precision

    @property
    def width(self) -> int:
        """Rows of the basis."""
        return sum(block.shape[1] for block in self._Q)

    def grow(self, width: int) -> None:
        """Add blocks until the basis has `width` rows or more."""
        while self.width < width:
            Q = torch.cat(self._Q, dim=1)  # (b, L, m)
            new = orthonormal(against(self._op.to_short(self._Z[-1]), Q))
            new = straightened(against(new, Q))
            self._Q.append(new)
            self._Z.append(self._op.to_long(new))

    def largest(self) -> list[float]:
        """About σ_1² of each matrix: what the basis, in low precision, has of it."""
        Z = torch.cat(self._Z, dim=1)
        found: list[float] = to_host(torch.linalg.eigvalsh(product(Z, Z.mT).double())[:, -1])
        return found

    def leading(self, p: int) -> Tensor:
        """The p leading Ritz directions, as far as the low precision tells: (b, p, m), nearly orthonormal rows."""
        Q, Z = torch.cat(self._Q, dim=1), torch.cat(self._Z, dim=1)
        _, W = torch.linalg.eigh(product(Z, Z.mT).double())
        return product(W.flip(-1)[..., :p].mT.float(), Q)

    def pick(self, rows: list[int], op: Operator) -> KrylovBasis:
        """The basis of some matrices of the batch, to be grown further on `op`."""
        if rows == list(range(len(self._Q[0]))):
            return self
        picked = object.__new__(KrylovBasis)
        picked._op = op  # a constructor without a start
        picked._Q = [block[rows] for block in self._Q]
        picked._Z = [block[rows] for block in self._Z]
        return picked
