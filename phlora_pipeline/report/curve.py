"""Preserved energy against rank: the paper's Figure 1, over the layers of one model. Pure."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from phlora_pipeline.manifest import EnergyRow

RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Where a curve is drawn: close enough for a line on a logarithmic axis."""


@dataclass(frozen=True, slots=True)
class EnergyCurve:
    """E_r of eq. 5 against r. All shares lie between 0 and 1.

    Attributes:
        ranks: ascending; only ranks at which E_r is known for every tensor: nothing is extrapolated.
        mean: over the tensors, each counted once, as in the paper.
        lower, upper: quartiles over the tensors.
        total: of the update as a whole: Σ E_r·‖ΔW‖² / Σ ‖ΔW‖².
        tensors: how many there are.
        least_ranks, least: beyond `ranks`, where some spectra were cut: the mean if these keep no more than is known of them.
    """

    ranks: tuple[int, ...] = ()
    mean: tuple[float, ...] = ()
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()
    total: tuple[float, ...] = ()
    tensors: int = 0
    least_ranks: tuple[int, ...] = ()
    least: tuple[float, ...] = ()

    def at(self, rank: int) -> float | None:
        """The mean at a rank; None where it is not known."""
        return dict(zip(self.ranks, self.mean, strict=True)).get(rank)


def factored(rows: Sequence[EnergyRow]) -> list[EnergyRow]:
    """The rows whose spectrum is known: a tied output has none of its own, and what is left out has none at all."""
    return [row for row in rows if row.singular_values and row.delta_norm]


def smaller_side(row: EnergyRow) -> int:
    """The largest rank that the update can have: min(d, k), a kernel counted among k."""
    return min(row.shape[0], math.prod(row.shape[1:]))


def shares(row: EnergyRow) -> list[float]:
    """E_1, E_2, … as far as they are known."""
    total = (row.delta_norm or 0.0) ** 2
    squares = (value * value for value in row.singular_values or ())
    return [min(kept / total, 1.0) for kept in itertools.accumulate(squares)]


def known_to(rows: Sequence[EnergyRow]) -> int:
    """The largest rank at which E_r is known for all of these rows; 0 where there are none.

    A tensor whose singular values are all there stays at E_r = 1 beyond its last.
    """
    cut = [len(row.singular_values or ()) for row in rows if len(row.singular_values or ()) < smaller_side(row)]
    whole = [smaller_side(row) for row in rows]
    return min(cut) if cut else max(whole, default=0)


def energy_curve(rows: Sequence[EnergyRow], ranks: Sequence[int] = ()) -> EnergyCurve:
    """Preserved energy against rank, over the adapted tensors of a model.

    Args:
        rows: of a manifest.
        ranks: where it is wanted; by default 1 to 512 on a logarithmic scale. Those that are not known are left out.

    >>> row = EnergyRow("", "a", "a", "mlp", (4, 2), "F32", "F32", "adapted", delta_norm=5.0, singular_values=(4.0, 3.0))
    >>> energy_curve([row]).mean, energy_curve([row], [1]).total
    ((0.64, 1.0), (0.64,))
    """
    used = factored(rows)
    most = known_to(used)
    longest = max((len(row.singular_values or ()) for row in used), default=0)
    asked = ranks or (*RANKS, most, longest)
    wanted = sorted({rank for rank in asked if 1 <= rank <= most})
    beyond = tuple(sorted({rank for rank in asked if most < rank <= longest}))
    kept = [shares(row) for row in used]
    least = tuple(statistics.fmean(at(each, rank) for each in kept) for rank in beyond)
    if not wanted:
        return EnergyCurve(tensors=len(used), least_ranks=beyond, least=least)
    table = [[at(each, rank) for rank in wanted] for each in kept]
    weights = [(row.delta_norm or 0.0) ** 2 for row in used]
    columns = list(zip(*table, strict=True))
    bands = [_quartiles(column) for column in columns]
    return EnergyCurve(
        tuple(wanted),
        tuple(statistics.fmean(column) for column in columns),
        tuple(low for low, _ in bands),
        tuple(high for _, high in bands),
        tuple(_weighted(column, weights) for column in columns),
        len(used),
        beyond,
        least,
    )


def crowd(curves: Sequence[EnergyCurve]) -> list[tuple[int, float, float, float]]:
    """Of several models: rank, lower quartile, median and upper quartile of their means, at the ranks that are known of all."""
    ranks = sorted(set.intersection(*(set(curve.ranks) for curve in curves))) if len(curves) > 1 else []
    told = []
    for rank in ranks:
        means = [curve.at(rank) or 0.0 for curve in curves]
        low, middle, high = statistics.quantiles(means, n=4, method="inclusive")
        told.append((rank, low, middle, high))
    return told


def at(each: Sequence[float], rank: int) -> float:
    """E_r of a tensor whose shares these are; beyond the last there is nothing more to keep."""
    return each[min(rank, len(each)) - 1]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / math.fsum(weights)
