"""A run in numbers, from its rows alone: what the terminal, `--json`, `run.json` and the model card tell. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phlora_pipeline.manifest import ENERGY_RANKS, EnergyRow


@dataclass(frozen=True, slots=True)
class Summary:
    """Energies are shares of squared Frobenius norms, summed over tensors before dividing.

    Attributes:
        adapted, unchanged, zero_filled, carried, skipped, failed: numbers of tensors.
        coverage: share of ‖ΔW‖² over all compared tensors that lies in adapted ones; None where nothing changed.
        carried_energy: the share that lies in tensors that are kept whole.
        preserved_energy: E_r over the adapted tensors.
        written_energy: the same from the values as stored.
        energy_at: E_r over the adapted tensors at each rank; None where it is not known for all of them.
        uncompared: tensors that could not be compared with the base: (tensor, reason). Their change is not known, and is in no share.
        left_out: the changed tensors that are neither adapted nor kept whole, largest share of ‖ΔW‖² first: (tensor, reason, share, relative change).
    """

    adapted: int
    unchanged: int
    zero_filled: int
    carried: int
    skipped: int
    failed: int
    coverage: float | None
    carried_energy: float | None
    preserved_energy: float | None
    written_energy: float | None
    energy_at: dict[int, float | None]
    uncompared: tuple[tuple[str, str], ...]
    left_out: tuple[tuple[str, str, float, float | None], ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def summarize(rows: Sequence[EnergyRow]) -> Summary:
    """Sum up a manifest's rows."""
    count = {
        status: sum(row.status == status for row in rows)
        for status in ("adapted", "unchanged", "zero_filled", "carried", "skipped", "failed")
    }
    factored = [row for row in rows if row.rank is not None]
    # A tied output's row repeats the embedding's delta, which is counted once.
    changed = [row for row in rows if row.delta_norm and not (row.status == "adapted" and row.rank is None)]
    total, own = _energy(changed), _energy(factored)
    kept = [row for row in changed if row.status == "carried"]
    out = sorted(
        (row for row in changed if row.rank is None and row.status != "carried"),
        key=lambda row: (-_squared(row), row.tensor),
    )
    return Summary(
        **count,
        coverage=own / total if total else None,
        carried_energy=_energy(kept) / total if total else None,
        preserved_energy=_mean(factored, [row.preserved_energy for row in factored]),
        written_energy=_mean(factored, [row.written_energy for row in factored]),
        energy_at={rank: _mean(factored, [row.energy_at.get(rank) for row in factored]) for rank in ENERGY_RANKS},
        uncompared=tuple(
            (row.tensor, row.reason) for row in rows if row.status == "skipped" and row.delta_norm is None
        ),
        left_out=tuple((row.tensor, row.reason, _squared(row) / total, row.relative_change) for row in out),
    )


def reasons(summary: Summary) -> list[tuple[str, int, float]]:
    """Why changed tensors are left out: (reason, how many, their share of ‖ΔW‖²), largest share first."""
    grouped: dict[str, tuple[int, float]] = {}
    for _, reason, share, _ in summary.left_out:
        number, shares = grouped.get(reason, (0, 0.0))
        grouped[reason] = (number + 1, shares + share)
    return sorted(
        ((reason, number, share) for reason, (number, share) in grouped.items()), key=lambda item: (-item[2], item[0])
    )


def percent(share: float | None, digits: int = 1) -> str:
    """`87.3 %`, or a dash where it is not known; a share that is not nothing never reads as 0.

    >>> percent(0.873), percent(None), percent(1e-9)
    ('87.3 %', '–', '< 0.1 %')
    """
    if share is None:
        return "–"
    least = 10.0 ** (-digits - 2)
    return f"< {10.0**-digits:.{digits}f} %" if 0 < share < least / 2 else f"{100 * share:.{digits}f} %"


def size(nbytes: float) -> str:
    """`12.3 MB`, in powers of ten as file listings and disks count."""
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1000
    return f"{nbytes:.1f} TB"


def _squared(row: EnergyRow) -> float:
    return (row.delta_norm or 0.0) ** 2


def _energy(rows: Sequence[EnergyRow]) -> float:
    return math.fsum(_squared(row) for row in rows)


def _mean(rows: Sequence[EnergyRow], shares: Sequence[float | None]) -> float | None:
    total = _energy(rows)
    if not total or any(share is None for share in shares):
        return None
    return math.fsum(_squared(row) * (share or 0.0) for row, share in zip(rows, shares, strict=True)) / total


def span(value: float) -> str:
    """A time as people say it.

    >>> [span(value) for value in (0.0042, 7.31, 95, 7300)]
    ['4 ms', '7.3 s', '1.6 min', '2.0 h']
    """
    if value < 1:
        return f"{1e3 * value:.0f} ms"
    if value < 90:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 5400 else f"{value / 3600:.1f} h"
