"""How much of ΔW is the rounding of a stored checkpoint, and which singular values stand above it.

A fine-tune is W_base + U, rounded to numbers that lie a step q apart: 2^(e−7) for an entry of bfloat16 in [2^e, 2^(e+1)). Entries
of one step are a *class*; p is the share of a class that has changed at all, and p alone says what rounding has done to it.

- Where U is coarse beside q, or W_base has bits that the fine-tune cannot store, nearly all change, and the error is uniform:
  ΔW = U + noise of variance q²/12, whether the entry has changed or not.
- Where U is fine beside q and W_base is itself such a number, few entries change, and those by a whole step: the class keeps a
  part φ of its U, and the noise is φ·q²/12. For Gaussian U, φ = 1 − exp(−12p) gives both to 3 % from p = 0.05 on. Classes
  that keep different parts scatter what they keep: noise again, of variance (φ − mean φ)²·s² for U of variance s² per entry.

The base's own rounding is no noise: an adapter is put on this very base. It is one only where the base is stored more coarsely
and differences are as large as its steps would make them, since then somebody has rounded what the fine-tune started from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from phlora_pipeline.lowrank.beside import side_by_side
from phlora_pipeline.lowrank.delta import to_host

MASKED = 0.5
"""Where a smaller share of the entries has changed, the update is below storage precision."""

_FRACTION = {
    torch.float64: 52, torch.float32: 23, torch.float16: 10, torch.bfloat16: 7,
    torch.float8_e4m3fn: 3, torch.float8_e5m2: 2,
}  # fmt: skip
"""Bits after the point: numbers of [2^e, 2^(e+1)) are stored 2^(e − bits) apart. What is not here is never rounded."""

_LEAST = {torch.float16: 2.0**-24, torch.float8_e4m3fn: 2.0**-9, torch.float8_e5m2: 2.0**-16}
"""Steps of numbers near zero, of which there are many in a weight."""

_SAMPLE = 1 << 17
"""Entries that are looked at of whole columns, and as many of whole rows. Sums and the edge are right to a few per cent of
themselves where an entry's size is its row's times its column's times chance."""

_STRIPE, _STRIPES = 16, 2
"""Neighbouring rows, or columns, that are taken together, since they share cache lines; and how many such, at least."""

_SINGLE = 32
"""Rows and columns whose noise is so large that each may stick out by itself; there are as many groups of others."""

_TINY = torch.finfo(torch.float64).tiny

_BINADES = 256
"""Classes: the exponents of a float32."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What rounding has left in one ΔW.

    Attributes:
        total_sq: its squared Frobenius norm, as expected.
        edge: singular triplets below it bring B·A further from the update before rounding, not nearer.
        changed: share of entries that differ, in the rows where any does.
    """

    total_sq: float = 0.0
    edge: float = 0.0
    changed: float = 0.0


def below_precision(changed: float) -> bool:
    """Whether so few entries differ that the update must have been smaller than the steps in which it is stored."""
    return 0 < changed < MASKED


def rounding_noise(
    pairs: Sequence[tuple[Tensor, Tensor]], stored: Sequence[tuple[torch.dtype, torch.dtype]]
) -> list[Noise]:
    """What rounding has left in each ΔW; from a sample of its entries, on the processor.

    Args:
        pairs: W_base and W_tuned, as they were read, on any device; a tensor of other than two dimensions gets no edge.
        stored: the dtypes of both in their files, which are not the tensors' where a scale went with them.
    """
    return side_by_side([partial(noise_of, *pair, *dtypes) for pair, dtypes in zip(pairs, stored, strict=True)])


def noise_of(base: Tensor, tuned: Tensor, base_dtype: torch.dtype, dtype: torch.dtype) -> Noise:
    """The same of one ΔW, on the caller's own thread."""
    total, row, column, kept, wider, changed = to_host(_measured(base, tuned, base_dtype, dtype))
    return Noise(total, threshold(row, column, kept) * math.sqrt(wider) if row else 0.0, changed)


def threshold(row: float, column: float, kept: float = 1.0) -> float:
    """The smallest singular value whose triplet is worth keeping, in white noise: Gavish and Donoho's, for a known level.

    With y observed for x true, and c, c' the cosines of both vectors, u·y·vᵀ is nearer to the update x/φ than nothing is where
    y < 2(x/φ)cc' (Gavish and Donoho, 2014, section VI; theirs is φ = 1). Of an update that is mostly lost, φ → 0, all is worth
    keeping that has a direction at all: what is above the noise's own largest singular value, √row + √column.

    Args:
        row, column: sum of the noise's variances over a row, and over a column.
        kept: φ, the part of the update that has come through.

    >>> round(threshold(100.0, 100.0), 4) == round(4 / math.sqrt(3) * 10, 4)
    True
    """
    linear = kept * (row + column)
    x_sq = (linear + math.sqrt(linear**2 + 4 * (4 - kept**2) * row * column)) / (2 * (2 - kept))
    return math.sqrt((x_sq + row) * (x_sq + column) / x_sq)


def _measured(base: Tensor, tuned: Tensor, base_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    """(6,) float64: Σ of the variances, their mean row and column sums, φ, what profiles do to the edge², and the share changed."""
    is_matrix = base.ndim == 2
    if not is_matrix:
        base, tuned = base.reshape(1, -1), tuned.reshape(1, -1)
    d, k = base.shape
    if not base.numel():
        return torch.zeros(6, dtype=torch.float64)
    spread = _spread(k, d)
    before, after = (_taken(side, 1, spread).cpu().float() for side in (base, tuned))
    classes, delta = _classes(after), after - before
    differs = (delta != 0).float()
    touched = differs.amax(dim=1, keepdim=True)
    variances, kept, changed = _by_class(
        classes, delta, differs, touched, _steps(base_dtype, base), _steps(dtype, tuned)
    )
    down = _looked_up(variances, classes) * touched
    if not is_matrix:
        total = down.sum() * (k / after.shape[1])
        return torch.stack([total, 0 * total, 0 * total, kept, torch.ones_like(total), changed])
    # How columns differ, any rows tell: those that have not changed are as large as those that have.
    across = _looked_up(variances, _classes(_taken(tuned, 0, _spread(d, k)).cpu().float()))
    rows, columns = _means(down, k), _means(across.mT, d)
    total = rows.sum() * k * (columns.mean() / _taken(columns.unsqueeze(0), 1, spread).mean().clamp_min(_TINY))
    rows, columns = (means * (total / means.sum().clamp_min(_TINY)) for means in (rows, columns))
    white = ((total / d).sqrt() + (total / k).sqrt()).square().clamp_min(_TINY)
    return torch.stack([total, total / d, total / k, kept, _edge_sq(rows, columns) / white, changed])


def _spread(size: int, across: int) -> int:
    """How many stripes of rows are taken of `size`, or of columns, `across` entries long; 0 for all of them."""
    count = max(_STRIPES, _SAMPLE // (across * _STRIPE))
    return count if count * _STRIPE < size else 0


def _taken(matrix: Tensor, dim: int, count: int) -> Tensor:
    """So many stripes of its rows (dim 0) or columns (dim 1), evenly spread."""
    if not count:
        return matrix
    sizes = list(matrix.shape)
    every = sizes[dim] // count
    sizes[dim : dim + 1] = [count, every]
    stripes = matrix.narrow(dim, 0, count * every).view(sizes).narrow(dim + 1, 0, _STRIPE)
    return stripes.flatten(dim, dim + 1)


def _means(found: Tensor, whole: int) -> Tensor:
    """Means of rows of which only these entries of `whole` were looked at, as far apart as those of all entries would be."""
    seen, means = found.shape[1], found.mean(dim=1)
    by_chance = (found.square().mean() - means.square().mean()) * (1 / seen - 1 / whole)
    apart = (means - means.mean()).square().mean()
    return means.mean() + (means - means.mean()) * (1 - by_chance / apart.clamp_min(_TINY)).clamp(0, 1).sqrt()


def _classes(values: Tensor) -> Tensor:
    """The exponent of each entry, as float32 stores it."""
    return (values.contiguous().view(torch.int32) >> 23) & (_BINADES - 1)


def _looked_up(table: Tensor, classes: Tensor) -> Tensor:
    return torch.index_select(table, 0, classes.reshape(-1)).view(classes.shape)


def _steps(stored: torch.dtype, read: Tensor) -> Tensor:
    """(256,) float64: how far apart the stored numbers of each class are; 0 of what is never rounded.

    Of a weight that was multiplied by a scale the exponents are no longer those of its eight bits: its variance is right on
    the average over scales to a factor of 1.25, and never more than 1.4 times too large.
    """
    if stored not in _FRACTION:
        return torch.zeros(_BINADES, dtype=torch.float64)
    steps = torch.exp2(torch.arange(_BINADES, dtype=torch.float64) - (127 + _FRACTION[stored]))
    return steps.clamp_min(_LEAST.get(stored, 0.0)) if read.dtype == stored else steps


def _by_class(
    classes: Tensor, delta: Tensor, differs: Tensor, touched: Tensor, base_steps: Tensor, steps: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The noise's variance in each class (256,), φ, and the share of entries that differ, () each; of the rows touched."""

    def summed(values: Tensor) -> Tensor:
        sums = torch.zeros(_BINADES, dtype=torch.float64)
        return sums.index_add_(0, classes.reshape(-1), values.reshape(-1).double())

    count, differ, delta_sq = summed(touched.expand_as(delta)), summed(differs), summed(delta.double().square())
    rounding, base_rounding = steps.square() / 12, base_steps.square() / 12
    number = count.sum().clamp_min(1)
    passes = 1 - torch.exp(-12 * differ / count.clamp_min(1))
    rounding = rounding * passes + base_rounding * _starts_elsewhere(count, delta_sq, rounding, base_rounding)
    kept = (count * passes).sum() / number
    left_sq = (delta_sq.sum() - (count * rounding).sum()).clamp_min(0)  # of U
    s_sq = left_sq / (count * passes.square()).sum().clamp_min(_TINY)
    return rounding + (passes - kept).square() * s_sq, kept, differ.sum() / number


def _starts_elsewhere(count: Tensor, delta_sq: Tensor, rounding: Tensor, base_rounding: Tensor) -> Tensor:
    """Whether ΔW has the base's rounding in it, too: its mean square grows from class to class as that would make it.

    An update that knows nothing of the base's steps has the same mean square in every class: the slope is 0 without that
    rounding, and 1 with it. Where it would be lost in the update, nobody asks.
    """
    share = count / count.sum().clamp_min(1)
    mean = (share * base_rounding).sum()
    spread = share * (base_rounding - mean)
    rise = (spread * delta_sq / count.clamp_min(1)).sum()
    coarser = (share * rounding).sum() < mean
    return (
        coarser
        & (mean > 0.05 * delta_sq.sum() / count.sum().clamp_min(1))
        & (rise > 0.5 * (spread * base_rounding).sum())
    )


def _edge_sq(rows: Tensor, columns: Tensor) -> Tensor:
    """The largest squared singular value of noise with these sums of variances, an entry's being its row's times its column's.

    Beyond the edge z = z(p) solves p = Σ aᵢ/(z − T(p)·aᵢ)/k with T(p) = Σ bⱼ/(1 − p·bⱼ)/k, for a the rows' sums and b the
    columns' over their mean; the edge is the least z (Couillet and Hachem, 2014): (√row + √column)² where all are alike.
    """
    k = len(columns)
    a, rows_each = _thinned(rows)
    b, columns_each = _thinned(columns / columns.mean().clamp_min(_TINY))
    nearer = 1 - torch.logspace(math.log10(0.98), -2.5, 24, dtype=torch.float64).unsqueeze(1)
    p = nearer / b.max().clamp_min(_TINY)
    T = (columns_each * b / (1 - p * b)).sum(dim=1, keepdim=True) / k
    weights, largest = rows_each * a / k, a.argmax().view(1)
    z = (
        T * a.index_select(0, largest) + weights.index_select(0, largest) / p
    )  # not beyond the root: the sum is more than its largest term
    for _ in range(12):  # Newton's steps for 1/Σ = 1/p, which is nearly straight
        apart = (z - T * a).clamp_min(_TINY)
        total = (weights / apart).sum(dim=1, keepdim=True).clamp_min(_TINY)
        slope = (weights / apart.square()).sum(dim=1, keepdim=True).clamp_min(_TINY)
        z = z + (1 / p - 1 / total) * total.square() / slope
    return z.min()


def _thinned(values: Tensor) -> tuple[Tensor, Tensor]:
    """Fewer values, and how many each stands for: the largest ones for themselves, others for their neighbours in size."""
    if len(values) <= 2 * _SINGLE:
        return values, torch.ones_like(values)
    ordered = values.sort(descending=True).values
    single, others = ordered[:_SINGLE], ordered[_SINGLE:].tensor_split(_SINGLE)
    counts = torch.tensor([1.0] * _SINGLE + [float(len(group)) for group in others], dtype=values.dtype)
    return torch.cat([single, torch.stack([group.mean() for group in others])]), counts
