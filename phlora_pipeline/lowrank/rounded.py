"""A large ΔW once more in low precision, as the products that look for a subspace are fastest on a processor.

Its libraries pack the matrix anew in every product with a thin panel, which takes as long as the product itself, but for one
case: (matrix)·(panelᵀ), the matrix first and its rows whole. So it lies here both ways, as it is and transposed, and products
with either side go along rows. Rows end in zeros: rows that lie a multiple of 4096 bytes apart, as those of most weights do,
share a few sets of the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

PADDING = 32
"""Zeros that every row ends in: 64 bytes of bfloat16."""

_WORTH = range(1 << 22, (1 << 24) + 1)
"""Entries of a matrix that gains: of fewer the copy takes longer than it saves; more are done on all threads, which pack together."""


class BothWays:
    """One ΔW (d, k), and its transpose.

    Attributes:
        matrix: (1, d, k), to be written; then `settle`.
    """

    def __init__(self, rows: Tensor, columns: Tensor) -> None:
        """Take memory.

        Args:
            rows: (d + PADDING, k + PADDING), contiguous, whatever it holds.
            columns: (k + PADDING, d + PADDING), likewise.
        """
        self._rows, self._columns = rows, columns
        rows[-PADDING:] = 0
        rows[:, -PADDING:] = 0
        self.matrix = rows[:-PADDING, :-PADDING].unsqueeze(0)

    def settle(self) -> None:
        """Transpose it, padding and all: torch does that block by block only where both tensors are contiguous."""
        self._columns.copy_(self._rows.mT)

    def along_rows(self, panel: Tensor) -> Tensor:
        """Panel·ΔWᵀ: (1, l, k) → (1, l, d) float32."""
        return _along(self._rows, panel)

    def along_columns(self, panel: Tensor) -> Tensor:
        """Panel·ΔW: (1, l, d) → (1, l, k) float32."""
        return _along(self._columns, panel)

    def pick(self, rows: list[int]) -> BothWays:  # there is one matrix, and it is picked
        """Itself."""
        return self


def both_ways(d: int, k: int, device: str) -> bool:
    """Whether a matrix of this shape is worth it."""
    return device == "cpu" and d * k in _WORTH


def _along(rows: Tensor, panel: Tensor) -> Tensor:
    [narrow] = panel
    wide = torch.zeros(len(narrow), rows.shape[1], dtype=rows.dtype)
    wide[:, :-PADDING].copy_(narrow)
    found = rows[:-PADDING] @ wide.mT  # (d, l)
    return torch.empty(1, *found.mT.shape).copy_(found.mT)
