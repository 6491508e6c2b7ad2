"""A model's page and a zoo's: self-contained HTML, escaped, with the figures inside and as files. The only home of jinja2."""

from __future__ import annotations

import base64
import hashlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from phlora_pipeline import __version__
from phlora_pipeline.report import drawing, maps, plots
from phlora_pipeline.report.curve import EnergyCurve, crowd
from phlora_pipeline.report.entry import Entry
from phlora_pipeline.report.facts import ModelReport
from phlora_pipeline.report.grid import GOAL
from phlora_pipeline.report.palette import stylesheet
from phlora_pipeline.report.words import MADE_BY, bound, counted, noun, ranks_told, short, shown, verdict, weight, words
from phlora_pipeline.summary import percent, size, span

MOST_LINES = 2000
"""Tensors in a page's table."""

_PAGE = Path(__file__).parent / "page"
_SPECTRUM_PLACES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True)
class Shown:
    """A figure on a page: its name, the drawing, what is said of it, and the files that hold it as well."""

    key: str
    svg: Markup
    caption: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A page, and the files that belong beside it, by name."""

    html: str
    files: Mapping[str, bytes]


def model_page(report: ModelReport, *, stem: str = "", up: str = "") -> Drawn:
    """A model's page.

    Args:
        report: what there is to tell.
        stem: of the names of the figures' files; none are made where it is empty.
        up: link to the page over all models, where there is one.
    """
    known = bool(report.curve.ranks)
    only = report.ranks[0] if report.ranks and report.ranks[0] == report.ranks[1] else None
    ranks_differ = maps.ranks_differ(report.grid)
    needed_known = any(cell and cell.needed for line in report.grid.cells for cell in line)
    made: dict[str, tuple[Callable[[], Figure], str]] = {}
    if known:
        made["energy"] = (
            lambda: plots.energy_figure(report),
            f"Preserved energy E\u1d63 against rank r over {counted(report.curve.tensors, 'adapted tensor')}: mean, and the band that holds half of them. E\u1d63 is known of all of them up to rank {report.curve.ranks[-1]}{'; beyond it the dotted line counts what is known' if report.curve.least_ranks else ''}.",
        )
        made["size"] = (
            lambda: plots.trade_off_figure(report.trade_off),
            "Size of the factors against the share of the adapted tensors' ‖ΔW‖² that they keep, as computed, before rounding. A server that reads one rank for all gets these ranks padded to the largest.",
        )
    if any(cell and cell.energy is not None for line in report.grid.cells for cell in line):
        made["grid"] = (
            lambda: maps.grid_figure(report.grid),
            f"Layers from left to right, projections from top to bottom; a dot: not adapted{'; > : more than what is known' if needed_known and not ranks_differ else ''}. Experts of a layer are taken together.",
        )
    if report.spectra:
        made["spectra"] = (
            lambda: plots.spectra_figure(report.spectra, only),
            "Both axes logarithmic. A straight line is a power law; a cliff is a true low rank.",
        )
    figures, files = _figures(made, stem, shown(report.model))
    html = _environment().get_template("model.html.j2").render(
        **_common(),
        report=report,
        up=up,
        figures=figures,
        verdict=verdict(report),
        weight="; ".join(filter(None, (weight(report), "" if report.exact else "factors alone"))),
        shares=_shares(report),
        ranks_differ=ranks_differ,
        goal=percent(GOAL, 0),
        needed_known=needed_known,
        has_edge=any(spectrum.edge is not None for spectrum in report.spectra),
        spectrum_places=[n for n in _SPECTRUM_PLACES if any(n <= len(one.values) for one in report.spectra)],
        most_lines=MOST_LINES,
    )  # fmt: skip
    return Drawn(html, files)


def index_page(models: Sequence[Entry], *, stem: str) -> Drawn:
    """The page over many models.

    Args:
        models: a row for each.
        stem: of the names of the figures' files.
    """
    called = noun([model.model for model in models])
    curves = [(model.name, model.curve) for model in models if model.curve.ranks]
    if len(curves) <= plots.MOST_CURVES:
        curves = _once(curves)
    points = [
        (model.name, model.adapter_bytes, model.summary.preserved_energy)
        for model in models
        if model.summary.preserved_energy is not None and model.adapter_bytes
    ]
    many = len(curves) > plots.MOST_CURVES
    made: dict[str, tuple[Callable[[], Figure], str]] = {}
    if curves:
        made["energy"] = (
            lambda: plots.energies_figure(curves, called),
            "Preserved energy E\u1d63 against rank r. "
            + (f"A thin line for each {called}; their median, and the band that holds half of them." if many else f"A line for each {called}: the mean over its adapted tensors; the band holds half of them; where some spectra end, the dotted line counts what is known."),
        )  # fmt: skip
    if points:
        made["size"] = (
            lambda: plots.sizes_figure(points),
            f"A point for each {called}: its size, and the share of the adapted tensors' ‖ΔW‖² that it keeps.",
        )
    figures, files = _figures(made, stem, counted(len(models), called))
    html = _environment().get_template("index.html.j2").render(
        **_common(),
        models=models,
        noun=called,
        compressed=sum(model.compressed for model in models),
        bases=sorted({model.base or "not named" for model in models}),
        total=_total(models),
        figures=figures,
        crowd=crowd([curve for _, curve in curves]) if many else (),
        table_ranks=[rank for rank in (1, 4, 8, 16, 32, 64, 128, 256, 512) if any(model.curve.at(rank) for model in models)],
    )  # fmt: skip
    return Drawn(html, files)


def _figures(
    made: Mapping[str, tuple[Callable[[], Figure], str]], stem: str, title: str
) -> tuple[dict[str, Shown], dict[str, bytes]]:
    figures: dict[str, Shown] = {}
    files: dict[str, bytes] = {}
    with drawing.style():
        for key, (draw, caption) in made.items():
            names = tuple(f"{stem}-{key}.{kind}" for kind in ("svg", "png")) if stem else ()
            figure = draw()
            figures[key] = Shown(key, Markup(drawing.inline_svg(figure, key, caption)), caption, names)  # noqa: S704 -- of our own drawing, which escapes names
            if names:
                drawing.titled(figure, short(title, 70))
                files[names[0]], files[names[1]] = drawing.svg_file(figure), drawing.png_file(figure)
    return {key: figures.get(key) for key in ("energy", "size", "grid", "spectra")}, files  # type: ignore[misc]


def _shares(report: ModelReport) -> list[dict[str, Any]]:
    """Where ‖ΔW‖² goes, in parts that add up to all of it."""
    summary = report.summary
    if summary.coverage is None:
        return []
    kept = summary.coverage * (summary.preserved_energy or 0.0)
    carried = summary.carried_energy or 0.0
    parts = (
        ("kept by the factors", kept, "s0"),
        ("beyond the rank", summary.coverage - kept, "h2"),
        ("kept whole", carried, "s2"),
        ("left out", 1 - summary.coverage - carried, "s1"),
    )
    return [{"name": name, "share": share, "role": role} for name, share, role in parts if share > 1e-6]


def _once(curves: Sequence[tuple[str, EnergyCurve]]) -> list[tuple[str, EnergyCurve]]:
    """Adapters of several ranks from one extraction have the same curve: it is drawn once, under all their names."""
    names: dict[EnergyCurve, list[str]] = {}
    for name, curve in curves:
        names.setdefault(curve, []).append(name)
    return [(", ".join(same), curve) for curve, same in names.items()]


def _total(models: Sequence[Entry]) -> dict[str, Any]:
    kept = {model.name: energy for model in models if (energy := model.summary.preserved_energy) is not None}
    adapters, known = sum(model.adapter_bytes for model in models), [model for model in models if not model.compressed]
    checkpoints = sum({model.checkpoint or model.name: model.checkpoint_bytes for model in known}.values())
    certificates = [model.certificate for model in models if model.certificate is not None]
    least = min(kept, key=lambda name: (kept[name], name), default="")
    return {
        "adapters": adapters,
        "checkpoints": checkpoints,
        "share": sum(model.adapter_bytes for model in known) / checkpoints if checkpoints else None,
        "median": statistics.median(kept.values()) if kept else None,
        "least": kept.get(least),
        "least_name": least,
        "coverage": min((c for model in known if (c := model.summary.coverage) is not None), default=None),
        "certificate": max(certificates, default=None),
        "failed": sum(bool(model.summary.failed) for model in models),
        "bare": sum(model.ranks is None for model in models),
    }


def _columns(curve: EnergyCurve) -> list[tuple[float, ...]]:
    return list(zip(curve.ranks, curve.mean, curve.lower, curve.upper, curve.total, strict=True))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(_PAGE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    made.filters |= {
        "percent": percent, "size": size, "shown": shown, "short": short, "ranks": ranks_told, "bound": bound,
        "span": span, "words": words, "counted": counted, "columns": _columns,
    }  # fmt: skip
    return made


@cache
def _common() -> dict[str, Any]:
    script = _file("sort.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {
        "script": Markup(script),  # noqa: S704 -- our own
        "script_digest": f"sha256-{digest}",
        "stylesheet": Markup(_file("style.css")),  # noqa: S704
        "colours": Markup(stylesheet()),  # noqa: S704
        "made_by": __version__,
        "mark": MADE_BY,
    }


def _file(name: str) -> str:
    return (_PAGE / name).read_text(encoding="utf-8")
