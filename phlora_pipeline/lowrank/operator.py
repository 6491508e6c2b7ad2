"""ΔW as the solvers see it: products with thin panels, in low precision for finding a subspace, in float32 for using it.

Solvers work on `D`, which is ΔW or its transpose, whichever has the fewer rows: (b, m, n) with m ≤ n. Panels are stacks of
rows: (b, l, m) lives on the *short* side, (b, l, n) on the *long* one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import CHUNK, distance_sq, form_delta, scale_, sum_of_squares, to_host

_ONEDNN = hasattr(torch.ops.mkldnn, "_linear_pointwise")

LOW_UNIT = 2.0**-8
"""Unit roundoff of bfloat16: half of the distance of 1 to the next number."""


class Operator(Protocol):
    """D (b, m, n), known by its products.

    Attributes:
        shape: (b, m, n), m ≤ n.
        turned: whether D is ΔWᵀ.
        low_unit: unit roundoff of the low-precision products; 0 where they are float32, too.
        device: where panels live.
    """

    shape: tuple[int, int, int]
    turned: bool
    low_unit: float
    device: torch.device

    def to_short(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        """Panel·Dᵀ: (b, l, n) → (b, l, m) float32."""

    def to_long(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        """Panel·D: (b, l, m) → (b, l, n) float32."""

    def gram(self, dtype: torch.dtype) -> Tensor:
        """D·Dᵀ (b, m, m)."""

    def dense(self) -> Tensor:
        """ΔW (b, d, k) float32 as a whole; the caller may overwrite it."""

    def residual_sq(self, row: int, short: Tensor, long: Tensor) -> Tensor:
        """‖D − shortᵀ·long‖_F² of one matrix, from all its entries: short (q, m), long (q, n); () float64."""

    def roundings(self, norms_sq: Sequence[float]) -> list[float]:
        """At least ‖E‖_F of each matrix, E being what the low-precision products' D is off by; norms_sq: ‖D‖_F²."""

    def pick(self, rows: list[int]) -> Operator:
        """The operator of some matrices of the batch."""


class _Sliced:
    """What takes D a slice along its long side at a time."""

    shape: tuple[int, int, int]
    device: torch.device

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of D, and D there: (b, m, width) float32."""
        raise NotImplementedError

    def gram(self, dtype: torch.dtype) -> Tensor:
        b, m, _ = self.shape
        total = torch.zeros(b, m, m, dtype=dtype, device=self.device)
        for _, D in self.slices():
            part = D.to(dtype)
            total.baddbmm_(part, part.mT)
        return total

    def residual_sq(self, row: int, short: Tensor, long: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for columns, D in self.slices():
            total += sum_of_squares(torch.addmm(D[row], short.mT, long[:, columns], alpha=-1))
        return total


class Rounded(Protocol):
    """ΔW in low precision.

    Attributes:
        matrix: (b, d, k).
    """

    matrix: Tensor

    def along_rows(self, panel: Tensor) -> Tensor:
        """Panel·ΔWᵀ: (b, l, k) → (b, l, d) float32."""

    def along_columns(self, panel: Tensor) -> Tensor:
        """Panel·ΔW: (b, l, d) → (b, l, k) float32."""

    def pick(self, rows: list[int]) -> Rounded:
        """Some matrices of the batch."""


class Plain:
    """ΔW in low precision as it is: (b, d, k)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def along_rows(self, panel: Tensor) -> Tensor:
        return product(panel.to(self.matrix.dtype), self.matrix.mT).float()

    def along_columns(self, panel: Tensor) -> Tensor:
        return product(panel.to(self.matrix.dtype), self.matrix).float()

    def pick(self, rows: list[int]) -> Plain:
        return Plain(self.matrix[rows])


class Dense(_Sliced):
    """ΔW resident in float32, and once more in the low precision, where there is one."""

    def __init__(
        self, delta: Tensor, low: torch.dtype, rounded: Rounded | None = None, errors: Sequence[float] | None = None
    ) -> None:
        """Take a batch.

        Args:
            delta: (b, d, k) float32.
            low: dtype of the low-precision products: bfloat16 or float32.
            rounded: ΔW in that dtype, where it is at hand.
            errors: ‖ΔW − rounded‖_F of each, where it is known.
        """
        b, d, k = delta.shape
        self.turned = d > k
        self.shape = (b, min(d, k), max(d, k))
        self.device = delta.device
        self.low_unit = 0.0 if low == torch.float32 else LOW_UNIT
        self._delta, self._low, self._H = delta, low, rounded
        self._errors = errors
        self._D = delta.mT if self.turned else delta

    def to_short(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        if precise or not self.low_unit:
            return apply(panel, self._D)
        return self._rounded().along_columns(panel) if self.turned else self._rounded().along_rows(panel)

    def to_long(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        if precise or not self.low_unit:
            return apply(panel, self._D.mT)
        return self._rounded().along_rows(panel) if self.turned else self._rounded().along_columns(panel)

    def _rounded(self) -> Rounded:
        if self._H is None:  # only the routes that look for a subspace need it
            self._H = Plain(self._delta.to(self._low))
        return self._H

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        _, m, n = self.shape
        width = max(1, CHUNK // m)
        for start in range(0, n, width):
            columns = slice(start, start + width)
            yield columns, self._D[..., columns]

    def dense(self) -> Tensor:
        return self._delta

    def roundings(self, norms_sq: Sequence[float]) -> list[float]:
        if not self.low_unit:
            return [0.0] * len(norms_sq)
        if self._errors is not None:
            return list(self._errors)
        pairs = zip(self._delta, self._rounded().matrix, strict=True)
        errors: list[float] = to_host(torch.stack([distance_sq(*pair) for pair in pairs]).sqrt())
        return errors

    def pick(self, rows: list[int]) -> Dense:
        if rows == list(range(self.shape[0])):
            return self
        errors = None if self._errors is None else [self._errors[row] for row in rows]
        return Dense(self._delta[rows], self._low, None if self._H is None else self._H.pick(rows), errors)


class Blocked(_Sliced):
    """One ΔW that is never resident in float32: slices along its long side are formed anew in every product.

    It costs more time and next to no memory of the device, for a tensor that does not fit there.

    Attributes:
        exponent: ΔW is multiplied by 2^exponent.
    """

    def __init__(self, base: Tensor, tuned: Tensor, device: torch.device, low: torch.dtype) -> None:
        """Take one pair.

        Args:
            base, tuned: (d, k), in their stored dtypes, on the CPU.
            device: where the products are done.
            low: as for `Dense`.
        """
        d, k = base.shape
        self.turned = d > k
        self.shape = (1, min(d, k), max(d, k))
        self.device = device
        self.low_unit = 0.0 if low == torch.float32 else LOW_UNIT
        self.exponent = 0
        self._base, self._tuned, self._low = base, tuned, low

    def sums(self) -> Tensor:
        """As `form_delta` returns them."""
        return torch.stack([sums for _, _, sums in self._formed()]).sum(dim=0)

    def to_short(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        total = torch.zeros(1, panel.shape[1], self.shape[1], device=self.device)
        for columns, D in self.slices():
            total += _maybe_low(panel[..., columns], D.mT, self._low if self.low_unit and not precise else None)
        return total

    def to_long(self, panel: Tensor, *, precise: bool = False) -> Tensor:
        low = self._low if self.low_unit and not precise else None
        return torch.cat([_maybe_low(panel, D, low) for _, D in self.slices()], dim=-1)

    def dense(self) -> Tensor:
        delta = torch.empty(self._base.shape, dtype=torch.float32, device=self.device)
        form_delta(self._base, self._tuned, delta)
        return scale_(delta, self.exponent).unsqueeze(0)

    def roundings(self, norms_sq: Sequence[float]) -> list[float]:
        return [self.low_unit * math.sqrt(norm_sq) for norm_sq in norms_sq]

    def pick(self, rows: list[int]) -> Blocked:  # there is one matrix, and it is picked
        return self

    def slices(self) -> Iterator[tuple[slice, Tensor]]:
        return ((columns, D) for columns, D, _ in self._formed())

    def _formed(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        _, m, n = self.shape
        width = max(1, 4 * CHUNK // m)
        # What comes back from a GPU is waited for: it would be read before it is there.
        away = self.device.type != "cpu"
        for start in range(0, n, width):
            columns = slice(start, min(start + width, n))
            at = columns if self.turned else (slice(None), columns)
            base, tuned = (
                side[at].contiguous().to(self.device, non_blocking=away) for side in (self._base, self._tuned)
            )
            part = torch.empty(base.shape, dtype=torch.float32, device=self.device)
            sums = form_delta(base, tuned, part)
            scale_(part, self.exponent)
            yield columns, (part.mT if self.turned else part).unsqueeze(0), sums


def apply(panel: Tensor, weight: Tensor) -> Tensor:
    """Panel·weightᵀ, (b, l, j) × (b, i, j) → (b, l, i), as a linear layer does it."""
    if panel.device.type == "cpu" and panel.dtype == torch.float32 and len(panel) == 1 and _ONEDNN:
        # Thin float32 panels: torch's own products take BLAS, and oneDNN is 1.4 times as fast where that is MKL on an AMD.
        applied: Tensor = torch.ops.mkldnn._linear_pointwise(panel[0], weight[0], None, "none", [], "")  # noqa: SLF001
        return applied.unsqueeze(0)
    return product(panel, weight.mT)


def product(left: Tensor, right: Tensor) -> Tensor:
    """(b, i, j) × (b, j, k); a batch of one goes the way of plain matrices, which processors have better kernels for."""
    return (left[0] @ right[0]).unsqueeze(0) if len(left) == 1 else left @ right


def gram(panel: Tensor) -> Tensor:
    """P·Pᵀ (b, l, l) in float64, through temporaries of `CHUNK` elements at most."""
    b, rows, columns = panel.shape
    total = torch.zeros(b, rows, rows, dtype=torch.float64, device=panel.device)
    width = max(1, CHUNK // max(1, b * rows))
    for start in range(0, columns, width):
        part = panel[..., start : start + width].double()
        total += product(part, part.mT)
    return total


def slice_bytes(m: int) -> int:
    """Bytes on the device of one slice of `Blocked`, with its temporaries."""
    return 80 * max(m, CHUNK)


def _maybe_low(panel: Tensor, D: Tensor, low: torch.dtype | None) -> Tensor:
    return product(panel, D) if low is None else product(panel.to(low), D.to(low)).float()
