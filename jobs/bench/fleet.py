"""Workers that read at shared rates and compute at planned ones: the clock of a simulated night."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from phlora_pipeline import lowrank
from phlora_pipeline.extract import PREFETCH_BYTES
from phlora_pipeline.plan import Task


@dataclass(frozen=True, slots=True)
class Assumed:
    """What a cluster is taken to be: assumptions, none of them measured.

    Attributes:
        profile: of the GPUs: their rates as `lowrank.PROFILES` has them.
        worker_rate: bytes per second that one worker reads at most.
        node_rate: bytes per second of a node's network: 100 Gbit/s.
        storage_rate: bytes per second that the storage gives in all.
        gpus_per_node: that share a node's network.
        ahead: bytes of one side of a block up to which it is read while the one before is computed.
        noise: of every task's time, which is multiplied by exp(noise · z), z normal; 0 for times as planned.
        seed: of the noise.
    """

    profile: str = "sm90"
    worker_rate: float = 2e9
    node_rate: float = 12.5e9
    storage_rate: float = 200e9
    gpus_per_node: int = 8
    ahead: int = PREFETCH_BYTES
    noise: float = 0.0
    seed: int = 0

    def whole_rate(self, gpus: int) -> float:
        """Bytes per second that so many workers read at most, nodes filled one after another."""
        full, rest = divmod(gpus, self.gpus_per_node)
        nodes = [self.gpus_per_node] * full + [rest]
        return min(sum(min(workers * self.worker_rate, self.node_rate) for workers in nodes), self.storage_rate)

    def rates(self, reading: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Bytes per second of each worker that reads: the least of its own, its share of its node's and of the storage's."""
        nodes = np.arange(len(reading)) // self.gpus_per_node
        of_node = self.node_rate / np.maximum(np.bincount(nodes, weights=reading), 1)
        of_storage = self.storage_rate / max(int(np.count_nonzero(reading)), 1)
        return np.where(reading, np.minimum(of_node[nodes], min(self.worker_rate, of_storage)), 0.0)


@dataclass(frozen=True, slots=True)
class Step:
    """One member of a task: what it reads, the base with the first one, and the seconds that it computes after that.

    Attributes:
        ahead: whether it may be read while something else is computed.
    """

    nbytes: float
    seconds: float
    ahead: bool


Steps = tuple[Step, ...]


def steps_of(tasks: Iterable[Task], assumed: Assumed) -> dict[str, Steps]:
    """What each task takes; with noise, what it will turn out to have taken."""
    rng = random.Random(assumed.seed)  # noqa: S311  # a simulation's
    return {task.id: _steps(task, assumed, math.exp(assumed.noise * rng.gauss(0, 1))) for task in tasks}


def _steps(task: Task, assumed: Assumed, factor: float) -> Steps:
    profile, base = lowrank.PROFILES[assumed.profile], task.base_bytes
    found = []
    for number, member in enumerate(task.members):
        tuned = member.tuned_bytes
        nbytes = tuned if number else base + tuned
        found.append(Step(factor * nbytes, factor * member.seconds(profile), max(base, tuned) <= assumed.ahead))
    return tuple(found)


class Fleet:
    """Workers between two events: each reads, or computes, or both, or is idle.

    Attributes:
        now: seconds since the beginning.
        read: bytes of steps that were begun, and in vain.
        vain: bytes that were read ahead of a task that did not follow; as in `Reader`, they are read to their end.
    """

    def __init__(self, gpus: int, assumed: Assumed) -> None:
        """All idle."""
        self.now, self.read, self.vain = 0.0, 0.0, 0.0
        self._assumed = assumed
        self._left = np.zeros(gpus)  # bytes that are being read
        self._ends = np.full(gpus, np.inf)  # when what is being computed ends
        self._to_do: list[list[Step]] = [[] for _ in range(gpus)]  # of the task, the one being computed left out
        self._told: list[Steps | None] = [None] * gpus
        self._ahead: list[Step | None] = [None] * gpus  # what is, or was, read while something is computed

    def begin(self, worker: int, steps: Steps, told: Steps | None) -> None:
        """An idle worker gets a task, and a forecast of the next."""
        self._to_do[worker], self._told[worker] = list(steps[::-1]), told
        self._next(worker)

    def advance(self) -> list[int]:
        """On to the next event; returns who has finished a task then."""
        reading = self._left > 0
        rates = self._assumed.rates(reading)
        ready = np.full(len(reading), np.inf)
        np.divide(self._left, rates, out=ready, where=reading)
        step, ended = float(ready.min()), float(self._ends.min())
        self.now, step = (ended, ended - self.now) if ended - self.now <= step else (self.now + step, step)
        left = self._left - rates * step
        self._left = np.where(left < 0.5, 0.0, left)  # bytes are whole numbers: half of one is rounding
        for worker in np.flatnonzero(reading & (self._left == 0) & np.isinf(self._ends)):
            if self._to_do[worker]:  # what is read ahead may come when there is nothing left to do
                self._compute(int(worker))
        finished = []
        for worker in np.flatnonzero(self._ends <= self.now):
            self._ends[worker] = np.inf
            if self._to_do[worker]:
                self._next(int(worker))
            else:
                finished.append(int(worker))
        return finished

    def _next(self, worker: int) -> None:
        """The device waits for the next step's bytes."""
        step, ahead = self._to_do[worker][-1], self._ahead[worker]
        if ahead is not step:
            if ahead is not None:
                self.vain += ahead.nbytes
                self.read += ahead.nbytes
            self._left[worker] += step.nbytes
        self._ahead[worker] = None
        if not self._left[worker]:
            self._compute(worker)

    def _compute(self, worker: int) -> None:
        """The step's bytes are there: it is computed, and the next one read meanwhile."""
        step = self._to_do[worker].pop()
        self.read += step.nbytes
        self._ends[worker] = self.now + step.seconds
        following, told = self._to_do[worker], self._told[worker]
        ahead = following[-1] if following else told[0] if told else None
        if ahead is not None and ahead.ahead:
            self._ahead[worker], self._left[worker] = ahead, ahead.nbytes
