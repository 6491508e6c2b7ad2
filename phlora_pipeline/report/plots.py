"""The figures: energy against rank, where in the model it lies, size against energy, spectra."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from phlora_pipeline.report.choices import TradeOff
from phlora_pipeline.report.curve import EnergyCurve
from phlora_pipeline.report.drawing import canvas
from phlora_pipeline.report.facts import ModelReport, Spectrum
from phlora_pipeline.report.grid import GOAL, Cell, Grid, labels
from phlora_pipeline.report.palette import LIGHT, SERIES, STEPS
from phlora_pipeline.report.words import short, shown
from phlora_pipeline.summary import size

_WIDE, _HIGH = 8.4, 3.7
_MOST_BANDS = 3
MOST_CURVES = len(SERIES)
"""More than these are not told apart by colours: they are drawn as a crowd, with its median."""

Named = tuple[str, EnergyCurve]


def energy_figure(report: ModelReport) -> Figure:
    """Mean and quartiles over the layers of one model; where the adapter stands."""
    figure, axes = _axes(_WIDE, _HIGH)
    curve = report.curve
    ranks = curve.ranks
    axes.fill_between(ranks, _in_percent(curve.lower), _in_percent(curve.upper), color=LIGHT["s0"], alpha=0.16, linewidth=0, label="half of the layers")  # fmt: skip
    axes.plot(ranks, _in_percent(curve.mean), color=LIGHT["s0"], label="mean over the layers", **_marks(ranks))
    axes.plot(ranks, _in_percent(curve.total), color=LIGHT["s1"], linewidth=1.5, linestyle=(0, (4, 2)), label="of ‖ΔW‖² as a whole")  # fmt: skip
    if report.ranks and report.ranks[0] == report.ranks[1]:
        _line_at_rank(axes, report.ranks[0])
    _rank_axis(axes, ranks)
    _percent_axis(axes)
    axes.legend(loc="lower right" if _low(curve.mean) else "upper left")
    return figure


def energies_figure(named: Sequence[Named]) -> Figure:
    """One curve for each model: the paper's Figure 1."""
    figure, axes = _axes(_WIDE, 4.2)
    named = [(name, curve) for name, curve in named if curve.ranks]
    if len(named) > MOST_CURVES:
        _crowd(axes, [curve for _, curve in named])
    else:
        for number, (name, curve) in enumerate(named):
            colour = LIGHT[SERIES[number]]
            if len(named) <= _MOST_BANDS:
                axes.fill_between(curve.ranks, _in_percent(curve.lower), _in_percent(curve.upper), color=colour, alpha=0.13, linewidth=0)  # fmt: skip
            axes.plot(curve.ranks, _in_percent(curve.mean), color=colour, label=short(shown(name), 36), **_marks(curve.ranks))  # fmt: skip
    _rank_axis(axes, [rank for _, curve in named for rank in curve.ranks])
    _percent_axis(axes)
    if named:
        axes.legend(loc="upper left" if not _low([curve.mean[-1] for _, curve in named]) else "lower right")
    return figure


def trade_off_figure(found: TradeOff) -> Figure:
    """What each size keeps, with the points that the policies pick."""
    figure, axes = _axes(_WIDE, 4.0)
    for points, role, dashes, label in (
        (found.uniform, "s0", "-", "one rank for all"),
        (found.best, "s2", (0, (4, 2)), "a rank for each tensor, the best for the size"),
    ):
        start = [point for point in points if point[0] >= found.uniform[0][0]]
        axes.plot([x for x, _ in start], [100 * y for _, y in start], color=LIGHT[role], linestyle=dashes, label=label, linewidth=1.8)  # fmt: skip
    for way, marker, role, label, offset in (
        ("fixed rank", "o", "s0", "", (5, -12)),
        ("energy", "D", "s1", "each tensor at its threshold of energy", (-6, 6)),
        ("noise edge", "^", "s3", "each tensor at its noise edge", (-6, 8)),
    ):
        chosen = [choice for choice in found.choices if choice.way == way]
        if not chosen:
            continue
        x, y = [choice.nbytes for choice in chosen], [100 * choice.energy for choice in chosen]
        axes.plot(x, y, marker=marker, color=LIGHT[role], linestyle="", markersize=6, markeredgecolor=LIGHT["surface"], label=label or None, zorder=3)  # fmt: skip
        for choice in chosen:
            axes.annotate(choice.label, (choice.nbytes, 100 * choice.energy), xytext=offset, textcoords="offset points", fontsize=8.5, color=LIGHT[role], ha="left" if offset[0] > 0 else "right")  # fmt: skip
    for choice in found.choices:
        if choice.way == "this adapter":
            axes.plot([choice.nbytes], [100 * choice.energy], marker="o", markersize=13, markerfacecolor="none", markeredgecolor=LIGHT["ink"], markeredgewidth=1.6, linestyle="", label="this adapter", zorder=4)  # fmt: skip
    _size_axis(axes)
    axes.set_xlabel("size of the factors, each at its own rank")
    _percent_axis(axes)
    axes.set_ylabel("of the adapted ‖ΔW‖² kept")
    axes.legend(loc="lower right" if _low([y for _, y in found.uniform]) else "upper left")
    return figure


def sizes_figure(points: Sequence[tuple[str, float, float]]) -> Figure:
    """A zoo at a glance: adapter's share of its checkpoint against the energy that it keeps, a point for each model.

    Args:
        points: name, size of the adapter in bytes, energy kept.
    """
    figure, axes = _axes(_WIDE, 3.4)
    few = len(points) <= MOST_CURVES
    for number, (name, nbytes, energy) in enumerate(points):
        colour = LIGHT[SERIES[number]] if few else LIGHT["s0"]
        axes.plot([nbytes], [100 * energy], marker="o", linestyle="", markersize=8 if few else 5, alpha=1 if few else 0.45, color=colour, markeredgecolor=LIGHT["surface"], label=short(shown(name), 36) if few else None)  # fmt: skip
    _size_axis(axes)
    axes.set_xlabel("size of the adapter")
    _percent_axis(axes)
    if few and points:
        axes.legend(loc="best")
    return figure


def spectra_figure(spectra: Sequence[Spectrum], rank: int | None) -> Figure:
    """Singular values of some tensors, with the noise edge of each where it is known."""
    figure, axes = _axes(_WIDE, 3.9)
    names = labels([spectrum.tensor for spectrum in spectra])
    for number, spectrum in enumerate(spectra):
        colour = LIGHT[SERIES[number]]
        values = [value for value in spectrum.values if value > 0]
        axes.plot(range(1, len(values) + 1), values, color=colour, linewidth=1.7, label=short(shown(names[spectrum.tensor]), 40), **_marks(values))  # fmt: skip
        if spectrum.edge:
            axes.axhline(spectrum.edge, color=colour, linewidth=1, linestyle=(0, (2, 2)), zorder=1)
    if any(spectrum.edge for spectrum in spectra):
        axes.plot([], [], color=LIGHT["soft"], linewidth=1, linestyle=(0, (2, 2)), label="noise edge")
    longest = max((len(spectrum.values) for spectrum in spectra), default=1)
    if rank is not None:
        _line_at_rank(axes, rank)
    _rank_axis(axes, range(1, longest + 1))
    axes.set_xlabel("i")
    axes.set_yscale("log")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0), numticks=9))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))
    axes.set_ylabel("singular value σᵢ of ΔW")
    axes.legend(loc="lower left")
    return figure


def grid_figure(found: Grid) -> Figure:
    """Two maps of layer × projection: energy kept, and the ranks."""
    longest = max(len(short(name, 30)) for name in found.projections)
    left = 0.25 + 0.085 * longest
    columns, rows = len(found.layers), len(found.projections)
    cell = min(max((_WIDE - left - 0.9) / columns, 0.075), 0.62)
    row, gap = 0.27, 0.85
    high = 2 * rows * row + gap + 0.95
    wide = max(left + columns * cell + 0.95, 5.2)
    figure = canvas(wide, high)
    tops = (0.32, 0.32 + rows * row + gap)
    energies = [cell.energy for line in found.cells for cell in line if cell and cell.energy is not None]
    low, high_end = _span(energies)
    written = columns * 0.42 <= _WIDE - left - 0.9

    def of_energy(item: Cell) -> tuple[float | None, str]:
        return (None, "") if item.energy is None else (item.energy, f"{100 * item.energy:.0f}")

    picked = {item.ranks for line in found.cells for item in line if item and item.ranks}
    differ = len(picked) > 1

    def of_rank(item: Cell) -> tuple[float | None, str]:
        if item.ranks is None:
            return None, ""
        rank = item.ranks[1] if differ else item.needed
        return (None, ">") if rank is None else (math.log2(max(rank, 1)), str(rank))

    ranks = [value for line in found.cells for item in line if item and (value := of_rank(item)[0]) is not None]
    bottom_rank, top_rank = math.floor(min(ranks, default=0)), max(math.ceil(max(ranks, default=1)), math.floor(min(ranks, default=0)) + 1)  # fmt: skip
    told = "rank" if differ else f"rank that keeps {GOAL:.0%}"
    for top, look, (first, last), title, tick in (
        (tops[0], of_energy, (low, high_end), "energy kept, %", lambda value: f"{100 * value:.0f}"),
        (tops[1], of_rank, (bottom_rank, top_rank), told, lambda value: f"{2**value:.0f}"),
    ):
        box = (left / wide, 1 - (top + rows * row) / high, columns * cell / wide, rows * row / high)
        axes = figure.add_axes(box)
        _map(axes, found, look, (first, last), written=written)
        axes.text(0, -0.55, title, fontsize=9.5, color=LIGHT["ink"], ha="left", va="baseline")
        bar = figure.add_axes((box[0] + box[2] + 0.16 / wide, box[1], 0.13 / wide, box[3]))
        _scale(bar, (first, last), tick)
        if top == tops[1]:
            axes.set_xlabel("layer")
    return figure


def _map(
    axes: Axes, found: Grid, look: Callable[[Cell], tuple[float | None, str]], span: tuple[float, float], *, written: bool
) -> None:
    steps = [[_step(item and look(item)[0], span, present=item is not None) for item in line] for line in found.cells]
    colours = ListedColormap([LIGHT[f"h{step}"] for step in range(STEPS)] + [LIGHT["blank"]])
    norm = BoundaryNorm([value - 0.5 for value in range(STEPS + 2)], STEPS + 1)
    columns, rows = len(found.layers), len(found.projections)
    axes.pcolormesh(range(columns + 1), range(rows + 1), steps, cmap=colours, norm=norm, edgecolors=LIGHT["surface"], linewidth=0.8 if columns < 60 else 0.3)  # fmt: skip
    axes.set_xlim(0, columns)
    axes.set_ylim(rows, 0)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.set_yticks([number + 0.5 for number in range(rows)], [short(shown(name), 30) for name in found.projections])
    every = max(1, math.ceil(columns * max(map(len, found.layers)) / 90))
    axes.set_xticks(
        [number + 0.5 for number in range(0, columns, every)], [short(shown(name), 18) for name in found.layers[::every]]
    )
    if max(map(len, found.layers)) > 5:
        axes.tick_params(axis="x", rotation=35)
    if not written:
        return
    for y, line in enumerate(found.cells):
        for x, item in enumerate(line):
            if item is not None:
                text = look(item)[1] or "·"
                light = steps[y][x] == STEPS or steps[y][x] < STEPS // 2
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color=LIGHT["on-low" if light else "on-high"])  # fmt: skip


def _step(value: float | None, span: tuple[float, float], *, present: bool) -> float:
    """Which colour; `STEPS` is that of a cell without a number, nan that of no cell at all."""
    if not present:
        return math.nan
    if value is None:
        return STEPS
    return min(max(int((value - span[0]) / (span[1] - span[0]) * STEPS), 0), STEPS - 1)


def _scale(axes: Axes, span: tuple[float, float], tick: Callable[[float], str]) -> None:
    colours = ListedColormap([LIGHT[f"h{step}"] for step in range(STEPS)])
    axes.pcolormesh([0, 1], range(STEPS + 1), [[step] for step in range(STEPS)], cmap=colours)
    axes.grid(visible=False)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.yaxis.tick_right()
    places = (0, STEPS / 2, STEPS)
    axes.set_yticks(places, [tick(span[0] + place / STEPS * (span[1] - span[0])) for place in places])


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Round ends, at least a tenth apart.

    >>> _span([0.62, 0.88]), _span([]), _span([0.97, 1.0])
    ((0.6, 0.9), (0.0, 1.0), (0.9, 1.0))
    """
    if not values:
        return 0.0, 1.0
    low, high = math.floor(10 * min(values) + 1e-9) / 10, math.ceil(10 * max(values) - 1e-9) / 10
    if high - low < 0.09:
        low, high = (low - 0.1, high) if high >= 1 else (low, high + 0.1)
    return round(low, 1), round(high, 1)


def _crowd(axes: Axes, curves: Sequence[EnergyCurve]) -> None:
    for curve in curves:
        axes.plot(curve.ranks, _in_percent(curve.mean), color=LIGHT["s7"], linewidth=0.7, alpha=0.22)
    ranks = sorted(set.intersection(*(set(curve.ranks) for curve in curves)))
    if not ranks:
        return
    table = [[curve.at(rank) or 0.0 for curve in curves] for rank in ranks]
    quartiles = [statistics.quantiles(values, n=4, method="inclusive") for values in table]
    axes.fill_between(ranks, [100 * low for low, _, _ in quartiles], [100 * high for _, _, high in quartiles], color=LIGHT["s0"], alpha=0.2, linewidth=0, label="half of the models")  # fmt: skip
    axes.plot(ranks, [100 * middle for _, middle, _ in quartiles], color=LIGHT["s0"], label=f"median of {len(curves)} models")  # fmt: skip


def _axes(wide: float, high: float) -> tuple[Figure, Axes]:
    figure = canvas(wide, high)
    left, right, bottom, top = 0.72, 0.2, 0.55, 0.32
    return figure, figure.add_axes((left / wide, bottom / high, 1 - (left + right) / wide, 1 - (bottom + top) / high))


def _rank_axis(axes: Axes, ranks: Sequence[int] | range) -> None:
    most = max(ranks, default=1)
    axes.set_xscale("log", base=2)
    ticks = [2**power for power in range(int(math.log2(most)) + 1)]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(0.94 if most > 1 else 0.5, most * 1.06 if most > 1 else 2)
    axes.set_xlabel("rank r")


def _percent_axis(axes: Axes) -> None:
    axes.set_ylim(0, 101.5)
    axes.set_yticks(range(0, 101, 20), [f"{value} %" for value in range(0, 101, 20)])
    axes.set_ylabel("preserved energy Eᵣ")


def _size_axis(axes: Axes) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.04)
    subs = (1.0,) if high / low > 3000 else (1.0, 2.0, 5.0)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=subs, numticks=12))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value).replace(".0 ", " ")))


def _line_at_rank(axes: Axes, rank: int) -> None:
    axes.axvline(rank, color=LIGHT["soft"], linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    axes.annotate(f"this adapter: rank {rank}", (rank, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 4), textcoords="offset points", fontsize=8.5, color=LIGHT["soft"], ha="center", annotation_clip=False)  # fmt: skip


def _marks(points: Sequence[object]) -> dict[str, object]:
    """A line of one point is not seen."""
    return {"marker": "o", "markersize": 5} if len(points) < 2 else {}


def _in_percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


def _low(shares: Sequence[float]) -> bool:
    """Whether there is room for a legend under the lines' right ends."""
    return bool(shares) and min(shares[len(shares) // 2 :]) > 0.45


