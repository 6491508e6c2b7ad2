"""From factors, rounded once, and checkpoints to the tensors that are written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from phlora_pipeline import convolutions, experts
from phlora_pipeline.adapter.slots import Kept, Side, Slot
from phlora_pipeline.checkpoint import read_tensors
from phlora_pipeline.plan import TensorPair


def fill(slot: Slot, factor: Tensor | None, rank: int, dtype: torch.dtype) -> Tensor:
    """The slot's tensor: the factor cut to `rank`, rounded once, turned if need be, padded with zeros.

    Args:
        slot: where it goes.
        factor: A (q, k) or B (d, q) float32, or None for zeros.
        rank: of the factors that are kept, at most the slot's.
        dtype: of the adapter.

    Returns:
        Contiguous, of the slot's shape.
    """
    if slot.alpha is not None:
        return torch.tensor(slot.alpha, dtype=dtype)
    filled = torch.zeros((slot.shape[0], math.prod(slot.shape[1:])), dtype=dtype)
    if factor is not None:
        kept = round_factor(cut(factor, slot.side, rank), dtype)
        kept = kept.mT if slot.transposed else kept
        filled[: kept.shape[0], : kept.shape[1]] = kept
    return filled.reshape(slot.shape)


def keep(item: Kept) -> Tensor:
    """The tensor itself, read from the checkpoints."""
    if item.tuned is None:
        return torch.zeros(item.shape)
    if item.base is None:
        return read_tensors([item.tuned])[0]
    tuned, base = read_tensors([item.tuned, item.base])
    return tuned.float() - base.float()


def fill_stack(slot: Slot, factors: Iterable[Tensor | None], rank: int, dtype: torch.dtype) -> Tensor:
    """The same of a stack: one factor for each expert, or group of a convolution, in order."""
    filled = torch.zeros(slot.shape, dtype=dtype)
    of_one = convolutions.of_one if slot.grouped else experts.of_one
    for number, factor in enumerate(factors):
        one = of_one(filled, number, len(slot.stack), down=(slot.side == "A") != slot.transposed)
        of_each = min(rank, one.shape[0 if slot.side == "A" else 1]) if slot.grouped else rank
        one.copy_(fill(replace(slot, shape=(one.shape[0], one.shape[1]), stack=()), factor, of_each, dtype))
    return filled


def cut(factor: Tensor, side: Side, rank: int) -> Tensor:
    """The factor at a smaller rank: the first rows of A (r, k), or the first columns of B (d, r)."""
    return factor[:rank] if side == "A" else factor[:, :rank]


def round_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor in the adapter's dtype; the one rounding between the solver and the file."""
    return factor.to(dtype)


def pick_dtype(asked: str, pairs: Sequence[TensorPair]) -> str:
    """`float32`, `bfloat16` or `float16`: what was asked for, or for `auto` the fine-tune's dtype where that has 16 bits.

    A checkpoint of several dtypes counts as that of most of its adapted entries.
    """
    return asked if asked != "auto" else dtype_of_most((pair.tuned.dtype, pair.numel) for pair in pairs)


def dtype_of_most(tensors: Iterable[tuple[str, int]]) -> str:
    """What most of the entries are stored in, of these dtypes and numbers of entries: float32 unless that has 16 bits."""
    entries: dict[str, int] = {}
    for dtype, numel in tensors:
        entries[dtype] = entries.get(dtype, 0) + numel
    most = max(sorted(entries), key=lambda name: entries[name])
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")
