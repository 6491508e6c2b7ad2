"""What adapters do to one tensor of the base: products that are added to its rows, or another tensor in its place.

A tensor is seen as a matrix of rows here, whatever its dimensions: a kernel (d, k₁, k₂ …) as (d, k₁k₂…), a stack of experts
(E, d, k) as (E·d, k), a bias (d) as (d, 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.checkpoint import TORCH_DTYPES, TensorRef, read_tensors
from phlora_pipeline.errors import RequestError
from phlora_pipeline.quantised import FP8

BLOCK = 8 << 20
"""Entries that are summed at once: whole rows of a tensor, so that memory does not grow with it."""

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})

Read = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Product:
    """A low-rank update of some rows.

    Attributes:
        first, rows: which rows of the tensor.
        read: gives (rows, r) and (r, width), float32, in the orientation of the tensor.
        scale: what their product is multiplied by, an adapter's weight included.
    """

    first: int
    rows: int
    read: Read
    scale: float


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor that an adapter keeps whole, in the base's place.

    Attributes:
        ref: where it is.
        weight: 1 puts it there as it is; any other goes that far from the base's rows towards it. Rows that the base does
            not have are put there as they are.
    """

    ref: TensorRef
    weight: float


@dataclass(frozen=True, slots=True)
class Change:
    """All that happens to one tensor.

    Attributes:
        shape: of the merged tensor; only a vocabulary has another number of rows than the base's.
        width: of its rows.
        products: by their first row.
        whole: what takes its place; products are added to that.
    """

    shape: tuple[int, ...]
    width: int
    products: tuple[Product, ...] = ()
    whole: Whole | None = None


def merged(ref: TensorRef, change: Change, dtype: torch.dtype, block: int = BLOCK) -> Iterator[Tensor]:
    """The merged tensor's rows in order, some at a time, summed in float32 (float64 stays) and rounded once.

    Args:
        ref: the base's tensor.
        change: what is done to it.
        dtype: to round to.
        block: entries at a time.

    Raises:
        RequestError: a sum is not finite in that dtype.
    """
    total, step = math.prod(change.shape) // change.width, max(1, block // change.width)
    factors: dict[int, tuple[Tensor, Tensor]] = {}
    for first in range(0, total, step):
        last = min(first + step, total)
        rows = _before(ref, change, first, last)
        for number, product in enumerate(change.products):
            start, stop = max(first, product.first), min(last, product.first + product.rows)
            if start < stop:
                left, right = factors[number] = factors.get(number) or product.read()
                _add(
                    rows[start - first : stop - first],
                    left[start - product.first : stop - product.first],
                    right,
                    product,
                )
            if stop == product.first + product.rows:
                factors.pop(number, None)
        yield _rounded(ref, rows, first, dtype)


def _add(rows: Tensor, left: Tensor, right: Tensor, product: Product) -> None:
    # A zero pair completes a family and changes nothing, not even the sign of a zero.
    if left.any() and right.any():
        rows.addmm_(left.to(rows.dtype), right.to(rows.dtype), alpha=product.scale)


def _before(ref: TensorRef, change: Change, first: int, last: int) -> Tensor:
    """Rows as they are before anything is added: the base's, or what takes their place."""
    # What counts (a norm's batches, positions) is taken as it is: nothing is added to it.
    wide = torch.float64 if ref.dtype == "F64" else torch.float32 if ref.dtype in FLOATS | FP8 else stored(ref.dtype)
    width, whole = change.width, change.whole
    if whole is None:
        return read_tensors([ref.entries(first * width, last * width)])[0].to(wide).view(-1, width)
    rows = read_tensors([whole.ref.entries(first * width, last * width)])[0].to(wide).view(-1, width)
    shared = min(last, math.prod(ref.shape) // width)
    if whole.weight != 1 and first < shared and wide.is_floating_point:
        base = read_tensors([ref.entries(first * width, shared * width)])[0].to(wide).view(-1, width)
        rows[: shared - first] = torch.lerp(base, rows[: shared - first], whole.weight)
    return rows


def _rounded(ref: TensorRef, rows: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    rounded = rows.to(dtype)
    if not torch.isfinite(rounded).all():
        bad = int((~torch.isfinite(rounded)).nonzero()[0, 0]) + first
        raise RequestError(
            f"the merged {ref.name} is not finite in {str(dtype).removeprefix('torch.')}: first in row {bad}",
            remedy="see whether the base is finite there; if it is, merge with --dtype bfloat16 or --dtype float32",
        )
    return rounded


def stored(dtype: str) -> torch.dtype:
    """Torch's name of safetensors'."""
    return TORCH_DTYPES[dtype]
