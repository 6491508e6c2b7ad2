"""The actors of a run on Ray: workers in numbered slots, replaced when they die, and desks where jobs are done beside them.

Ray itself comes from `driver`, its home.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from phlora_pipeline.engine import Job, Resources, outcome_of
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.plan import Task

WORKERS_PER_DESK = 8


class Pool:
    """Numbered slots, each with an actor that is replaced when it dies."""

    def __init__(self, ray: Any, resources: Resources, worker: type) -> None:
        """On the cluster as it is now.

        Args:
            ray: the module, connected.
            resources: of every actor.
            worker: its class, with `prepare(device, threads)` → node id, `node()` → the same, and `run(task, prefetch)`.

        Raises:
            DeviceError: there is nothing that a worker could run on, and no number of workers to wait for, or no kind of them.
        """
        self._ray, self._resources = ray, resources
        gpus, cpus = self._there()
        self._on_gpu = resources.device != "cpu" and (gpus > 0 or resources.device.startswith("cuda"))
        # What asks for no device by name takes what its slot has: a node that says it has GPUs may have no CUDA in its torch.
        self._device = resources.device.partition(":")[0] if self._on_gpu else "cpu"
        self.wish = f"{resources.gpus:g} GPU" if self._on_gpu else f"{resources.threads} processors"
        unknown = (
            resources.device == "auto" and not self._on_gpu
        )  # of nodes that are to come nobody knows what they have
        if not self._fit() and (not resources.workers or unknown):
            raise DeviceError(
                f"the Ray cluster has {gpus:g} GPUs and {cpus:g} processors; one worker asks for {self.wish}",
                remedy="lower --threads; or, while nodes come, say which they are by --device cuda or cpu, and how many --workers to wait for",
            )
        # Unless it is said, Ray takes a processor for each worker with a GPU as well, and where these are scarce none is left for a desk.
        wanted = {"num_gpus": resources.gpus, "num_cpus": 0} if self._on_gpu else {"num_cpus": resources.threads}
        # max_restarts=0: an actor that died is replaced by the driver, which knows whose fault it was.
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **wanted)(worker)
        # Beside actors that take all processors it would never be given one.
        self._desk = ray.remote(
            max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", num_cpus=1 if self._on_gpu else 0
        )(Desk)  # fmt: skip
        self.desk_wish = "a processor" if self._on_gpu else "nothing"
        self._desks: dict[int, Any] = {}
        self._open: set[int] = set()
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}

    @property
    def size(self) -> int:
        """Slots, started or not."""
        return len(self._actors)

    @property
    def started(self) -> list[int]:
        """Slots whose actors can take tasks."""
        return list(self._nodes)

    def wanted(self) -> int:
        """How many slots there should be: what the user says, or what fits; one, to be waited for, where nothing does."""
        return self._resources.workers or max(self._fit(), 1)

    def start(self, slot: int) -> Any:
        """Give the slot a new actor; the call that is returned ends when it is ready."""
        self._kill(slot)
        self._actors[slot] = self._actor.remote()
        return self._actors[slot].prepare.remote(self._device, self._resources.threads)

    def ready(self, slot: int, node: str) -> None:
        """Its actor has started there."""
        self._nodes[slot] = node

    def ask(self, slot: int) -> Any:
        """Whether its actor is there still; the answer is as of `start`."""
        return self._actors[slot].node.remote()

    def run(self, slot: int, task: Task, prefetch: Task | None) -> Any:
        """Give the slot's actor a task."""
        return self._actors[slot].run.remote(task, prefetch)

    @property
    def desks(self) -> int:
        """How many jobs are done at once: each takes a processor, and memory."""
        return 1 + self.size // WORKERS_PER_DESK

    @property
    def open_desks(self) -> list[int]:
        """Desks that have a process."""
        return sorted(self._open)

    def open_desk(self, desk: int) -> Any:
        """Somewhere in the cluster; the call that is returned ends when there is a place for it."""
        self._desks[desk] = self._desk.remote(self._resources.threads)
        return self._desks[desk].open.remote()

    def desk_is_open(self, desk: int) -> None:
        """Its process has started."""
        self._open.add(desk)

    def run_job(self, desk: int, job: Job) -> Any:
        """At a desk that is open."""
        return self._desks[desk].run.remote(job)

    def close_desk(self, desk: int) -> None:
        """Its process is gone, or will be."""
        self._open.discard(desk)
        with contextlib.suppress(Exception):
            self._ray.kill(self._desks.pop(desk))

    def node_is_gone(self, slot: int) -> bool:
        """Whether the node of the slot's last actor is known to have left the cluster."""
        node = self._nodes.get(slot)
        return node is not None and node not in {found["NodeID"] for found in self._ray.nodes() if found["Alive"]}

    def close(self) -> None:
        """End all actors."""
        for slot in list(self._actors):
            self._kill(slot)
        for desk in list(self._desks):
            self.close_desk(desk)

    def _there(self) -> tuple[float, float]:
        available = self._ray.cluster_resources()
        return available.get("GPU", 0), available.get("CPU", 0)

    def _fit(self) -> int:
        gpus, cpus = self._there()
        return int(gpus / self._resources.gpus) if self._on_gpu else int(cpus // self._resources.threads)

    def _kill(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        self._nodes.pop(slot, None)
        if actor is not None:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)


class Desk:
    """Where jobs are done one after another: a process that has torch loaded already."""

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)  # sums may depend on it, and with them a manifest's last digits

    def open(self) -> None:
        """Nothing but an answer."""

    def run(self, job: Job) -> Any:
        """Its answer, or the exception that it raised."""
        return outcome_of(job)
