"""Progress of one extraction."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.extract import TaskReport
    from phlora_pipeline.plan import Plan


class Lines:
    """Plain lines: the first and last task, and one per interval between."""

    def __init__(self, *, every: float) -> None:
        self._every = every
        self._began = self._told = time.monotonic()
        self._done = self._read = self._reused = self._total = 0
        self._bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._done and self._every != float("inf"):
            self._tell()

    def planned(self, plan: Plan) -> None:
        self._total, self._bytes = sum(len(task.block.pairs) for task in plan.tasks), plan.nbytes
        if self._every != float("inf"):
            print(
                f"{self._total} tensors in {len(plan.tasks)} tasks, {size(self._bytes)} to read",
                file=sys.stderr,
                flush=True,
            )

    def task_done(self, report: TaskReport) -> None:
        self._done += report.tensors
        self._read += report.nbytes
        self._reused += report.reused
        if time.monotonic() - self._told >= self._every:
            self._tell()

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds = max(self._told - self._began, 1e-3)
        reused = f", {self._reused} tasks reused" if self._reused else ""
        print(
            f"{self._done}/{self._total} tensors, {size(self._read)} read, {size(self._read / seconds)}/s, {seconds:.0f} s{reused}",
            file=sys.stderr,
            flush=True,
        )


class Bar:
    """A rich bar, by bytes: tasks differ a thousandfold."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("reading headers", total=None)
        self._done = self._total = 0
        self._weights: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def planned(self, plan: Plan) -> None:
        self._total = sum(len(task.block.pairs) for task in plan.tasks)
        self._weights = {task.id: task.cost for task in plan.tasks}
        self._progress.update(self._task, total=sum(self._weights.values()), description=f"0/{self._total} tensors")

    def task_done(self, report: TaskReport) -> None:
        self._done += report.tensors
        self._progress.update(
            self._task,
            advance=self._weights.get(report.task, 0.0),
            description=f"{self._done}/{self._total} tensors",
        )

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)
