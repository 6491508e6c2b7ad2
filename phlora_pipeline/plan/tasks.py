"""Tasks: one block across the models that share the base, so that the base is read once for all of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from phlora_pipeline import lowrank
from phlora_pipeline.lowrank import routes
from phlora_pipeline.plan.blocks import Block

_THREADS = 8
"""Of a worker, at most by default: so many small matrices are done side by side."""

_PIECE_BYTES = 4 * lowrank.CHUNK
"""Of ΔW, where it is only measured."""

READ_RATE = 1e9
"""Bytes per second that a worker is taken to read, for the order of tasks alone."""


@dataclass(frozen=True, slots=True)
class Member:
    """One model's block in a task, with all that a worker anywhere needs to do it.

    Attributes:
        model: its id in a zoo; empty where there is one model only.
        block: what to read.
        part_url: where the result goes; it names the member in a run.
        settings: what is wanted of every factorisation.
    """

    model: str
    block: Block
    part_url: str
    settings: lowrank.Settings

    @property
    def tuned_bytes(self) -> int:
        """Bytes of the fine-tune to read."""
        return sum(pair.tuned.nbytes for pair in self.block.pairs)

    def seconds(self, profile: lowrank.Profile) -> float:
        """Time of all its factorisations on a device of these rates."""
        if self.block.purpose == "measure":
            return 0.0
        return len(self.block.pairs) * routes.seconds(*self._problem(profile))

    def flops(self, profile: lowrank.Profile) -> float:
        """Floating-point operations of the planned route."""
        return 0.0 if self.block.purpose == "measure" else len(self.block.pairs) * routes.flops(*self._problem(profile))

    def worker_bytes(self, profile: lowrank.Profile) -> int:
        """Peak memory of doing it: what is read, ΔW, and the solver's own."""
        if self.block.purpose == "measure":
            return self.block.read_bytes + _PIECE_BYTES
        d, k = self.block.shape
        beside = min(len(self.block.pairs), _THREADS) if d * k <= lowrank.BESIDE_ENTRIES else 1
        factors = 4 * min(self.settings.max_rank, d, k) * (d + k) * len(self.block.pairs)
        return self.block.read_bytes + beside * routes.worker_bytes(*self._problem(profile)) + factors

    def device_bytes(self, profile: lowrank.Profile) -> int:
        """Peak memory on a GPU of one of its matrices, ΔW being resident; more are done at once only where they fit."""
        if self.block.purpose == "measure":
            return min(_PIECE_BYTES, 4 * self.block.pairs[0].numel)
        return routes.device_bytes(*self._problem(profile))

    def _problem(self, profile: lowrank.Profile) -> tuple[int, int, int, lowrank.Solver, lowrank.Profile]:
        d, k = self.block.shape
        return d, k, self.settings.max_rank, self.settings.solver, profile


@dataclass(frozen=True, slots=True)
class Task:
    """The unit of work.

    Attributes:
        members: blocks that differ in their fine-tunes only: the same names and shapes, against the same tensors of the base.
        profile: rates of the device that it is planned for.
        cohort: tasks of a lower one go first, so that models are published all night long.
    """

    members: tuple[Member, ...]
    profile: lowrank.Profile
    cohort: int = 0

    @property
    def id(self) -> str:
        """Names it in a run; its members alone have other ids."""
        more = f" and {len(self.members) - 1} more" if len(self.members) > 1 else ""
        return self.members[0].part_url + more

    @property
    def block(self) -> Block:
        """Of the first member: purpose, names, shape and base tensors are the same in all."""
        return self.members[0].block

    @property
    def base_bytes(self) -> int:
        """Bytes of the base to read, once."""
        return sum(pair.base.nbytes for pair in self.block.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return self.base_bytes + sum(member.tuned_bytes for member in self.members)

    @property
    def cost(self) -> float:
        """Seconds that it is planned to take, for the order; bytes are read at `READ_RATE`."""
        return self.nbytes / READ_RATE + sum(member.seconds(self.profile) for member in self.members)

    @property
    def flops(self) -> float:
        """Floating-point operations of the planned routes."""
        return sum(member.flops(self.profile) for member in self.members)

    @property
    def worker_bytes(self) -> int:
        """Peak memory of doing it, one member after another."""
        return max(member.worker_bytes(self.profile) for member in self.members)

    def alone(self) -> tuple[Task, ...]:
        """A task for each of its members."""
        return tuple(Task((member,), self.profile, self.cohort) for member in self.members)


def largest_first(tasks: Iterable[Task]) -> tuple[Task, ...]:
    """In the order in which they are given out: cohort after cohort, largest first within (Graham's rule)."""
    return tuple(sorted(tasks, key=lambda task: (task.cohort, -task.cost, task.id)))
