"""What an adapter would weigh and keep, by the ways of choosing ranks: fixed, a threshold of energy, the noise edge, a budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.report.curve import at, factored, known_to, shares

FIXED = (8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
_FRONTIER = 60

Way = Literal["this adapter", "fixed rank", "energy", "noise edge"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank for each tensor, and what comes of it.

    Attributes:
        way: how the ranks are chosen.
        label: in short: `rank 32`, `90 %`.
        ranks: the smallest and the largest of them.
        nbytes: of the factors, each at its own rank.
        energy: share of the adapted tensors' ‖ΔW‖² that they keep.
        capped: tensors in which the threshold is not reached at the largest rank that is known.
    """

    way: Way
    label: str
    ranks: tuple[int, int]
    nbytes: int
    energy: float
    capped: int = 0


@dataclass(frozen=True, slots=True)
class TradeOff:
    """Size against energy.

    Attributes:
        element_bytes: of the factors' dtype.
        uniform: (bytes, energy) at one rank for all, rising.
        best: (bytes, energy) where each tensor has the rank that keeps most for the size.
        choices: what the policies pick.
    """

    element_bytes: int
    uniform: tuple[tuple[int, float], ...]
    best: tuple[tuple[int, float], ...]
    choices: tuple[Choice, ...]


@dataclass(frozen=True, slots=True)
class _Tensor:
    step: int  # parameters of one more rank: d + k
    weight: float  # ‖ΔW‖²
    shares: list[float]  # E_1, E_2, …
    squares: list[float]  # σ_1², σ_2², …
    edge: float | None
    rank: int | None


def trade_off(rows: Sequence[EnergyRow], *, element_bytes: int) -> TradeOff:
    """The lines and the points of a model.

    Args:
        rows: of its manifest.
        element_bytes: of one entry of a factor.
    """
    used = factored(rows)
    tensors = [_of(row) for row in used]
    if not tensors:
        return TradeOff(element_bytes, (), (), ())
    most = known_to(used)
    ladder = sorted({rank for rank in (*FIXED, 1, 2, 4, 12, 24, 48, 96, 192, 384, most) if rank <= most})

    def choice(way: Way, label: str, ranks: Sequence[int], capped: int = 0) -> Choice:
        return Choice(way, label, (min(ranks), max(ranks)), *_outcome(tensors, ranks, element_bytes), capped)

    def fixed(rank: int) -> Choice:
        return choice("fixed rank", f"rank {rank}", [min(rank, len(tensor.shares)) for tensor in tensors])

    uniform = [fixed(rank) for rank in ladder]
    found = [item for item, rank in zip(uniform, ladder, strict=True) if rank in FIXED]
    for share in THRESHOLDS:
        picked = [rank_for(tensor.shares, share) for tensor in tensors]
        capped = sum(rank is None for rank in picked)
        if capped <= len(tensors) // 2:  # of the others it says nothing but where the spectra were cut
            ranks = [rank or len(tensor.shares) for rank, tensor in zip(picked, tensors, strict=True)]
            found.append(choice("energy", f"{100 * share:.0f} %", ranks, capped))
    if any(tensor.edge is not None for tensor in tensors):
        found.append(choice("noise edge", "noise edge", [_above(tensor) for tensor in tensors]))
    if all(tensor.rank is not None for tensor in tensors):
        found.append(choice("this adapter", "this adapter", [tensor.rank or 0 for tensor in tensors]))
    return TradeOff(
        element_bytes,
        tuple((item.nbytes, item.energy) for item in uniform),
        _best(tensors, element_bytes),
        tuple(found),
    )


def rank_for(each: Sequence[float], share: float) -> int | None:
    """The smallest rank that keeps this share; None where none that is known does.

    >>> rank_for([0.5, 0.9, 1.0], 0.9), rank_for([0.5, 0.6], 0.9)
    (2, None)
    """
    return next((rank for rank, kept in enumerate(each, 1) if kept >= share), None)


def noise_edge(row: EnergyRow) -> float | None:
    """The largest singular value that rounding alone would give: what stands below it may be noise; None where it is not known."""
    told = getattr(row, "noise_edge", None)
    if told is not None or not row.noise_energy:
        return told
    d, k = row.shape[0], math.prod(row.shape[1:])
    noise = row.noise_energy * (row.delta_norm or 0.0) ** 2  # the manifest tells its share of ‖ΔW‖²
    return math.sqrt(noise / (d * k)) * (math.sqrt(d) + math.sqrt(k))


def _of(row: EnergyRow) -> _Tensor:
    squares = [value * value for value in row.singular_values or ()]
    step = row.shape[0] + math.prod(row.shape[1:])
    return _Tensor(step, (row.delta_norm or 0.0) ** 2, shares(row), squares, noise_edge(row), row.rank)


def _above(tensor: _Tensor) -> int:
    """Singular values that stand above the edge; all that are known where the edge is not."""
    return sum(square > (tensor.edge or 0.0) ** 2 for square in tensor.squares)


def _outcome(tensors: Sequence[_Tensor], ranks: Sequence[int], element_bytes: int) -> tuple[int, float]:
    nbytes = element_bytes * sum(rank * tensor.step for rank, tensor in zip(ranks, tensors, strict=True))
    kept = math.fsum(
        at(tensor.shares, rank) * tensor.weight for rank, tensor in zip(ranks, tensors, strict=True) if rank
    )
    return nbytes, kept / math.fsum(tensor.weight for tensor in tensors)


def _best(tensors: Sequence[_Tensor], element_bytes: int) -> tuple[tuple[int, float], ...]:
    """Singular values by σ²/(d + k): wherever one stops, no other choice of that size keeps more."""
    items = sorted(
        ((square / tensor.step, square, tensor.step) for tensor in tensors for square in tensor.squares), reverse=True
    )
    total = math.fsum(tensor.weight for tensor in tensors)
    nbytes, kept, line = 0, 0.0, []
    every = max(1, len(items) // _FRONTIER)
    for number, (_, square, step) in enumerate(items, 1):
        nbytes, kept = nbytes + element_bytes * step, kept + square
        if number % every == 0 or number == len(items):
            line.append((nbytes, min(kept / total, 1.0)))
    return tuple(line)
