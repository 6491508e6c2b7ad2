"""The figures over ranks and sizes: energy against rank, size against energy, spectra."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from phlora_pipeline.report.choices import Choice, TradeOff
from phlora_pipeline.report.curve import EnergyCurve, crowd
from phlora_pipeline.report.facts import ModelReport, Spectrum
from phlora_pipeline.report.frame import frame, log_scale, percent_scale, rank_scale
from phlora_pipeline.report.grid import labels
from phlora_pipeline.report.palette import LIGHT, SERIES
from phlora_pipeline.report.words import short, shown
from phlora_pipeline.summary import size

_MOST_BANDS = 3
_KEPT = "preserved energy Eᵣ"
_DASHED, _DOTTED = (0, (4, 2)), (0, (1.5, 2))

MOST_CURVES = len(SERIES)
"""More than these are not told apart by colours: they are drawn as a crowd, with its median."""

Named = tuple[str, EnergyCurve]


def energy_figure(report: ModelReport) -> Figure:
    """Mean and quartiles over the layers of one model; where the adapter stands."""
    curve = report.curve
    figure, axes = frame(rank_scale(max((*curve.ranks, *curve.least_ranks))), percent_scale(_KEPT))
    blue = LIGHT["s0"]
    _band(axes, curve, blue, alpha=0.16, label="half of the layers")
    axes.plot(curve.ranks, _hundredfold(curve.mean), color=blue, label="mean over the layers", **_marks(curve.ranks))
    axes.plot(
        curve.ranks, _hundredfold(curve.total), color=LIGHT["s1"], linewidth=1.5, linestyle=_DASHED, label="of ‖ΔW‖² as a whole"
    )  # fmt: skip
    if curve.least_ranks:
        ranks, least = (curve.ranks[-1], *curve.least_ranks), (curve.mean[-1], *curve.least)
        axes.plot(ranks, _hundredfold(least), color=blue, linestyle=_DOTTED, label="mean, at least")
    if report.ranks and report.ranks[0] == report.ranks[1]:
        _mark_rank(axes, report.ranks[0])
    _legend(axes, low=_rises_early(curve.mean))
    return figure


def energies_figure(named: Sequence[Named], noun: str) -> Figure:
    """One curve for each model, or whatever they are called: the paper's Figure 1."""
    figure, axes = frame(
        rank_scale(max(rank for _, curve in named for rank in (*curve.ranks, *curve.least_ranks))),
        percent_scale(_KEPT),
        high=4.3,
    )
    if len(named) > MOST_CURVES:
        _crowd(axes, [curve for _, curve in named], noun)
    else:
        for role, (name, curve) in zip(SERIES, named, strict=False):
            if len(named) <= _MOST_BANDS:
                _band(axes, curve, LIGHT[role], alpha=0.12)
            if curve.least_ranks:
                ranks, least = (curve.ranks[-1], *curve.least_ranks), (curve.mean[-1], *curve.least)
                axes.plot(ranks, _hundredfold(least), color=LIGHT[role], linestyle=_DOTTED)
            axes.plot(
                curve.ranks, _hundredfold(curve.mean), color=LIGHT[role], label=_told(name), **_marks(curve.ranks)
            )  # fmt: skip
    _legend(axes, low=_rises_early([min(curve.mean[-1] for _, curve in named)]))
    return figure


def trade_off_figure(found: TradeOff) -> Figure:
    """What each size keeps, with the points that the policies pick."""
    least = min(nbytes for nbytes, _ in found.uniform)
    best = [point for point in found.best if point[0] >= least]
    sizes = [float(nbytes) for nbytes, _ in (*found.uniform, *best)] + [choice.nbytes for choice in found.choices if choice.nbytes]  # fmt: skip
    figure, axes = frame(
        log_scale(sizes, _round_size, "size of the factors, each at its own rank"),
        percent_scale("of the adapted ‖ΔW‖² kept"),
        high=4.3,
    )
    for points, role, dashes, label in (
        (found.uniform, "s0", "-", "one rank for all"),
        (best, "s2", _DASHED, "a rank for each tensor, the best for the size"),
    ):
        x, y = zip(*points, strict=True)
        axes.plot(x, _hundredfold(y), color=LIGHT[role], linestyle=dashes, linewidth=1.8, label=label)
    for way, marker, role, label in (
        ("fixed rank", "o", "s0", ""),
        ("energy", "D", "s1", "each tensor at a threshold of energy"),
        ("budget", "s", "s2", "a budget of the same size as a fixed rank"),
        ("noise edge", "^", "s3", "each tensor at its noise edge: auto"),
    ):
        for number, choice in enumerate(one for one in found.choices if one.way == way and one.nbytes):
            point = (choice.nbytes, 100 * choice.energy)
            axes.plot(*point, marker=marker, color=LIGHT[role], linestyle="", markersize=6.5, markeredgecolor=LIGHT["surface"], label="" if number else label, zorder=3)  # fmt: skip
            if way == "budget":
                continue  # straight above the rank whose size it has
            right, up, side = _beside(choice, found.uniform)
            axes.annotate(
                choice.label, point, xytext=(right, up), textcoords="offset points", fontsize=8.5, color=LIGHT[role],
                ha=side, bbox={"facecolor": LIGHT["surface"], "edgecolor": "none", "pad": 0.4, "alpha": 0.8},
            )  # fmt: skip
    for choice in found.choices:
        if choice.way == "this adapter":
            axes.plot(choice.nbytes, 100 * choice.energy, marker="o", markersize=14, markerfacecolor="none", markeredgecolor=LIGHT["ink"], markeredgewidth=1.5, linestyle="", label="this adapter", zorder=4)  # fmt: skip
    _legend(axes, low=_rises_early([energy for _, energy in found.uniform]))
    return figure


def sizes_figure(points: Sequence[tuple[str, float, float]]) -> Figure:
    """A zoo at a glance: the size of each adapter against the energy that it keeps.

    Args:
        points: name, bytes, energy.
    """
    scale = log_scale([nbytes for _, nbytes, _ in points], _round_size, "size of the adapter")
    figure, axes = frame(scale, percent_scale(_KEPT), high=3.6)
    if len(points) > MOST_CURVES:
        _, x, y = zip(*points, strict=True)
        axes.plot(x, _hundredfold(y), marker="o", linestyle="", markersize=6, alpha=0.45, color=LIGHT["s0"], markeredgecolor=LIGHT["surface"])  # fmt: skip
        return figure
    for role, (name, nbytes, energy) in zip(SERIES, points, strict=False):
        axes.plot(nbytes, 100 * energy, marker="o", linestyle="", markersize=9, color=LIGHT[role], markeredgecolor=LIGHT["surface"], label=_told(name))  # fmt: skip
    _legend(axes, low=_rises_early([energy for _, _, energy in points]))
    return figure


def spectra_figure(spectra: Sequence[Spectrum], rank: int | None) -> Figure:
    """Singular values of some tensors, with the noise edge of each where it is known."""
    names = labels([spectrum.tensor for spectrum in spectra])
    lines = [[value for value in spectrum.values if value > 0] for spectrum in spectra]
    edges = [_edge(spectrum) for spectrum in spectra]
    values = [value for line in lines for value in line] + [edge for edge in edges if edge]
    figure, axes = frame(
        rank_scale(max(map(len, lines)), "i"),
        log_scale(values, "{:g}".format, "singular value σᵢ of ΔW", most=7),
        high=4.1,
    )
    for role, spectrum, line, edge in zip(SERIES, spectra, lines, edges, strict=False):
        name = _told(names[spectrum.tensor])
        axes.plot(range(1, len(line) + 1), line, color=LIGHT[role], linewidth=1.7, label=name, **_marks(line))
        if edge:
            axes.axhline(edge, color=LIGHT[role], linewidth=1.2, linestyle=_DOTTED, zorder=1)
    if any(edges):
        axes.plot([], [], color=LIGHT["soft"], linewidth=1.2, linestyle=_DOTTED, label="noise edge")
    if rank is not None:
        _mark_rank(axes, rank)
    axes.legend(loc="upper right")
    return figure


def _crowd(axes: Axes, curves: Sequence[EnergyCurve], noun: str) -> None:
    for curve in curves:  # at powers of two alone: hundreds of lines are a large drawing
        ranks, shares = zip(
            *((r, s) for r, s in zip(curve.ranks, curve.mean, strict=True) if r & (r - 1) == 0), strict=True
        )
        axes.plot(ranks, _hundredfold(shares), color=LIGHT["s7"], linewidth=0.6, alpha=0.18)
    if not (told := crowd(curves)):
        return
    ranks, lower, middle, upper = zip(*told, strict=True)
    blue, label = LIGHT["s0"], f"median of {len(curves)} {noun}s"
    axes.fill_between(ranks, _hundredfold(lower), _hundredfold(upper), color=blue, alpha=0.2, linewidth=0, label=f"half of the {noun}s")  # fmt: skip
    axes.plot(ranks, _hundredfold(middle), color=blue, label=label)


def _band(axes: Axes, curve: EnergyCurve, colour: str, *, alpha: float, label: str = "") -> None:
    lower, upper = _hundredfold(curve.lower), _hundredfold(curve.upper)
    axes.fill_between(curve.ranks, lower, upper, color=colour, alpha=alpha, linewidth=0, label=label)


def _mark_rank(axes: Axes, rank: int) -> None:
    axes.axvline(rank, color=LIGHT["soft"], linewidth=1, linestyle=_DOTTED, zorder=1)
    most = axes.get_xlim()[1]
    axes.annotate(
        f"this adapter: rank {rank}", (rank, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 5), textcoords="offset points",
        fontsize=8.5, color=LIGHT["soft"], ha="right" if rank * rank > most else "left", annotation_clip=False,
    )  # fmt: skip


def _legend(axes: Axes, *, low: bool) -> None:
    axes.legend(loc="lower right" if low else "upper left")


def _edge(spectrum: Spectrum) -> float | None:
    """Where it can be drawn without much empty room: not where all is noise, nor far below what is known."""
    least = min(value for value in spectrum.values if value > 0)
    return spectrum.edge if spectrum.edge and least / 10 < spectrum.edge else None


def _rises_early(shares: Sequence[float]) -> bool:
    """Whether a line of these stands where a legend at the upper left would."""
    return shares[len(shares) * 2 // 5] > 0.45


def _beside(choice: Choice, uniform: Sequence[tuple[int, float]]) -> tuple[int, int, str]:
    """Where a point's label goes, and which of its ends is near: away from the line of one rank for all."""
    if choice.way == "noise edge":
        return 0, 11, "center"
    at_least = max((energy for nbytes, energy in uniform if nbytes <= choice.nbytes), default=0.0)
    below = choice.way == "fixed rank" or choice.energy < at_least
    return (6, -11, "left") if below else (-6, 7, "right")


def _marks(points: Sequence[object]) -> Mapping[str, Any]:
    """A line of one point is not seen."""
    return {"marker": "o", "markersize": 5} if len(points) < 2 else {}


def _told(name: str) -> str:
    """For a legend, which leaves out what begins with an underscore."""
    told = short(shown(name), 40)
    return f" {told}" if told.startswith("_") else told


def _hundredfold(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _round_size(nbytes: float) -> str:
    return size(nbytes).replace(".0 ", " ")
