"""The same tasks on Ray actors, on as many nodes as there are. The only home of ray."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from phlora_pipeline.dispatch import MAX_ATTEMPTS, Dispatcher
from phlora_pipeline.engine import Engine, Job, Listener, Resources, outcome_of, run_local, words
from phlora_pipeline.errors import DeviceError, PhloraError
from phlora_pipeline.extract import TaskReport, Worker
from phlora_pipeline.plan import Task

POLL_SECONDS = 1.0
"""How long the loop waits before it looks whether it should stop."""

GROW_SECONDS = 5.0
"""How often it looks whether nodes have come."""

MAX_LOSSES = 10
"""Nodes that a task may lose before it is taken to be at fault."""


def engine(name: str, device: str, tasks: int) -> Engine:
    """`local`, `ray`, or for `auto` Ray where there is more than one GPU to feed, and the plain loop otherwise."""
    several = device in {"auto", "cuda"} and tasks > 1 and torch.cuda.device_count() > 1
    return run_ray if name == "ray" or (name == "auto" and several) else run_local


def run_ray(tasks: Iterable[Task], resources: Resources, listener: Listener) -> dict[str, str]:
    """Do the tasks on Ray actors: one per GPU where the cluster has any, otherwise one per `threads` processors.

    Joins the cluster of `RAY_ADDRESS`, or the one that this process is in already, or starts one on this machine.

    Returns:
        Part URL → reason, for blocks that failed, or killed their worker, twice.

    Raises:
        PhloraError: as `run_local`.
    """
    import ray

    torch.set_num_threads(resources.threads)  # what follows in this process sums as after `run_local`
    with _cluster(ray):
        queue: Dispatcher[int] = Dispatcher(tasks)
        pool = Pool(ray, resources, _RayWorker)
        try:
            return _Loop(ray, pool, queue, listener, resources).run()
        finally:
            pool.close()


class _Loop:
    """Hands out tasks until all have ended. A slot takes part once its actor has started, which may be never.

    A task that were given to an actor still waiting for its place in the cluster would wait with it, and hold up the run.
    """

    def __init__(self, ray: Any, pool: Pool, queue: Dispatcher[int], listener: Listener, resources: Resources) -> None:
        self._ray, self._pool, self._queue, self._listener = ray, pool, queue, listener
        self._calls: dict[Any, int] = {}
        self._jobs: dict[Any, Job] = {}
        self._false_starts = 0
        self._losses: dict[str, int] = {}
        self._began, self._start_seconds = time.monotonic(), resources.start_seconds
        self._grown = -GROW_SECONDS

    def run(self) -> dict[str, str]:
        queue = self._queue
        while True:
            stopping = self._listener.stopping()
            if not stopping:
                self._listener.more(queue)
                self._grow()
                self._hand_out()
            for job in self._listener.jobs(queue.lost):
                self._jobs[self._pool.start_job(job)] = job
            if not self._jobs and not (queue.running if stopping else queue.unfinished):
                return queue.lost
            waiting = [*self._calls, *self._jobs]
            finished, _ = self._ray.wait(waiting, num_returns=1, timeout=POLL_SECONDS)
            for reference in finished:
                self._ended(reference)
            self._require_start()

    def _ended(self, reference: Any) -> None:
        if (job := self._jobs.pop(reference, None)) is not None:
            self._listener.ended(job, self._answer(reference))
            return
        slot = self._calls.pop(reference)
        answer = self._answer(reference)
        if isinstance(answer, TaskReport):
            self._queue.done(slot)
            self._listener.on_report(answer)
        elif isinstance(answer, str):
            self._pool.ready(slot, answer)
        elif isinstance(answer, PhloraError):
            raise answer
        else:
            self._failed(slot, answer)

    def _failed(self, slot: int, error: Exception) -> None:
        """A task raised, or its worker died, or never started."""
        died = not isinstance(error, self._ray.exceptions.RayTaskError)
        if self._queue.works(slot):
            reason = ("its worker died: " if died else "") + words(getattr(error, "cause", None) or error)
            node_went = died and self._pool.node_is_gone(slot)
            task = self._queue.failed(slot, reason, died=died, charged=not (node_went and self._may_lose(slot)))
            self._listener.retried(task, reason, died=died)
        else:
            died = True
            self._false_starts += 1
            if self._false_starts > MAX_ATTEMPTS * max(self._pool.size, 1) and not self._pool.node_is_gone(slot):
                raise DeviceError(
                    f"{self._false_starts} Ray workers died before their first task, the last one of: {words(error)}",
                    remedy="look at the logs of the node; is phlora-pipeline installed there, in this version?",
                ) from error
        if died:
            self._calls[self._pool.start(slot)] = slot

    def _may_lose(self, slot: int) -> bool:
        task = self._queue.task_of(slot)
        self._losses[task.id] = self._losses.get(task.id, 0) + 1
        return self._losses[task.id] <= MAX_LOSSES

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
        busy = set(self._calls.values())
        for slot in self._pool.started:
            if slot not in busy and (assignment := self._queue.take(slot)) is not None:
                self._calls[self._pool.run(slot, *assignment)] = slot

    def _require_start(self) -> None:
        if not self._pool.started and self._queue.unfinished:
            waited = time.monotonic() - self._began
            if waited > self._start_seconds:
                raise DeviceError(
                    f"no worker has started within {waited:.0f} s; each asks for {self._pool.wish}",
                    remedy="see ray status: has the cluster such nodes, and may it scale up to them?",
                )
        else:
            self._began = time.monotonic()


class Pool:
    """Numbered slots, each with an actor that is replaced when it dies."""

    def __init__(self, ray: Any, resources: Resources, worker: type) -> None:
        """On the cluster as it is now.

        Args:
            ray: the module, connected.
            resources: of every actor.
            worker: its class, with `prepare(device, threads)` → node id, and `run(task, prefetch)`.

        Raises:
            DeviceError: there is nothing that a worker could run on, and no number of workers to wait for.
        """
        self._ray, self._resources = ray, resources
        gpus, cpus = self._there()
        self._on_gpu = resources.device != "cpu" and (gpus > 0 or resources.device.startswith("cuda"))
        self.wish = f"{resources.gpus:g} GPU" if self._on_gpu else f"{resources.threads} processors"
        if not resources.workers and not self._fit():
            raise DeviceError(
                f"the Ray cluster has {gpus:g} GPUs and {cpus:g} processors; one worker asks for {self.wish}",
                remedy="lower --threads, use --device cpu, or say how many --workers to wait for while nodes come",
            )
        wanted = {"num_gpus": resources.gpus} if self._on_gpu else {"num_cpus": resources.threads}
        # max_restarts=0: an actor that died is replaced by the driver, which knows whose fault it was.
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **wanted)(worker)
        # Beside actors that take all processors a job would never be given one.
        self._job = ray.remote(
            num_cpus=1 if self._on_gpu else 0, max_retries=0, scheduling_strategy="SPREAD"
        )(_run_job)  # fmt: skip
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
        device = "cuda" if self._on_gpu else "cpu"
        return self._actors[slot].prepare.remote(device, self._resources.threads)

    def ready(self, slot: int, node: str) -> None:
        """Its actor has started there."""
        self._nodes[slot] = node

    def run(self, slot: int, task: Task, prefetch: Task | None) -> Any:
        """Give the slot's actor a task."""
        return self._actors[slot].run.remote(task, prefetch)

    def start_job(self, job: Job) -> Any:
        """Anywhere in the cluster."""
        return self._job.remote(job, self._resources.threads)

    def node_is_gone(self, slot: int) -> bool:
        """Whether the node of the slot's last actor has left the cluster; Ray takes some seconds to notice."""
        node = self._nodes.get(slot)
        if node is None:
            return False
        deadline = time.monotonic() + NODE_SECONDS
        while True:
            if node not in {found["NodeID"] for found in self._ray.nodes() if found["Alive"]}:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.2)

    def close(self) -> None:
        """End all actors."""
        for slot in list(self._actors):
            self._kill(slot)

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


NODE_SECONDS = 2.0
"""How long a dead worker's node is watched, to tell a lost node from a deadly task."""


class _RayWorker:
    """A `Worker` in an actor, made by a call of its own, so that a missing device is that call's typed error."""

    _worker: Worker

    def prepare(self, device: str, threads: int) -> str:
        import ray

        self._worker = Worker(device, threads)
        return str(ray.get_runtime_context().get_node_id())

    def run(self, task: Task, prefetch: Task | None) -> TaskReport:
        return self._worker.run(task, prefetch)


def _run_job(job: Job, threads: int) -> Any:
    torch.set_num_threads(threads)  # sums may depend on it, and with them a manifest's last digits
    return outcome_of(job)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself would go on trying for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray has no type of its own for it, and says it in many
        raise DeviceError(
            f"there is no Ray at {address or 'this machine'}: {words(error)}",
            remedy="check RAY_ADDRESS, or use --engine local",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()
