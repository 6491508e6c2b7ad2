"""How much of ΔW is the rounding of a stored checkpoint, and which singular values stand above it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import to_host

_FRACTION = {
    torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7,
    torch.float8_e4m3fn: 3, torch.float8_e5m2: 2,
}  # fmt: skip
"""Bits after the point: numbers of [2^e, 2^(e+1)) are stored 2^(e − bits) apart. What is not here is never rounded."""


MASKED = 0.5
"""Where fewer entries than this share have changed, the update is below storage precision."""


def below_precision(changed: float) -> bool:
    """Whether so few entries differ that the update must have been smaller than the steps in which it is stored."""
    return 0 < changed < MASKED


@dataclass(frozen=True, slots=True)
class Noise:
    """What rounding has left in one ΔW.

    Attributes:
        total_sq: its squared Frobenius norm, as expected.
        edge: singular values below it are noise.
        changed: share of entries that differ, in the rows where any does.
    """

    total_sq: float = 0.0
    edge: float = 0.0
    changed: float = 0.0


def rounding_noise(
    pairs: Sequence[tuple[Tensor, Tensor]], stored: Sequence[torch.dtype], device: torch.device
) -> list[Noise]:
    """What rounding has left in each ΔW.

    Args:
        pairs: W_base and W_tuned, as they were read; a tensor of other than two dimensions has no edge.
        stored: the dtype of each W_tuned in its file, which is not the tensor's where a scale went with it.
        device: where it is computed.
    """
    found = [
        _sums(_matrix(base), _matrix(tuned), dtype, device) for (base, tuned), dtype in zip(pairs, stored, strict=True)
    ]
    noises = []
    for (base, _), (total, row, column, changed) in zip(
        pairs, to_host(torch.stack(found)) if found else [], strict=True
    ):
        noises.append(Noise(total, math.sqrt(row) + math.sqrt(column) if base.ndim == 2 else 0.0, changed))
    return noises


def _matrix(tensor: Tensor) -> Tensor:
    return tensor if tensor.ndim == 2 else tensor.reshape(1, -1)


def _sums(base: Tensor, tuned: Tensor, stored: torch.dtype, device: torch.device) -> Tensor:
    """(4,) float64 on the device: Σ of the variances, the largest of their row and of their column sums, and the share changed.

    Args:
        base, tuned: (d, k), as they are stored.
        device: where it is computed.
    """
    if stored not in _FRACTION or not tuned.numel():
        return torch.zeros(4, dtype=torch.float64, device=device)
    after = tuned.to(device).float()
    differs = base.to(device).float() != after
    touched = differs.any(dim=1, keepdim=True)
    powers = (after.view(torch.int32) & 0x7F800000).view(torch.float32)
    variances = (powers * 2.0 ** -_FRACTION[stored]).square() / 12 * touched
    rows, columns = variances.sum(dim=1, dtype=torch.float64), variances.sum(dim=0, dtype=torch.float64)
    share = differs.sum() / (touched.sum() * tuned.shape[1]).clamp_min(1)
    return torch.stack([rows.sum(), rows.amax(), columns.amax(), share.double()])
