"""Figures as SVG and PNG: the same bytes for the same figure, text as text, colours by their role. Home of matplotlib, with `plots`."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Iterator
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from phlora_pipeline.report.palette import LIGHT, stylesheet, with_variables
from phlora_pipeline.report.words import MADE_BY

_STYLE: Any = {  # rc_context takes names as literals only
    "svg.fonttype": "none",
    "svg.hashsalt": MADE_BY,
    "text.parse_math": False,  # a name with two dollar signs is a name
    "axes.unicode_minus": False,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same widths everywhere
    "font.size": 9.5,
    "text.color": LIGHT["ink"],
    "axes.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
}
_IDS = re.compile(r'(\bid="|url\(#|href="#)')
_TITLE = 0.4  # inches
_TAGS = re.compile(r"<[^>]+>")
_DIGITS = re.compile(r"(\.\d\d)\d+")  # a hundredth of a point is finer than any screen
_FONTS = re.compile(r"font-family: [^;\"]*;? ?")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """In which every figure is made and written."""
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        # A name in a script that the font lacks: a browser has other fonts, and a box in a PNG is no reason to warn.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def canvas(width: float, height: float) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def titled(figure: Figure, title: str) -> Figure:
    """With a title over it, in room of its own, for files that stand alone."""
    wide, high = figure.get_size_inches()
    taller = high + _TITLE
    figure.set_size_inches(wide, taller)
    for axes in figure.axes:
        left, bottom, width, tall = axes.get_position().bounds
        axes.set_position((left, bottom * high / taller, width, tall * high / taller))
    figure.text(0.1 / wide, 1 - 0.12 / taller, title, ha="left", va="top", fontsize=12)
    return figure


def inline_svg(figure: Figure, key: str, told: str) -> str:
    """For a page: without a prolog, its ids under a key of its own, named for those who cannot see it.

    Args:
        figure: what is drawn.
        key: no two figures of a page share one.
        told: what it shows.
    """
    body = _svg(figure)
    body = body[body.index("<svg ") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)
    body = _IDS.sub(rf"\g<1>{key}-", _FONTS.sub("", with_variables(body)))
    body = _TAGS.sub(lambda found: _DIGITS.sub(r"\1", found[0]), re.sub(r"\n\s*", " ", body))
    width = figure.get_figwidth() * 96
    opening = f'<svg role="img" aria-labelledby="{key}-title" class="plot" style="max-width:{width:.0f}px" '
    body = re.sub(r'^<svg (.*?)width="[^"]*" height="[^"]*"', lambda found: opening + found[1], body, count=1)
    return body.replace(">", f'><title id="{key}-title">{escape(told)}</title>', 1)


def svg_file(figure: Figure) -> bytes:
    """A file of its own, which follows the reader's colour scheme as the page does."""
    fonts = "text{font-family:system-ui,'Segoe UI',Roboto,'Helvetica Neue',Arial,sans-serif!important}"
    own = f'<style type="text/css">{stylesheet()}{fonts}svg{{background:var(--surface)}}</style>'
    body = with_variables(_svg(figure))
    return re.sub(r'(<svg [^>]*version="1.1">)', lambda found: found[1] + own, body, count=1).encode()


def png_file(figure: Figure) -> bytes:
    """In the light colours, at twice a screen's resolution."""
    sink = io.BytesIO()
    figure.savefig(sink, format="png", dpi=192, facecolor=LIGHT["surface"], metadata={"Software": MADE_BY})
    return sink.getvalue()


def _svg(figure: Figure) -> str:
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": MADE_BY})
    return sink.getvalue()
