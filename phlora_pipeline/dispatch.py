"""Which worker does what next: a pure queue, without engine or clock.

A free worker takes the largest task that nobody has started (Graham's longest-first rule: makespan ≤ 4/3 of the best).
Each worker is told the task that it will probably do next, so that it can read ahead. That is a forecast, not an
assignment: to hold a large task back for a busy worker, while the others do small ones and then wait, costs up to twice
the best makespan. Only among tasks that are about as large does a worker get the one that it was told. A worker's death
charges the task that it was doing and nobody else: engines that retry on their own charge innocent neighbours.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from phlora_pipeline.plan import Task

W = TypeVar("W", bound=Hashable)

MAX_ATTEMPTS = 2

ALIKE = 0.9
"""Costs are estimates: nine tenths of the largest counts as equally large. The bound above grows by 1/ALIKE at most."""


@dataclass(slots=True)
class Dispatcher(Generic[W]):
    """The state of one run's queue.

    Attributes:
        workers: how many share it; only the forecasts depend on that.
        lost: block id → reason, of the tasks that were given up.
    """

    tasks: Iterable[Task]
    workers: int = 1
    lost: dict[str, str] = field(default_factory=dict)
    _waiting: list[Task] = field(init=False)
    _running: dict[W, Task] = field(init=False, default_factory=dict)
    _told: dict[W, str] = field(init=False, default_factory=dict)
    _attempts: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = sorted(self.tasks, key=_largest_first)

    @property
    def unfinished(self) -> bool:
        """Whether any task is waiting or running."""
        return bool(self._waiting or self._running)

    def works(self, worker: W) -> bool:
        """Whether the worker has a task."""
        return worker in self._running

    def take(self, worker: W) -> tuple[Task, Task | None] | None:
        """The worker's next task and the forecast of the one after; None where there is nothing left for it."""
        told = self._told.pop(worker, None)
        if not self._waiting:
            return None
        task = self._waiting.pop(self._choose(told))
        self._told = {other: block for other, block in self._told.items() if block != task.block.id}
        self._running[worker] = task
        forecast = self._forecast()
        if forecast is not None:
            self._told[worker] = forecast.block.id
        return task, forecast

    def done(self, worker: W) -> Task:
        """The worker has finished its task."""
        return self._running.pop(worker)

    def failed(self, worker: W, reason: str, *, died: bool) -> Task:
        """The worker's task failed, or killed it; it is repeated once, then given up.

        Args:
            worker: whose.
            reason: in words.
            died: whether the worker is gone, and what it has read ahead with it.
        """
        task = self._running.pop(worker)
        if died:
            self._told.pop(worker, None)
        attempts = self._attempts[task.block.id] = self._attempts.get(task.block.id, 0) + 1
        if attempts >= MAX_ATTEMPTS:
            self.lost[task.block.id] = f"{reason} ({attempts} attempts)"
        else:
            bisect.insort(self._waiting, task, key=_largest_first)
        return task

    def _choose(self, told: str | None) -> int:
        """Index of a largest task: the one that the worker was told, else one that nobody was, else any."""
        others = set(self._told.values())
        least = ALIKE * self._waiting[0].cost
        nobodys = None
        for index, task in enumerate(itertools.takewhile(lambda task: task.cost >= least, self._waiting)):
            if task.block.id == told:
                return index
            if nobodys is None and task.block.id not in others:
                nobodys = index
            if nobodys is not None and told is None:
                break
        return nobodys or 0

    def _forecast(self) -> Task | None:
        """The largest that nobody was told, once every idle worker has got a task and a forecast of its own."""
        idle = max(self.workers - len(self._running), 0)
        others = set(self._told.values())
        ahead = itertools.islice(self._waiting, 2 * idle, None)
        return next((task for task in ahead if task.block.id not in others), None)


def _largest_first(task: Task) -> tuple[float, str]:
    return -task.cost, task.block.id
