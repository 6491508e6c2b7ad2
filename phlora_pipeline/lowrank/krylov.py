"""Block Krylov: the subspace in which the leading left singular vectors of D lie, found by products with thin panels.

span{DΩ, (DDᵀ)DΩ, …, (DDᵀ)^q DΩ} for a random Ω, every block kept, each orthogonalised twice against all before it. On the
flat spectra of full fine-tunes it is far ahead of subspace iteration with as many products (Musco and Musco, 2015), and
blocks narrower than the rank, with more steps, need fewer columns in all (Meyer, Musco and Musco, 2024). The products may
be of low precision: only the subspace comes of them, and the energy that it holds depends on it in second order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import to_host
from phlora_pipeline.lowrank.operator import Operator, product
from phlora_pipeline.lowrank.panels import against, gaussian, orthonormal, straightened
from phlora_pipeline.lowrank.small import eigh, eigvalsh


class KrylovBasis:
    """A growing orthonormal basis on the short side of a batch.

    Attributes:
        width: rows of the basis.
    """

    def __init__(self, op: Operator, names: Sequence[str], block: int, room: int = 0) -> None:
        """Start with one block.

        Args:
            op: D.
            names: of the tensors: they seed Ω.
            block: rows per step.
            room: rows that there will be at least.
        """
        b, m, n = op.shape
        self._op, self._block, self.width = op, block, 0
        self._Q = torch.empty(b, max(room, block), m, device=op.device)
        self._Z = torch.empty(b, max(room, block), n, device=op.device)
        omega = gaussian(names, "range", block, n, op.device)
        self._add(straightened(orthonormal(op.to_short(omega))))

    @property
    def rows(self) -> Tensor:
        """What it is made of (b, width, m): orthonormal rows."""
        return self._Q[:, : self.width]

    @property
    def images(self) -> Tensor:
        """Their products with D (b, width, n), in low precision."""
        return self._Z[:, : self.width]

    def grow(self, width: int) -> None:
        """Add blocks until the basis has `width` rows or more."""
        wanted = self._block * math.ceil(width / self._block)
        if wanted > self._Q.shape[1]:
            self._Q, self._Z = (_with_room(panel, wanted) for panel in (self.rows, self.images))
        while self.width < width:
            new = orthonormal(against(self._op.to_short(self.images[:, -self._block :]), self.rows))
            self._add(straightened(against(new, self.rows)))

    def _add(self, new: Tensor) -> None:
        rows = slice(self.width, self.width + self._block)
        self._Q[:, rows].copy_(new)
        self._Z[:, rows].copy_(self._op.to_long(new))
        self.width = rows.stop

    def largest(self) -> list[float]:
        """About σ_1² of each matrix: what the basis, in low precision, has of it."""
        found: list[float] = to_host(eigvalsh(product(self.images, self.images.mT).double())[:, -1])
        return found

    def leading(self, p: int) -> Tensor:
        """The p leading Ritz directions' images, as far as the low precision tells: (b, p, n), near to σ·v, nearly orthogonal."""
        _, W = eigh(product(self.images, self.images.mT).double())
        return product(W.flip(-1)[..., :p].mT.float(), self.images)

    def pick(self, rows: list[int], op: Operator) -> KrylovBasis:
        """The basis of some matrices of the batch, to be grown further on `op`."""
        if rows == list(range(len(self._Q))):
            return self
        picked = object.__new__(KrylovBasis)  # a constructor without a start
        picked._op, picked._block, picked.width = op, self._block, self.width
        picked._Q, picked._Z = self._Q[rows], self._Z[rows]
        return picked


def _with_room(panel: Tensor, rows: int) -> Tensor:
    roomier = panel.new_empty(panel.shape[0], rows, panel.shape[2])
    roomier[:, : panel.shape[1]].copy_(panel)
    return roomier
