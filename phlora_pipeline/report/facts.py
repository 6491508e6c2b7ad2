"""Everything that a page tells of one model, as plain data, from its rows and what lies beside them. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phlora_pipeline import safetensors_format
from phlora_pipeline.manifest import OF_FACTORS, EnergyRow
from phlora_pipeline.report.choices import TradeOff, rank_for, trade_off
from phlora_pipeline.report.curve import EnergyCurve, energy_curve, factored
from phlora_pipeline.report.grid import GOAL, Grid, grid
from phlora_pipeline.summary import Summary, summarize

MOST_SPECTRA = 6


@dataclass(frozen=True, slots=True)
class Run:
    """The run that made an adapter, where its records lie beside.

    Attributes:
        seconds, tasks, read_bytes: of the run.
        busy, waited: seconds that workers worked, and of these waited for bytes.
        workers: how many there were.
        routes: solver → tensors.
        slowest: (task, seconds, bytes) of the tasks that took longest.
    """

    seconds: float
    tasks: int
    read_bytes: int
    busy: float = 0.0
    waited: float = 0.0
    workers: int = 0
    routes: Mapping[str, int] | None = None
    slowest: tuple[tuple[str, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model's manifest lies, and what is known of it besides.

    Attributes:
        url: of the manifest.
        model, base: names, where the place tells them.
        record: `run.json`, where it lies beside.
        run: the run's own records, where they lie beside.
    """

    url: str
    model: str = ""
    base: str = ""
    record: Mapping[str, Any] | None = None
    run: Run | None = None


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors without factors of their own, for one reason.

    Attributes:
        status, reason: as in the manifest.
        tensors: how many.
        share: of ‖ΔW‖²; None where they could not be compared.
        largest: (name, ‖ΔW‖/‖W‖) of those that changed most.
    """

    status: str
    reason: str
    tensors: int
    share: float | None
    largest: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True, slots=True)
class Spectrum:
    """Singular values of one tensor's update, the share of ‖ΔW‖² that lies in it, and the noise edge where it is known."""

    tensor: str
    values: tuple[float, ...]
    share: float
    edge: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """One tensor, for the table of all: `share` of ‖ΔW‖², and the rank that `GOAL` takes."""

    row: EnergyRow
    share: float | None
    needed: int | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    """One model.

    Attributes:
        model, base: their names; empty where nobody tells them.
        version, url: of the adapter, and where the manifest lies.
        summary: counts and energies.
        ranks: the smallest and the largest of the adapted tensors; None where there are none.
        adapter_bytes: of the weights as written where `run.json` tells it (`exact`), else of the factors at their own ranks.
        checkpoint_bytes: of the fine-tune's tensors; 0 where these are not known.
        checkpoint: fingerprint of the fine-tune, where `run.json` tells it.
        compressed: whether it was made of an adapter, and not of checkpoints: ΔW is then what that adapter was.
        certificate: the worst of all tensors.
        noise_energy: share of the adapted tensors' ‖ΔW‖² that the checkpoint's own rounding explains; None where not measured.
    """

    model: str
    base: str
    version: str
    url: str
    summary: Summary
    ranks: tuple[int, int] | None
    adapter_bytes: int
    exact: bool
    checkpoint_bytes: int
    checkpoint: str
    compressed: bool
    certificate: float | None
    noise_energy: float | None
    settings: Mapping[str, Any]
    curve: EnergyCurve
    trade_off: TradeOff
    grid: Grid
    spectra: tuple[Spectrum, ...]
    groups: tuple[Group, ...]
    lines: tuple[Line, ...]
    run: Run | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON: all but single tensors, which are in the manifest."""
        record = asdict(self)
        del record["lines"], record["spectra"]
        return record


def model_report(rows: Sequence[EnergyRow], source: Source) -> ModelReport:
    """Work out what there is to tell.

    Args:
        rows: of the manifest.
        source: where it lies.
    """
    record = source.record or {}
    own = [row for row in rows if row.rank is not None]
    element = _element_bytes(rows, record)
    stored = record.get("weights", {}).get("bytes")
    factors = element * sum((row.rank or 0) * (row.shape[0] + math.prod(row.shape[1:])) for row in own)
    ranks = [row.rank or 0 for row in own]
    certificates = [row.certificate for row in own if row.certificate is not None]
    total = math.fsum(_squared(row) for row in _counted(rows))
    compressed = any(row.solver == OF_FACTORS for row in rows)
    return ModelReport(
        model=source.model,
        base=source.base,
        version=rows[0].version if rows else "",
        url=source.url,
        summary=summarize(rows),
        ranks=(min(ranks), max(ranks)) if ranks else None,
        adapter_bytes=factors if stored is None else int(stored),
        exact=stored is not None,
        checkpoint_bytes=0
        if compressed
        else sum(safetensors_format.tensor_bytes(row.tuned_dtype, row.shape) for row in rows),
        checkpoint=_fingerprint(record),
        compressed=compressed,
        certificate=max(certificates, default=None),
        noise_energy=_noise(own),
        settings=record.get("settings", {}),
        curve=energy_curve(rows),
        trade_off=trade_off(rows, element_bytes=element),
        grid=grid(rows),
        spectra=_spectra(rows, total),
        groups=_groups(rows, total),
        lines=tuple(_line(row, total) for row in sorted(rows, key=lambda row: (-_squared(row), row.tensor))),
        run=source.run,
    )


def _fingerprint(record: Mapping[str, Any]) -> str:
    tuned = record.get("sources", {}).get("tuned")
    return str(tuned.get("fingerprint", "")) if isinstance(tuned, dict) else ""


def _squared(row: EnergyRow) -> float:
    return (row.delta_norm or 0.0) ** 2


def _counted(rows: Sequence[EnergyRow]) -> list[EnergyRow]:
    """A tied output's row repeats the embedding's delta, which is counted once."""
    return [row for row in rows if row.delta_norm and not (row.status == "adapted" and row.rank is None)]


def _element_bytes(rows: Sequence[EnergyRow], record: Mapping[str, Any]) -> int:
    """Of the factors: as `run.json` tells, else as `--dtype auto` picks it: the fine-tune's where that has 16 bits."""
    written = record.get("written", {}).get("dtype")
    if written:
        return 4 if written == "float32" else 2
    return 2 if any(row.tuned_dtype in {"BF16", "F16"} for row in rows if row.rank is not None) else 4


def _noise(rows: Sequence[EnergyRow]) -> float | None:
    total = math.fsum(_squared(row) for row in rows)
    if not total or any(row.noise_energy is None for row in rows):
        return None
    return min(math.fsum((row.noise_energy or 0.0) * _squared(row) for row in rows) / total, 1.0)


def _spectra(rows: Sequence[EnergyRow], total: float) -> tuple[Spectrum, ...]:
    """Of each projection the tensor that changed most; of these the largest."""
    largest: dict[str, EnergyRow] = {}
    for row in sorted(factored(rows), key=_squared, reverse=True):
        projection = ".".join("*" if part.isdecimal() else part for part in row.module.split("."))
        largest.setdefault(projection, row)
    return tuple(
        Spectrum(row.module, tuple(row.singular_values or ()), _squared(row) / total, row.noise_edge)
        for row in list(largest.values())[:MOST_SPECTRA]
    )


def _groups(rows: Sequence[EnergyRow], total: float) -> tuple[Group, ...]:
    counted = {id(row) for row in _counted(rows)}
    found: dict[tuple[str, str], list[EnergyRow]] = {}
    for row in rows:
        if row.status != "adapted":
            found.setdefault((row.status, row.reason), []).append(row)
    groups = []
    for (status, reason), members in found.items():
        known = [row for row in members if row.delta_norm is not None]
        share = math.fsum(_squared(row) for row in known if id(row) in counted) / total if known and total else None
        changed = sorted((row for row in known if row.delta_norm), key=lambda row: (-_squared(row), row.tensor))
        largest = changed or members
        groups.append(
            Group(status, reason, len(members), share, tuple((row.tensor, row.relative_change) for row in largest[:3]))
        )
    return tuple(sorted(groups, key=lambda group: (-(group.share or 0.0), group.status, group.reason)))


def _line(row: EnergyRow, total: float) -> Line:
    needed = rank_for(row, GOAL) if row.singular_values and row.delta_norm else None
    return Line(row, _squared(row) / total if total and row.delta_norm is not None else None, needed)
