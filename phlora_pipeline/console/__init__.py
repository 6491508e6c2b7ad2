"""What a person sees: a live bar on a terminal, a plain line every few seconds in a log; all on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from phlora_pipeline.console import extraction, night, writing

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.extract import TaskReport
    from phlora_pipeline.plan import Plan, Task
    from phlora_pipeline.zoo.standing import Standing


def _interval(text: str) -> float:
    try:
        return max(float(text), 0.0)
    except ValueError:
        return 10.0


INTERVAL = _interval(os.environ.get("PHLORA_PROGRESS_INTERVAL", "10"))
"""Seconds between two lines of progress where there is no terminal."""


class Reporter(Protocol):
    """An observer that is also a context."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def planned(self, plan: Plan) -> None: ...
    def task_done(self, report: TaskReport) -> None: ...
    def warn(self, text: str) -> None: ...


class NightReporter(Protocol):
    """The same for a night: a `zoo.result.Observer`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def looked(self, standings: Sequence[Standing]) -> None: ...
    def planned(self, tasks: Sequence[Task], models: int) -> None: ...
    def task_done(self, report: TaskReport) -> None: ...
    def model_done(self, model: str, state: str, reason: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Writer(Protocol):
    """The same for what is written at length: a `merge.Observer`."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def planned(self, shards: int, nbytes: int) -> None: ...
    def wrote(self, nbytes: int) -> None: ...
    def warn(self, text: str) -> None: ...


def reporter(*, quiet: bool) -> Reporter:
    """The right reporter for where stderr goes."""
    if quiet:
        return extraction.Lines(every=float("inf"))
    return extraction.Bar() if sys.stderr.isatty() else extraction.Lines(every=INTERVAL)


def night_reporter(*, quiet: bool) -> NightReporter:
    """The right reporter of a night for where stderr goes; a quiet one only warns."""
    if quiet:
        return night.Quiet()
    return night.Bar() if sys.stderr.isatty() else night.Lines(every=INTERVAL)


def writer(*, quiet: bool) -> Writer:
    """The right reporter of what is written for where stderr goes."""
    if quiet:
        return writing.Lines(every=float("inf"))
    return writing.Bar() if sys.stderr.isatty() else writing.Lines(every=INTERVAL)
