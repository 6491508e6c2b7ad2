"""An empty plot: its scales, rules and labels. matplotlib's own ticks cost more time than all the rest of a page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from phlora_pipeline.report.drawing import canvas
from phlora_pipeline.report.palette import LIGHT

WIDE = 9.9
"""Inches: what a page has room for."""

_LEFT, _RIGHT, _BOTTOM, _TOP = 0.78, 0.3, 0.58, 0.34


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis.

    Attributes:
        low, high: its ends.
        ticks: (value, label), a rule through each.
        label: of the axis.
        log: whether it is logarithmic.
    """

    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    label: str
    log: bool = True


def frame(x: Scale, y: Scale, *, high: float = 3.9) -> tuple[Figure, Axes]:
    """A figure with room for one plot, and its axes.

    Args:
        x, y: the scales.
        high: of the figure, in inches.
    """
    figure = canvas(WIDE, high)
    box = (_LEFT / WIDE, _BOTTOM / high, 1 - (_LEFT + _RIGHT) / WIDE, 1 - (_BOTTOM + _TOP) / high)
    axes = figure.add_axes(box)
    axes.set_axis_off()
    for scale, set_scale, set_limits in ((x, axes.set_xscale, axes.set_xlim), (y, axes.set_yscale, axes.set_ylim)):
        if scale.log:
            set_scale("log")
        set_limits(scale.low, scale.high)
    across = blended_transform_factory(axes.transData, axes.transAxes)
    along = blended_transform_factory(axes.transAxes, axes.transData)
    inch_x, inch_y = 1 / (WIDE * box[2]), 1 / (high * box[3])
    quiet: dict[str, Any] = {"color": LIGHT["soft"]}  # a text of the axes takes twice the time: it is clipped, too
    for scale, draw, transform in ((x, axes.vlines, across), (y, axes.hlines, along)):
        draw(
            [value for value, _ in scale.ticks], 0, 1, transform=transform, color=LIGHT["rule"], linewidth=0.8, zorder=0
        )
    for value, label in x.ticks:
        figure.text(value, -0.09 * inch_y, label, transform=across, ha="center", va="top", **quiet)
    for value, label in y.ticks:
        figure.text(-0.09 * inch_x, value, label, transform=along, ha="right", va="center", **quiet)
    figure.text(1, -0.36 * inch_y, x.label, transform=axes.transAxes, ha="right", va="top", **quiet)
    figure.text(-(_LEFT - 0.08) * inch_x, 1 + 0.1 * inch_y, y.label, transform=axes.transAxes, ha="left", **quiet)
    return figure, axes


def rank_scale(most: int, label: str = "rank r") -> Scale:
    """Powers of two."""
    ticks = tuple((float(2**power), str(2**power)) for power in range(int(math.log2(max(most, 1))) + 1))
    return Scale(0.93, most * 1.07, ticks, label) if most > 1 else Scale(0.5, 2.0, ticks, label)


def percent_scale(label: str) -> Scale:
    """0 to 100 %."""
    return Scale(0, 102, tuple((float(value), f"{value} %") for value in range(0, 101, 20)), label, log=False)


def log_scale(values: Sequence[float], told: Callable[[float], str], label: str, *, most: int = 9) -> Scale:
    """Over positive values, with ticks at 1, 2, 5 of each power of ten, or at fewer where they span many.

    >>> [told for _, told in log_scale([3.0, 80.0], "{:g}".format, "").ticks]
    ['5', '10', '20', '50']
    """
    low, high = (min(values), max(values)) if values else (1.0, 10.0)
    margin = max((high / low) ** 0.04 * 1.03, math.sqrt(5 * low / high))  # a single value is not all of an axis
    low, high = low / margin, high * margin
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for heads in ((1, 2, 5), (1, 3), (1,)):
        ticks = [head * 10.0**power for power in powers for head in heads if low <= head * 10.0**power <= high]
        if len(ticks) <= most:
            break
    every = math.ceil(len(ticks) / most) or 1
    return Scale(low, high, tuple((tick, told(tick)) for tick in ticks[::every]), label)
