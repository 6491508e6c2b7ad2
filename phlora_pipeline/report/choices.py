"""What an adapter would weigh and keep by each policy of `ranks`: fixed, a threshold of energy, the noise edge, a budget. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from phlora_pipeline import ranks
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.ranks import Spectrum
from phlora_pipeline.report.curve import factored, known_to, smaller_side

FIXED = (8, 16, 32, 64, 128, 256)
THRESHOLDS = (0.5, 0.8, 0.9, 0.95, 0.99)
BUDGETS = (8, 16, 32, 64)
"""Each is the size of an adapter of this rank: what a budget keeps at equal bytes."""

_FRONTIER = 60
_ROUNDING = 1e-6
"""Manifests have singular values in float32: what stopped at a threshold may read as just short of it."""

_Item = tuple[float, str, int, float]  # −σ²/unit, tensor, unit, σ²

Way = Literal["this adapter", "fixed rank", "energy", "noise edge", "budget"]


@dataclass(frozen=True, slots=True)
class Choice:
    """A rank for each tensor, and what comes of it.

    Attributes:
        way: how the ranks are chosen.
        label: in short: `rank 32`, `90 %`.
        ranks: the smallest and the largest of them.
        nbytes: of the factors, each at its own rank.
        padded_bytes: of the factors, each padded to the largest rank; a tensor of rank 0 has none.
        energy: share of these tensors' ‖ΔW‖² that they keep.
        capped: tensors that need more ranks than are known: the threshold is not reached, or all stand above the noise.
    """

    way: Way
    label: str
    ranks: tuple[int, int]
    nbytes: int
    padded_bytes: int
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


def trade_off(rows: Sequence[EnergyRow], *, element_bytes: int) -> TradeOff:
    """The lines and the points of a model.

    Args:
        rows: of its manifest.
        element_bytes: of one entry of a factor.
    """
    used = factored(rows)
    if not used:
        return TradeOff(element_bytes, (), (), ())
    tied = any(row.status == "adapted" and row.rank is None for row in rows)
    spectra = {row.tensor: spectrum_of(row, tied=tied) for row in used}
    total = math.fsum(one.delta_sq for one in spectra.values())
    most = known_to(used)
    ladder = sorted({rank for rank in (*FIXED, 1, 2, 4, 12, 24, 48, 96, 192, 384, most) if rank <= most})

    def choice(way: Way, label: str, own: Mapping[str, int], capped: int = 0) -> Choice:
        span = min(own.values()), max(own.values())
        padded = element_bytes * span[1] * sum(spectra[name].unit for name, rank in own.items() if rank)
        kept = min(ranks.energy(spectra, own) / total, 1.0)
        return Choice(way, label, span, element_bytes * _parameters(spectra, own), padded, kept, capped)

    def fixed(rank: int) -> dict[str, int]:
        return {name: ranks.fixed(one, rank) for name, one in spectra.items()}

    uniform = {rank: choice("fixed rank", f"rank {rank}", fixed(rank)) for rank in ladder}
    found = [one for rank, one in uniform.items() if rank in FIXED]
    for share in THRESHOLDS:
        picked = {name: _reached(one, share) for name, one in spectra.items()}
        capped = sum(rank is None for rank in picked.values())
        if capped <= len(used) // 2:  # of the others it says nothing but where the spectra were cut
            own = {name: rank or spectra[name].most for name, rank in picked.items()}
            found.append(choice("energy", f"{100 * share:.0f} %", own, capped))
    items = _items(spectra)
    for rank in (rank for rank in BUDGETS if rank in uniform):
        own = max(
            _spread(items, _parameters(spectra, fixed(rank))), fixed(rank), key=lambda own: ranks.energy(spectra, own)
        )
        found.append(choice("budget", f"size of rank {rank}", own))
    if all(row.noise_edge is not None for row in used):
        above = {name: ranks.above_noise(one) for name, one in spectra.items()}
        capped = sum(above[row.tensor] == spectra[row.tensor].most < smaller_side(row) for row in used)
        found.append(choice("noise edge", "auto", above, capped))
    if any(row.rank for row in used):
        found.append(choice("this adapter", "this adapter", {row.tensor: row.rank or 0 for row in used}))
    return TradeOff(
        element_bytes,
        tuple((one.nbytes, one.energy) for one in uniform.values()),
        _best(items, total, element_bytes),
        tuple(found),
    )


def rank_for(row: EnergyRow, share: float) -> int | None:
    """The smallest rank that keeps this share of a tensor; None where none that is known does."""
    return _reached(spectrum_of(row), share)


def spectrum_of(row: EnergyRow, *, tied: bool = False) -> Spectrum:
    """What the policies see of a row.

    Args:
        row: with a spectrum.
        tied: whether the embedding's factors are stored for the output as well.
    """
    values = row.singular_values or ()
    unit = row.shape[0] + math.prod(row.shape[1:])
    twice = 2 if tied and row.kind == "embedding" else 1
    edge = row.noise_edge or 0.0
    return Spectrum(values, (row.delta_norm or 0.0) ** 2, unit * twice, edge)


def _reached(spectrum: Spectrum, share: float) -> int | None:
    rank = ranks.by_energy(spectrum, share * (1 - _ROUNDING))
    if rank < spectrum.most:
        return rank
    known = math.fsum(value * value for value in spectrum.singular_values)
    return rank if known >= share * (1 - _ROUNDING) * spectrum.delta_sq else None


def _parameters(spectra: Mapping[str, Spectrum], own: Mapping[str, int]) -> int:
    return sum(rank * spectra[name].unit for name, rank in own.items())


def _items(spectra: Mapping[str, Spectrum]) -> list[_Item]:
    """In the order in which `ranks.spread` takes them."""
    return sorted(
        (-value * value / one.unit, name, one.unit, value * value) for name, one in spectra.items() for value in one.singular_values
    )  # fmt: skip


def _spread(items: Sequence[_Item], parameters: int) -> dict[str, int]:
    """What `ranks.spread` picks where a rank costs its parameters and nothing besides: one pass, for it is asked of hundreds of models."""
    own = {name: 0 for _, name, _, _ in items}
    for _, name, unit, _ in items:
        if unit <= parameters:
            own[name] += 1
            parameters -= unit
    return own


def _best(items: Sequence[_Item], total: float, element_bytes: int) -> tuple[tuple[int, float], ...]:
    """Wherever one of the items stops, no other choice of that size keeps more."""
    nbytes, kept, line = 0, 0.0, []
    every = max(1, len(items) // _FRONTIER)
    for number, (_, _, unit, square) in enumerate(items, 1):
        nbytes, kept = nbytes + element_bytes * unit, kept + square
        if number % every == 0 or number == len(items):
            line.append((nbytes, min(kept / total, 1.0)))
    return tuple(line)
