"""What was kept and what could have been: both measured in float64 from the stored bf16 weights, whatever a method claims."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from . import pairs

_ROWS = 2048
"""Rows held in float64 at a time."""


def captured(base: Tensor, tuned: Tensor, A: Tensor, B: Tensor) -> float:
    """(‖ΔW‖_F² − ‖ΔW − BA‖_F²) / ‖ΔW‖_F² in float64.

    Args:
        base, tuned: (d, k), any dtype.
        A, B: (r, k) and (d, r), any dtype.
    """
    total = left = 0.0
    wide = A.double()
    for start in range(0, len(base), _ROWS):
        rows = slice(start, start + _ROWS)
        delta = tuned[rows].double() - base[rows].double()
        total += float(delta.square().sum())
        left += float(delta.addmm_(B[rows].double(), wide, alpha=-1).square().sum())
    return (total - left) / total


def optimal(base: Tensor, tuned: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """The largest energy that any factors of these ranks capture (Eckart–Young), from the smaller Gram matrix in float64."""
    turned = base.shape[0] > base.shape[1]
    delta = (tuned.double() - base.double()).mT if turned else tuned.double() - base.double()
    squares = torch.linalg.eigvalsh(delta @ delta.mT).flip(0).clamp_(min=0)
    kept = squares.cumsum(0) / squares.sum()
    return {rank: float(kept[min(rank, len(kept)) - 1]) for rank in ranks}


def known_optimal(root: Path, spectrum: str, base: Tensor, tuned: Tensor, ranks: Sequence[int]) -> dict[int, float]:
    """The same for a pair of `pairs.weight_pair`, kept under `root`: at 4096×4096 it takes most of a minute."""
    d, k = base.shape
    path = root / "truth" / f"{spectrum}-{d}x{k}-{pairs.REVISION}.json"
    known = {int(rank): energy for rank, energy in json.loads(path.read_text()).items()} if path.exists() else {}
    if not set(ranks) <= set(known):
        known |= optimal(base, tuned, ranks)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    return {rank: known[rank] for rank in ranks}
