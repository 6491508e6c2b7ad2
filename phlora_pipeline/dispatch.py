"""Which worker does what next: a pure queue, without engine or clock.

Tasks are taken largest first when a worker is free (Graham's longest-first rule: makespan ≤ 4/3 of the best). Each worker
is told the task that it will probably do next, so that it can read ahead. The hint reserves that task as long as there is
other work; at the tail an idle worker takes a task that is only reserved. A worker's death charges the task it was
doing and nobody else: engines that retry on their own charge innocent neighbours.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from phlora_pipeline.plan import Task

W = TypeVar("W", bound=Hashable)

MAX_ATTEMPTS = 2


@dataclass(slots=True)
class Dispatcher(Generic[W]):
    """The state of one run's queue.

    Attributes:
        lost: block id → reason, of the tasks that were given up.
    """

    tasks: Iterable[Task]
    lost: dict[str, str] = field(default_factory=dict)
    _waiting: deque[Task] = field(init=False)
    _running: dict[W, Task] = field(init=False, default_factory=dict)
    _reserved: dict[W, Task] = field(init=False, default_factory=dict)
    _attempts: dict[str, int] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._waiting = deque(self.tasks)

    @property
    def busy(self) -> bool:
        """Whether any task is running."""
        return bool(self._running)

    def take(self, worker: W) -> tuple[Task, Task | None] | None:
        """The worker's next task and the hint for the one after; None where there is nothing left for it."""
        task = self._reserved.pop(worker, None) or self._pop() or self._steal()
        if task is None:
            return None
        self._running[worker] = task
        hint = self._pop()
        if hint is not None:
            self._reserved[worker] = hint
        return task, hint

    def done(self, worker: W) -> Task:
        """The worker has finished its task."""
        return self._running.pop(worker)

    def failed(self, worker: W, reason: str, *, died: bool) -> Task:
        """The worker's task failed, or killed it; it is repeated once, then given up.

        Args:
            worker: whose.
            reason: in words.
            died: whether the worker is gone, and its hint with it.
        """
        task = self._running.pop(worker)
        if died and (hint := self._reserved.pop(worker, None)) is not None:
            self._waiting.appendleft(hint)
        attempts = self._attempts[task.block.id] = self._attempts.get(task.block.id, 0) + 1
        if attempts >= MAX_ATTEMPTS:
            self.lost[task.block.id] = f"{reason} ({attempts} attempts)"
        else:
            self._waiting.append(task)
        return task

    def _pop(self) -> Task | None:
        return self._waiting.popleft() if self._waiting else None

    def _steal(self) -> Task | None:
        if not self._reserved:
            return None
        victim = max(self._reserved, key=lambda worker: self._reserved[worker].cost)
        return self._reserved.pop(victim)
