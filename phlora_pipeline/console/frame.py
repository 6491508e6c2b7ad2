"""The frame of all progress: a bar on a terminal, a line every so many seconds in a log, warnings alone where a machine reads."""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Any, Self

from phlora_pipeline.render.text import printable
from phlora_pipeline.summary import size, span


class Pace:
    """How far, how fast, and how long still: bytes, and shares of the work by whatever it is counted in. The clock is an argument."""

    def __init__(self) -> None:
        self.moved = 0
        self._done = self._work = 0.0
        self._began: float | None = None

    def begin(self, work: float, now: float) -> None:
        """So much is to be done, and time counts from here."""
        self._work, self._began = work, now

    def advance(self, work: float, nbytes: int) -> None:
        """So much of it is."""
        self._done += work
        self.moved += nbytes

    @property
    def share(self) -> float:
        """Of the work that is done."""
        return min(self._done / self._work, 1.0) if self._work else 0.0

    def rate(self, now: float) -> float:
        """Bytes per second so far."""
        return self.moved / self._seconds(now)

    def left(self, now: float) -> float | None:
        """Seconds at this pace; None before anything is done, and at the end."""
        return self._seconds(now) * (1 - self.share) / self.share if 0 < self.share < 1 else None

    def words(self, now: float) -> str:
        """What a line of progress ends with."""
        left = self.left(now)
        return f"{size(self.rate(now))}/s{f', ETA {span(left)}' if left is not None else ''}"

    def _seconds(self, now: float) -> float:
        return max(now - self._began, 1e-3) if self._began is not None else 1e-3


class Reporter(ABC):
    """An observer of a command, which is a context: counts what is done, and has it shown."""

    first = "reading headers"
    """What is shown before anything is planned."""

    def __init__(self, view: Quiet) -> None:
        self._view = view
        self.pace = Pace()

    def __enter__(self) -> Self:
        self._view.begin(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._view.end()

    def warn(self, text: str) -> None:
        """Something that the user should know, in one line."""
        self._view.warn(text)

    @property
    @abstractmethod
    def done(self) -> int:
        """How many there are of what is counted; 0: there is no progress to tell of."""

    @abstractmethod
    def words(self, now: float) -> str:
        """How far it is, in one line; `first` where that is not known."""


class Quiet:
    """Warnings, and nothing else."""

    def begin(self, reporter: Reporter) -> None:
        """Show the progress of this one from now on."""

    def changed(self) -> None:
        """There is more of it."""

    def end(self) -> None:
        """That was all."""

    def say(self, text: str) -> None:
        """A line of its own."""

    def warn(self, text: str) -> None:
        """The same of something that nobody should miss."""
        _line(f"warning: {text}")


class Lines(Quiet):
    """A line of progress every so many seconds, whether or not something has happened since: a log that stands still worries.

    Each begins with the time, so that no two are equal: whoever collects logs may drop a line that repeats another one.
    """

    def __init__(self, *, every: float) -> None:
        """Of so many seconds; 0: whenever there is more."""
        self._every = every
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="phlora-progress", daemon=True)

    def begin(self, reporter: Reporter) -> None:
        self._reporter, self._began = reporter, time.monotonic()
        if self._every:
            self._ticker.start()

    def changed(self) -> None:
        if not self._every:
            self._tell()

    def end(self) -> None:
        self._over.set()
        if self._every:
            self._ticker.join()
        if self._reporter.done:
            self._tell()

    def say(self, text: str) -> None:
        _line(text)

    def _tick(self) -> None:
        while not self._over.wait(self._every):
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        _line(f"[{now - self._began:.1f} s] {self._reporter.words(now)}")


class Bar(Quiet):
    """A rich bar: the share of the work, and the same words."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._console = Console(stderr=True)
        columns = BarColumn(), TextColumn("{task.percentage:>3.0f} %"), TextColumn("{task.description}", markup=False)
        self._bar = Progress(*columns, console=self._console)

    def begin(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._task = self._bar.add_task(reporter.first, total=None)
        self._bar.start()

    def changed(self) -> None:
        words = self._reporter.words(time.monotonic())
        self._bar.update(self._task, total=1.0, completed=self._reporter.pace.share, description=words)

    def end(self) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def _print(self, text: str, **how: Any) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True, **how)


def _line(text: str) -> None:
    # One write: a view's ticker is another thread.
    print(f"{printable(text)}\n", end="", file=sys.stderr, flush=True)
