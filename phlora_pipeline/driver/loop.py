"""The loop over Ray's actors: who does what next is `dispatch`'s, where actors are is `pool`'s."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.driver.starts import FalseStarts
from phlora_pipeline.engine import Job, Listener, Resources, words
from phlora_pipeline.errors import DeviceError, PhloraError
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.pool import Pool

POLL_SECONDS = 1.0
"""How long the loop waits before it looks whether it should stop."""

GROW_SECONDS = 5.0
"""How often it looks whether nodes have come."""

REST_SECONDS = 5.0
"""A worker that has said nothing for so long is asked whether it is there: if it died in its sleep, its next task did not kill it."""

MAX_DESKS = 3
"""Processes that a job may lose before its listener is told."""

MAX_LOSSES = 10
"""Nodes that a task may lose before it is taken to be at fault."""


class Loop:
    """Hands out tasks until all have ended. A slot takes part once its actor has started, which may be never.

    A task that were given to an actor still waiting for its place in the cluster would wait with it, and hold up the run.
    """

    def __init__(
        self,
        ray: Any,
        pool: Pool,
        queue: Dispatcher[int],
        listener: Listener,
        resources: Resources,
        every_turn: Callable[[], object] = lambda: None,
    ) -> None:
        self._ray, self._pool, self._queue, self._listener = ray, pool, queue, listener
        self._every_turn = every_turn
        self._calls: dict[Any, int] = {}
        self._backlog: deque[Job] = deque()
        self._jobs: dict[Any, tuple[int, Job]] = {}  # call → desk, and what is done there
        self._opening: dict[Any, int] = {}  # call → desk
        self._heard: dict[int, float] = {}  # slot → when it last answered
        self._worker_starts, self._desk_starts = FalseStarts(), FalseStarts()
        self._resting: dict[int, float] = {}  # slot whose worker did not start → when it gets another
        self._closed: dict[int, float] = {}  # desk, likewise
        self._losses: dict[str, int] = {}
        self._desks_lost: dict[int, int] = {}  # job, which is kept as long as it is wanted → processes that it was in
        self._start_seconds = resources.start_seconds
        self._missing: dict[str, float] = {}  # who has no place in the cluster → since when
        self._grown = -GROW_SECONDS

    def run(self) -> dict[str, str]:
        queue = self._queue
        while True:
            self._every_turn()
            stopping = self._listener.stopping()
            if not stopping:
                self._listener.more(queue)
                self._grow()
                self._start_again()
                self._hand_out()
            self._backlog.extend(self._listener.jobs(queue.lost))
            self._hand_out_jobs()
            if not self._jobs and not self._backlog and not (queue.running if stopping else queue.unfinished):
                return queue.lost
            if not (waiting := [*self._calls, *self._jobs, *self._opening]):
                time.sleep(POLL_SECONDS)
                continue
            finished, _ = self._ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
            for reference in finished:
                self._ended(reference)
            self._require_places()

    def _ended(self, reference: Any) -> None:
        answer = self._answer(reference)
        if reference in self._jobs:
            self._job_ended(*self._jobs.pop(reference), answer)
        elif reference in self._opening:
            self._desk_opened(self._opening.pop(reference), answer)
        else:
            self._call_ended(self._calls.pop(reference), answer)

    def _job_ended(self, desk: int, job: Job, answer: Any) -> None:
        if isinstance(answer, self._ray.exceptions.RayError):
            self._pool.close_desk(desk)
            if not isinstance(answer, self._ray.exceptions.RayTaskError) and self._may_lose_desk(job):
                self._backlog.append(job)
                return
        self._desks_lost.pop(id(job), None)
        self._listener.ended(job, answer)

    def _desk_opened(self, desk: int, answer: Any) -> None:
        if isinstance(answer, Exception):
            self._pool.close_desk(desk)
            there = bool(self._pool.open_desks)
            self._closed[desk] = self._false_start(
                "processes that publish", self._desk_starts, self._pool.desks, answer, there=there
            )
        else:
            self._desk_starts.end()
            self._pool.desk_is_open(desk)

    def _call_ended(self, slot: int, answer: Any) -> None:
        self._heard[slot] = time.monotonic()
        if isinstance(answer, TaskReport):
            self._queue.done(slot)
            self._listener.on_report(answer)
        elif isinstance(answer, str):
            self._worker_starts.end()
            self._pool.ready(slot, answer)
        elif isinstance(answer, PhloraError):
            raise answer
        else:
            self._failed(slot, answer)

    def _failed(self, slot: int, error: Exception) -> None:
        """A task raised, or its worker died: at work, in its sleep, or before it had started."""
        died = not isinstance(error, self._ray.exceptions.RayTaskError)
        if self._queue.works(slot):
            reason = ("its worker died: " if died else "") + words(getattr(error, "cause", None) or error)
            # Of a worker that died alone its node tells, and the error is another. When a node goes at once, all that there
            # is for a quarter of a minute is a connection that broke.
            unknown = isinstance(error, self._ray.exceptions.ActorUnavailableError)
            node_went = died and (unknown or self._pool.node_is_gone(slot))
            task = self._queue.failed(slot, reason, died=died, charged=not (node_went and self._may_lose(slot)))
            self._listener.retried(task, reason, died=died)
            if not died:
                return
        elif slot not in (started := self._pool.started):
            there = bool(started)
            self._resting[slot] = self._false_start("workers", self._worker_starts, self._pool.size, error, there=there)
            return
        self._calls[self._pool.start(slot)] = slot

    def _false_start(self, who: str, starts: FalseStarts, places: int, error: Exception, *, there: bool) -> float:
        """When to try again; while others are `there`, as often as it takes: one bad node does not end a night."""
        now = time.monotonic()
        again = starts.another(now)
        if starts.hopeless(places, now) and not there:
            raise DeviceError(
                f"{starts.count} Ray {who} died before their first task, within {now - starts.since:.0f} s, the last one of: {words(error)}",
                remedy="look at the logs of the node; is phlora-pipeline installed there, in this version?",
            ) from error
        return again

    def _start_again(self) -> None:
        """Workers, where the last one did not start and the pause is over."""
        now = time.monotonic()
        for slot in [slot for slot, again in self._resting.items() if now >= again]:
            del self._resting[slot]
            self._calls[self._pool.start(slot)] = slot

    def _may_lose(self, slot: int) -> bool:
        task = self._queue.task_of(slot)
        self._losses[task.id] = self._losses.get(task.id, 0) + 1
        return self._losses[task.id] <= MAX_LOSSES

    def _may_lose_desk(self, job: Job) -> bool:
        """Whether its process's end is nobody's fault yet: nodes go, and what a job has done stays done."""
        self._desks_lost[id(job)] = self._desks_lost.get(id(job), 0) + 1
        return self._desks_lost[id(job)] <= MAX_DESKS

    def _answer(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            return cause if isinstance(cause, PhloraError) else error

    def _grow(self) -> None:
        """Start actors for what has come into the cluster since, and no more than there are tasks."""
        if time.monotonic() - self._grown < GROW_SECONDS:
            return
        self._grown = time.monotonic()
        wanted = min(self._pool.wanted(), self._queue.waiting + self._queue.running)
        for slot in range(self._pool.size, wanted):
            self._calls[self._pool.start(slot)] = slot
        self._queue.workers = self._pool.size

    def _hand_out(self) -> None:
        """To every idle slot, not only the one that has just ended: a task that came back may be all that is left."""
        if not self._queue.waiting:
            return
        busy, now = set(self._calls.values()), time.monotonic()
        for slot in self._pool.started:
            if slot in busy:
                continue
            if now - self._heard.get(slot, now) > REST_SECONDS:
                self._calls[self._pool.ask(slot)] = slot
            elif (assignment := self._queue.take(slot)) is not None:
                self._calls[self._pool.run(slot, *assignment)] = slot

    def _hand_out_jobs(self) -> None:
        busy = {desk for desk, _ in self._jobs.values()}
        for desk in self._pool.open_desks:
            if self._backlog and desk not in busy:
                job = self._backlog.popleft()
                self._jobs[self._pool.run_job(desk, job)] = desk, job
        there, now = {*self._opening.values(), *self._pool.open_desks}, time.monotonic()
        for desk in range(self._pool.desks):
            if len(self._opening) < len(self._backlog) and desk not in there and now >= self._closed.get(desk, now):
                self._opening[self._pool.open_desk(desk)] = desk

    def _require_places(self) -> None:
        """Somebody must have found a place in the cluster: a worker while there are tasks, a desk while there are jobs."""
        self._require("worker", self._pool.wish, missing=not self._pool.started and self._queue.unfinished)
        self._require("process that publishes", self._pool.desk_wish, missing=not self._pool.open_desks and bool(self._backlog))  # fmt: skip

    def _require(self, who: str, wish: str, *, missing: bool) -> None:
        now = time.monotonic()
        if not missing:
            self._missing.pop(who, None)
        elif (waited := now - self._missing.setdefault(who, now)) > self._start_seconds:
            raise DeviceError(
                f"no {who} has started within {waited:.0f} s; each asks for {wish}",
                remedy="see ray status: has the cluster such nodes, and may it scale up to them?",
            )
