"""Progress of a night: models, tensors, bytes per second, and when it will be over."""

from __future__ import annotations

import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from phlora_pipeline.render.text import line, printable
from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.extract import TaskReport
    from phlora_pipeline.plan import Task
    from phlora_pipeline.zoo.standing import Standing

WORTH_A_LINE = {"failed": "failed", "changed": "given up", "incomplete": "waiting"}
"""Ends of a model that are told one by one, in words; the others are counted."""


class Progress:
    """What is done of a night, in numbers. The clock is an argument; time counts from the first task on."""

    def __init__(self) -> None:
        self.models = self.all_models = self.tensors = self.all_tensors = self.read = 0
        self._costs: dict[str, float] = {}
        self._done = self._work = 0.0
        self._began: float | None = None

    def planned(self, tasks: Sequence[Task], models: int, now: float) -> None:
        """So much is to be done."""
        self._began = now
        self.all_models += models
        self.all_tensors += sum(len(member.block.pairs) for task in tasks for member in task.members)
        self._costs = {task.id: task.cost for task in tasks}
        self._work = sum(self._costs.values())

    def task_done(self, report: TaskReport) -> None:
        """A task is. One that was planned later, for a checkpoint that had changed, adds to what there was to do."""
        self.read += report.nbytes
        self.tensors += report.tensors
        self.all_tensors = max(self.all_tensors, self.tensors)
        self._done += self._costs.pop(report.task, 0.0)

    def model_done(self) -> None:
        """A model has ended, well or not."""
        self.models += 1
        self.all_models = max(self.all_models, self.models)

    @property
    def share(self) -> float:
        """Of the work that is done, by cost: tasks differ a thousandfold."""
        return min(self._done / self._work, 1.0) if self._work else 0.0

    def rate(self, now: float) -> float:
        """Bytes per second so far."""
        return self.read / self.seconds(now)

    def seconds(self, now: float) -> float:
        """Since it was planned."""
        return max(now - self._began, 1e-3) if self._began is not None else 1e-3

    def eta(self, now: float) -> float | None:
        """Seconds that are left at this pace; None before the first task and after the last."""
        return self.seconds(now) * (1 - self.share) / self.share if 0 < self.share < 1 else None

    def words(self, now: float) -> str:
        """In one line."""
        left = self.eta(now)
        eta = f", ETA {duration(left)}" if left is not None else ""
        return f"{self.models}/{self.all_models} models, {self.tensors}/{self.all_tensors} tensors, {size(self.rate(now))}/s{eta}"


def duration(seconds: float) -> str:
    """For people.

    >>> [duration(seconds) for seconds in (0.4, 89, 200, 9000)]
    ['0 s', '89 s', '3 min', '2.5 h']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Quiet:
    """Warnings, and nothing else."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing."""

    def looked(self, standings: Sequence[Standing]) -> None:
        """Nothing."""

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        """Nothing."""

    def task_done(self, report: TaskReport) -> None:
        """Nothing."""

    def model_done(self, model: str, state: str, reason: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Tell it."""
        self._say(f"warning: {text}")

    def _say(self, text: str) -> None:
        line(text, sys.stderr)


class _Told(Quiet):
    """What both kinds of progress tell in lines of their own."""

    def __init__(self) -> None:
        self._progress = Progress()

    def looked(self, standings: Sequence[Standing]) -> None:
        counts = Counter(standing.state for standing in standings)
        told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        self._say(f"{len(standings)} models in the zoo: {told}" if standings else "there are no models in the zoo")

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        self._progress.planned(tasks, models, time.monotonic())
        read = sum(task.nbytes for task in tasks)
        self._say(f"{models} models, {self._progress.all_tensors} tensors in {len(tasks)} tasks, {size(read)} to read")

    def task_done(self, report: TaskReport) -> None:
        self._progress.task_done(report)

    def model_done(self, model: str, state: str, reason: str) -> None:
        self._progress.model_done()
        if state in WORTH_A_LINE:
            self._say(f"{model}: {WORTH_A_LINE[state]}: {reason}")


class Lines(_Told):
    """A line of progress every so many seconds, whether or not something has happened since: a log that stands still worries.

    Each begins with the time, so that no two are equal: whoever collects logs may drop a line that repeats another one.
    """

    def __init__(self, *, every: float) -> None:
        """Of so many seconds; 0: at each task and model."""
        super().__init__()
        self._every, self._entered = every, time.monotonic()
        self._over = threading.Event()
        self._ticker = threading.Thread(target=self._tick, name="phlora-progress", daemon=True)

    def __enter__(self) -> Self:
        self._entered = time.monotonic()
        if self._every:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._every:
            self._ticker.join()
        if self._progress.models:
            self._tell()

    def task_done(self, report: TaskReport) -> None:
        super().task_done(report)
        self._at_once()

    def model_done(self, model: str, state: str, reason: str) -> None:
        super().model_done(model, state, reason)
        self._at_once()

    def _at_once(self) -> None:
        if not self._every:
            self._tell()

    def _tick(self) -> None:
        while not self._over.wait(self._every):
            self._tell()

    def _tell(self) -> None:
        now = time.monotonic()
        words = self._progress.words(now) if self._progress.all_models else "looking at checkpoints"
        self._say(f"[{now - self._entered:.1f} s] {words}")

    def _say(self, text: str) -> None:
        # One write: the ticker is another thread.
        print(f"{printable(text)}\n", end="", file=sys.stderr, flush=True)


class Bar(_Told):
    """A rich bar, by cost."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        super().__init__()
        self._console = Console(stderr=True)
        self._bar = RichProgress(
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.description}", markup=False),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: Any = self._bar.add_task("looking at checkpoints", total=None)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        super().planned(tasks, models)
        self._bar.update(self._task, total=1.0)
        self._redraw()

    def task_done(self, report: TaskReport) -> None:
        super().task_done(report)
        self._redraw()

    def model_done(self, model: str, state: str, reason: str) -> None:
        super().model_done(model, state, reason)
        self._redraw()

    def _redraw(self) -> None:
        made, now = self._progress, time.monotonic()
        told = f"{made.models}/{made.all_models} models, {made.tensors}/{made.all_tensors} tensors, {size(made.rate(now))}/s"
        self._bar.update(self._task, completed=made.share, description=told)

    def _say(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)
