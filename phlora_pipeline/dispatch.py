"""Which worker does what next: a pure queue, without engine or clock.

A free worker takes the largest task that nobody has started (Graham's longest-first rule: makespan ≤ 4/3 of the best).
Each worker is told the task that it will probably do next, so that it can read ahead. That is a forecast, not an
assignment: to hold a large task back for a busy worker, while the others do small ones and then wait, costs up to twice
the best makespan. So a worker gets the one that it was told while the end is far off, where the order costs nothing, and
then only among tasks that are about as large. A worker's death charges the task that it was doing and nobody else: engines
that retry on their own charge innocent neighbours.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Hashable, Iterable
from dataclasses import InitVar, dataclass, field, replace
from typing import Generic, TypeVar

from phlora_pipeline.plan import Member, Task

W = TypeVar("W", bound=Hashable)

MAX_ATTEMPTS = 2

FAR_FROM_END = 2
"""While what waits would keep every worker busy for as long as this many of the largest task, the order costs nothing."""

ALIKE = 0.9
"""Costs are estimates: nine tenths of the largest counts as equally large. The bound above grows by 1/ALIKE at most."""


_Entry = tuple[int, float, str, Task]
"""A task behind its place in the queue: cohort, cost (negative), id."""


@dataclass(slots=True)
class Dispatcher(Generic[W]):
    """The state of one run's queue.

    Attributes:
        workers: how many share it; only the forecasts depend on that.
        lost: part URL → reason, of the members of the tasks that were given up.
    """

    tasks: InitVar[Iterable[Task]]
    workers: int = 1
    lost: dict[str, str] = field(default_factory=dict)
    _waiting: list[_Entry] = field(init=False)
    _running: dict[W, Task] = field(init=False, default_factory=dict)
    _told: dict[W, _Entry] = field(init=False, default_factory=dict)
    _work: float = field(init=False, default=0.0)
    _attempts: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self, tasks: Iterable[Task]) -> None:
        self._waiting = sorted(map(_entry, tasks))
        self._work = -sum(entry[1] for entry in self._waiting)

    @property
    def unfinished(self) -> bool:
        """Whether any task is waiting or running."""
        return bool(self._waiting or self._running)

    @property
    def waiting(self) -> int:
        """How many tasks nobody has started."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """How many tasks are under way."""
        return len(self._running)

    def works(self, worker: W) -> bool:
        """Whether the worker has a task."""
        return worker in self._running

    def task_of(self, worker: W) -> Task:
        """What the worker is doing."""
        return self._running[worker]

    def add(self, tasks: Iterable[Task]) -> None:
        """More to do."""
        for task in tasks:
            entry = _entry(task)
            bisect.insort(self._waiting, entry)
            self._work -= entry[1]

    def drop(self, unwanted: Callable[[Member], bool]) -> None:
        """Take members out of what is waiting: nobody wants their parts any more."""
        kept: list[_Entry] = []
        for entry in self._waiting:
            task = entry[-1]
            members = tuple(member for member in task.members if not unwanted(member))
            if len(members) == len(task.members):
                kept.append(entry)
            elif members:
                kept.append(_entry(replace(task, members=members)))
        self._waiting = sorted(kept)
        self._work = -sum(entry[1] for entry in self._waiting)

    def take(self, worker: W) -> tuple[Task, Task | None] | None:
        """The worker's next task and the forecast of the one after; None where there is nothing left for it."""
        told = self._told.pop(worker, None)
        if not self._waiting:
            return None
        entry = self._waiting.pop(self._choose(told))
        self._work += entry[1]
        task = entry[-1]
        self._told = {other: known for other, known in self._told.items() if known is not entry}
        self._running[worker] = task
        forecast = self._forecast()
        if forecast is not None:
            self._told[worker] = forecast
        return task, forecast[-1] if forecast else None

    def done(self, worker: W) -> Task:
        """The worker has finished its task."""
        return self._running.pop(worker)

    def failed(self, worker: W, reason: str, *, died: bool, charged: bool = True) -> Task:
        """The worker's task failed, or killed it: it is repeated once, then done model by model, then given up.

        Args:
            worker: whose.
            reason: in words.
            died: whether the worker is gone, and what it has read ahead with it.
            charged: whether the task may be at fault; not where its whole node went.
        """
        task = self._running.pop(worker)
        if died:
            self._told.pop(worker, None)
        attempts = self._attempts[task.id] = self._attempts.get(task.id, 0) + charged
        if attempts < MAX_ATTEMPTS:
            self.add([task])
        elif len(task.members) > 1:
            self.add(task.alone())
        else:
            self.lost[task.members[0].part_url] = f"{reason} ({attempts} attempts)"
        return task

    def _choose(self, told: _Entry | None) -> int:
        """Index of the task that the worker was told, far from the end; else of a largest: that one, one that nobody was told, any."""
        cohort, cost, *_ = self._waiting[0]
        if told is not None and self._work > -cost * FAR_FROM_END * self.workers:
            index = bisect.bisect_left(self._waiting, told[:3])
            if index < len(self._waiting) and self._waiting[index] is told:
                return index
        others = {name for *_, name, _ in self._told.values()}
        nobodys = None
        alike = itertools.takewhile(lambda entry: entry[0] == cohort and entry[1] <= ALIKE * cost, self._waiting)
        for index, entry in enumerate(alike):
            if entry is told:
                return index
            if nobodys is None and entry[2] not in others:
                nobodys = index
            if nobodys is not None and told is None:
                break
        return nobodys or 0

    def _forecast(self) -> _Entry | None:
        """The largest that nobody was told, once every idle worker has got a task and a forecast of its own."""
        idle = max(self.workers - len(self._running), 0)
        others = {name for *_, name, _ in self._told.values()}
        ahead = itertools.islice(self._waiting, 2 * idle, None)
        return next((entry for entry in ahead if entry[2] not in others), None)


def _entry(task: Task) -> _Entry:
    return task.cohort, -task.cost, task.id, task
