"""Engines: the same tasks in a plain loop, or on Ray actors. The only home of ray.

Neither engine sees a tensor. Retries are counted here, by `Dispatcher`: Ray's own repeat a task that kills its worker
for ever, and fail the calls that merely queued behind it.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phlora_pipeline.dispatch import MAX_ATTEMPTS, Dispatcher
from phlora_pipeline.errors import DeviceError, PhloraError
from phlora_pipeline.extract import TaskReport, Worker
from phlora_pipeline.plan import Task

OnReport = Callable[[TaskReport], None]
Engine = Callable[[Sequence[Task], "Resources", OnReport], Mapping[str, str]]


@dataclass(frozen=True, slots=True)
class Resources:
    """Where tasks run.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: processor threads per worker, the same in both engines.
        workers: number of Ray workers; 0 for as many as fit.
    """

    device: str
    threads: int
    workers: int = 0


def engine(name: str, device: str, tasks: int) -> Engine:
    """`local`, `ray`, or for `auto` Ray where there is more than one GPU to feed, and the plain loop otherwise."""
    several = device in {"auto", "cuda"} and tasks > 1 and torch.cuda.device_count() > 1
    return run_ray if name == "ray" or (name == "auto" and several) else run_local


def run_local(tasks: Sequence[Task], resources: Resources, on_report: OnReport) -> Mapping[str, str]:
    """Do the tasks one after another in this process.

    Returns:
        Part URL → reason, for tasks that failed twice.

    Raises:
        PhloraError: the sources, the storage or the device, not a task, is at fault.
    """
    worker = Worker(resources.device, resources.threads)
    dispatcher: Dispatcher[str] = Dispatcher(tasks)
    while (assignment := dispatcher.take("local")) is not None:
        try:
            report = worker.run(*assignment)
        except PhloraError:
            raise
        except Exception as error:  # whatever a task does, the other tasks go on
            dispatcher.failed("local", _words(error), died=False)
        else:
            dispatcher.done("local")
            on_report(report)
    return dispatcher.lost


def run_ray(tasks: Sequence[Task], resources: Resources, on_report: OnReport) -> Mapping[str, str]:
    """Do the tasks on Ray actors: one per GPU where the cluster has any, otherwise one per `threads` processors.

    Joins the cluster of `RAY_ADDRESS`, or the one that this process is in already, or starts one on this machine.

    Returns:
        Part URL → reason, for tasks that failed, or killed their worker, twice.

    Raises:
        PhloraError: as `run_local`.
    """
    import ray

    torch.set_num_threads(resources.threads)  # what follows in this process sums as after `run_local`
    with _cluster(ray):
        pool = _Pool(ray, resources, len(tasks))
        try:
            return _dispatch(ray, pool, Dispatcher(tasks, len(pool.slots)), on_report)
        finally:
            pool.close()


def _dispatch(ray: Any, pool: _Pool, dispatcher: Dispatcher[int], on_report: OnReport) -> Mapping[str, str]:
    """Hand out tasks until all have ended. A slot takes part once its actor has started, which may be never.

    A task that were given to an actor still waiting for its place in the cluster would wait with it, and hold up the run.
    """
    calls = {pool.start(slot): slot for slot in pool.slots}
    false_starts = 0
    while dispatcher.unfinished:
        [finished], _ = ray.wait(list(calls), num_returns=1)
        slot = calls.pop(finished)
        try:
            report = ray.get(finished)
        except ray.exceptions.RayError as error:
            cause = getattr(error, "cause", None)
            if isinstance(cause, PhloraError):
                raise cause from error
            died, worked = not isinstance(error, ray.exceptions.RayTaskError), dispatcher.works(slot)
            if worked:
                dispatcher.failed(slot, ("its worker died: " if died else "") + _words(cause or error), died=died)
            else:
                false_starts += 1
                _require_starts(false_starts, pool, error)
            if died or not worked:
                calls[pool.start(slot)] = slot
        else:
            if report is not None:
                dispatcher.done(slot)
                on_report(report)
        # Every idle slot, not only this one: a task that came back may be all that is left.
        for idle in set(pool.slots) - set(calls.values()):
            assignment = dispatcher.take(idle)
            if assignment is not None:
                calls[pool.run(idle, *assignment)] = idle
    return dispatcher.lost


def _require_starts(false_starts: int, pool: _Pool, error: Exception) -> None:
    if false_starts > MAX_ATTEMPTS * len(pool.slots):
        raise DeviceError(
            f"{false_starts} Ray workers died before their first task, the last one of: {_words(error)}",
            remedy="look at the logs of the node; is phlora-pipeline installed there, in this version?",
        ) from error


class _Pool:
    """Numbered slots, each with an actor that is replaced when it dies."""

    def __init__(self, ray: Any, resources: Resources, most: int) -> None:
        self._ray = ray
        self._threads = resources.threads
        available = ray.cluster_resources()
        gpus, cpus = int(available.get("GPU", 0)), int(available.get("CPU", 0))
        use_gpus = gpus > 0 and resources.device != "cpu"
        if resources.device.startswith("cuda") and not gpus:
            raise DeviceError(
                "the Ray cluster has no GPU", remedy="use --device cpu, or join a cluster with GPUs: RAY_ADDRESS"
            )
        fit = gpus if use_gpus else cpus // resources.threads
        if fit < 1:
            raise DeviceError(
                f"the Ray cluster has {cpus} processors; one worker asks for {resources.threads}",
                remedy="lower --threads",
            )
        self.slots = range(max(1, min(resources.workers or fit, fit, most)))
        wanted = {"num_gpus": 1} if use_gpus else {"num_cpus": resources.threads}
        # max_restarts=0: an actor that died is replaced by the driver, which knows whose fault it was.
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **wanted)(_RayWorker)
        self._device = "cuda" if use_gpus else "cpu"
        self._actors: dict[int, Any] = {}

    def start(self, slot: int) -> Any:
        """Give the slot a new actor; the call that is returned ends when it is ready."""
        self._kill(slot)
        self._actors[slot] = self._actor.remote()
        return self._actors[slot].prepare.remote(self._device, self._threads)

    def run(self, slot: int, task: Task, prefetch: Task | None) -> Any:
        return self._actors[slot].run.remote(task, prefetch)

    def close(self) -> None:
        for slot in self.slots:
            self._kill(slot)

    def _kill(self, slot: int) -> None:
        actor = self._actors.pop(slot, None)
        if actor is not None:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)


class _RayWorker:
    """A `Worker` in an actor, made by a call of its own, so that a missing device is that call's typed error."""

    _worker: Worker

    def prepare(self, device: str, threads: int) -> None:
        self._worker = Worker(device, threads)

    def run(self, task: Task, prefetch: Task | None) -> TaskReport:
        return self._worker.run(task, prefetch)


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
            f"there is no Ray at {address or 'this machine'}: {_words(error)}",
            remedy="check RAY_ADDRESS, or use --engine local",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
