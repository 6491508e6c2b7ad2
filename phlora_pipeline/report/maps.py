"""The two maps of layer × projection, one under the other: energy kept, and ranks."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from phlora_pipeline.report.drawing import canvas
from phlora_pipeline.report.frame import WIDE
from phlora_pipeline.report.grid import GOAL, Cell, Grid
from phlora_pipeline.report.palette import LIGHT, STEPS
from phlora_pipeline.report.words import short, shown
from phlora_pipeline.summary import percent

_ROW, _GAP, _TOP, _BAR = 0.29, 0.95, 0.42, 0.14  # inches
_RIGHT = 0.85
_LEAST, _MOST = 0.07, 0.7  # of a cell's width


@dataclass(frozen=True, slots=True)
class _Map:
    title: str
    look: Callable[[Cell], tuple[float | None, str]]  # a cell's value, and what is written in it
    span: tuple[float, float]
    tick: Callable[[float], str]


def grid_figure(found: Grid) -> Figure:
    """Both maps, or the one that has a value; numbers in the cells where there is room for them."""
    names = [short(shown(name), 30) for name in found.projections]
    left = 0.3 + 0.082 * max(map(len, names))
    width = min(max((WIDE - left - _RIGHT) / len(found.layers), _LEAST), _MOST)
    wide = max(left + width * len(found.layers) + _RIGHT, 5.0)
    maps = [kind for kind in (_energies(found), _ranks(found)) if _values(found, kind.look)]
    tall = _ROW * len(names)
    high = _TOP + len(maps) * tall + (len(maps) - 1) * _GAP + 0.55
    figure = canvas(wide, high)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set_xlim(0, wide)
    axes.set_ylim(high, 0)
    for number, kind in enumerate(maps):
        _draw(axes, found, names, kind, (left, _TOP + number * (tall + _GAP)), width)
    return figure


def _energies(found: Grid) -> _Map:
    def look(cell: Cell) -> tuple[float | None, str]:
        return (None, "") if cell.energy is None else (cell.energy, f"{100 * cell.energy:.0f}")

    return _Map("energy kept, %", look, _span(_values(found, look)), lambda value: f"{100 * value:.0f}")


def _ranks(found: Grid) -> _Map:
    """The ranks that there are; where all are the same, those that would be needed."""
    differ = ranks_differ(found)

    def look(cell: Cell) -> tuple[float | None, str]:
        if cell.ranks is None:
            return None, ""
        rank = cell.ranks[1] if differ else cell.needed
        return (None, ">") if rank is None else (math.log2(max(rank, 1)), str(rank))

    values = _values(found, look) or [0.0]
    low = math.floor(min(values))
    span = (low, max(math.ceil(max(values)), low + 1))
    title = "rank" if differ else f"rank that keeps {percent(GOAL, 0)}"
    return _Map(title, look, span, lambda value: f"{2**value:.0f}")


def ranks_differ(found: Grid) -> bool:
    """Whether the adapted tensors have ranks of their own."""
    return len({cell.ranks for line in found.cells for cell in line if cell and cell.ranks}) > 1


def _draw(axes: Axes, found: Grid, names: Sequence[str], kind: _Map, corner: tuple[float, float], width: float) -> None:
    left, top = corner
    columns, rows = len(found.layers), len(names)
    written = width >= 0.34
    boxes, colours = [], []
    for y, line in enumerate(found.cells):
        for x, cell in enumerate(line):
            if cell is None:
                continue
            value, text = kind.look(cell)
            role = "blank" if value is None else f"h{_step(value, kind.span)}"
            boxes.append(_box(left + x * width, top + y * _ROW, width, _ROW))
            colours.append(LIGHT[role])
            if written:
                ink = "on-low" if value is None or _step(value, kind.span) < STEPS // 2 else "on-high"
                at = (left + (x + 0.5) * width, top + (y + 0.5) * _ROW)
                _text(axes, *at, text or "·", ha="center", va="center", fontsize=8, color=LIGHT[ink])
    line_width = 0.8 if width > 0.15 else 0.3
    axes.add_collection(PolyCollection(boxes, facecolors=colours, edgecolors=LIGHT["surface"], linewidths=line_width))
    quiet: dict[str, Any] = {"color": LIGHT["soft"], "fontsize": 9}
    _text(axes, left, top - 0.12, kind.title, color=LIGHT["ink"], va="bottom")
    for y, name in enumerate(names):
        _text(axes, left - 0.1, top + (y + 0.5) * _ROW, name, ha="right", va="center", **quiet)
    _layer_names(axes, found.layers, (left, top + rows * _ROW), width)
    _scale(axes, kind, (left + columns * width + 0.18, top), rows * _ROW)


def _layer_names(axes: Axes, layers: Sequence[str], corner: tuple[float, float], width: float) -> None:
    longest = 0.08 * max(map(len, layers)) + 0.06
    every = max(1, math.ceil(longest / width))
    for x in range(0, len(layers), every):
        at = (corner[0] + (x + 0.5) * width, corner[1] + 0.09)
        _text(axes, *at, short(shown(layers[x]), 24), ha="center", va="top", color=LIGHT["soft"], fontsize=9)
    _text(axes, corner[0], corner[1] + 0.3, "layer", va="top", color=LIGHT["soft"], fontsize=9)


def _text(axes: Axes, x: float, y: float, told: str, **look: Any) -> None:
    """Of the figure: one of the axes takes twice the time, since it is clipped."""
    axes.figure.text(x, y, told, transform=axes.transData, **look)


def _scale(axes: Axes, kind: _Map, corner: tuple[float, float], tall: float) -> None:
    """The colours in their order, the largest at the top."""
    left, top = corner
    step = tall / STEPS
    boxes = [_box(left, top + tall - (number + 1) * step, _BAR, step) for number in range(STEPS)]
    axes.add_collection(
        PolyCollection(boxes, facecolors=[LIGHT[f"h{number}"] for number in range(STEPS)], edgecolors="none")
    )
    low, high = kind.span
    places = (0.0, 1.0) if tall < 0.8 else (0.0, 0.5, 1.0)
    for place in places:
        at = (left + _BAR + 0.07, top + tall * (1 - place))
        _text(axes, *at, kind.tick(low + place * (high - low)), va="center", color=LIGHT["soft"], fontsize=8.5)


def _box(left: float, top: float, width: float, high: float) -> list[tuple[float, float]]:
    return [(left, top), (left + width, top), (left + width, top + high), (left, top + high)]


def _values(found: Grid, look: Callable[[Cell], tuple[float | None, str]]) -> list[float]:
    told = (look(cell)[0] for line in found.cells for cell in line if cell is not None)
    return [value for value in told if value is not None]


def _step(value: float, span: tuple[float, float]) -> int:
    """Which colour."""
    return min(max(int((value - span[0]) / (span[1] - span[0]) * STEPS), 0), STEPS - 1)


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
