"""What a person sees: a live bar on a terminal, a plain line every few seconds in a log; all on stderr."""

from __future__ import annotations

import os
import sys

from phlora_pipeline.console.extraction import Extraction
from phlora_pipeline.console.frame import Bar, Lines, Quiet
from phlora_pipeline.console.night import Night
from phlora_pipeline.console.writing import Writing

__all__ = ["INTERVAL", "Extraction", "Night", "Writing", "night_reporter", "reporter", "writer"]


def _interval(text: str) -> float:
    """A number of seconds that can be waited for.

    >>> [_interval(text) for text in ("0.5", "-1", "nan", "inf", "often")]
    [0.5, 0.0, 0.0, 86400.0, 10.0]
    """
    try:
        return min(max(0.0, float(text)), 86400.0)
    except ValueError:
        return 10.0


INTERVAL = _interval(os.environ.get("PHLORA_PROGRESS_INTERVAL", "10"))
"""Seconds between two lines of progress where there is no terminal."""


def reporter(*, quiet: bool) -> Extraction:
    """The right reporter for where stderr goes; a quiet one only warns."""
    return Extraction(_view(quiet=quiet))


def night_reporter(*, quiet: bool) -> Night:
    """The same for a night."""
    return Night(_view(quiet=quiet))


def writer(*, quiet: bool) -> Writing:
    """The same for what is written at length."""
    return Writing(_view(quiet=quiet))


def _view(*, quiet: bool) -> Quiet:
    if quiet:
        return Quiet()
    return Bar() if sys.stderr.isatty() else Lines(every=INTERVAL)
