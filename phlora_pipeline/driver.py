"""Engines: the same tasks in a plain loop, or on Ray actors. The only home of ray.

Neither engine sees a tensor. Retries are counted here, by `Dispatcher`: Ray's own repeat a task that kills its worker
for ever, and fail the calls that merely queued behind it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phlora_pipeline.dispatch import Dispatcher
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
        Block id → reason, for tasks that failed twice.

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
        Block id → reason, for tasks that failed, or killed their worker, twice.

    Raises:
        PhloraError: as `run_local`.
    """
    import ray

    with _cluster(ray):
        pool = _Pool(ray, resources, len(tasks))
        try:
            return _dispatch(ray, pool, Dispatcher(tasks, len(pool.slots)), on_report)
        finally:
            pool.close()


def _dispatch(ray: Any, pool: _Pool, dispatcher: Dispatcher[int], on_report: OnReport) -> Mapping[str, str]:
    calls: dict[Any, int] = {}

    def start(worker: int) -> None:
        assignment = dispatcher.take(worker)
        if assignment is not None:
            calls[pool.run(worker, *assignment)] = worker

    for worker in pool.slots:
        start(worker)
    while calls:
        [finished], _ = ray.wait(list(calls), num_returns=1)
        worker = calls.pop(finished)
        try:
            report = ray.get(finished)
        except ray.exceptions.RayActorError as error:
            dispatcher.failed(worker, f"its worker died: {_words(error)}", died=True)
            pool.replace(worker)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, PhloraError):
                raise error.cause from error
            dispatcher.failed(worker, _words(error.cause or error), died=False)
        else:
            dispatcher.done(worker)
            on_report(report)
        # Every idle worker, not only this one: a task that came back may be all that is left.
        for idle in set(pool.slots) - set(calls.values()):
            start(idle)
    return dispatcher.lost


class _Pool:
    """Numbered slots, each with an actor that is replaced when it dies."""

    def __init__(self, ray: Any, resources: Resources, most: int) -> None:
        self._ray = ray
        self._resources = resources
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
        count = max(1, min(resources.workers or fit, fit, most))
        wanted = {"num_gpus": 1} if use_gpus else {"num_cpus": resources.threads}
        # max_restarts=0: an actor that died is replaced by the driver, which knows whose fault it was.
        self._actor = ray.remote(max_restarts=0, max_task_retries=0, **wanted)(_RayWorker)
        self._device = "cuda" if use_gpus else "cpu"
        self._actors = [self._start() for _ in range(count)]

    @property
    def slots(self) -> range:
        return range(len(self._actors))

    def run(self, slot: int, task: Task, prefetch: Task | None) -> Any:
        return self._actors[slot].run.remote(task, prefetch)

    def replace(self, slot: int) -> None:
        self._actors[slot] = self._start()

    def close(self) -> None:
        for actor in self._actors:
            with contextlib.suppress(Exception):
                self._ray.kill(actor)

    def _start(self) -> Any:
        return self._actor.remote(self._device, self._resources.threads)


class _RayWorker:
    """A `Worker` in an actor, made at its first task, so that a missing device is that call's typed error."""

    def __init__(self, device: str, threads: int) -> None:
        self._settings = (device, threads)
        self._worker: Worker | None = None

    def run(self, task: Task, prefetch: Task | None) -> TaskReport:
        self._worker = self._worker or Worker(*self._settings)
        return self._worker.run(task, prefetch)


@contextlib.contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        yield
    finally:
        ray.shutdown()


def _words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
