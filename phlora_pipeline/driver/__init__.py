"""The same tasks on Ray actors, on as many nodes as there are. The only home of ray."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.driver.exported import Exported
from phlora_pipeline.driver.joining import Seen, joined, look, version
from phlora_pipeline.driver.loop import Loop
from phlora_pipeline.engine import Engine, Listener, Resources, run_local
from phlora_pipeline.extract import TaskReport, Worker
from phlora_pipeline.plan import Task
from phlora_pipeline.pool import Pool

__all__ = ["Seen", "engine", "look", "run_ray", "version"]


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
    with joined(ray):
        listener.measure(exported := Exported())
        queue: Dispatcher[int] = Dispatcher(tasks)
        pool = Pool(ray, resources, _RayWorker)
        try:
            return Loop(ray, pool, queue, listener, resources, exported.again).run()
        finally:
            pool.close()


class _RayWorker:
    """A `Worker` in an actor, made by a call of its own, so that a missing device is that call's typed error."""

    _worker: Worker

    def prepare(self, device: str, threads: int) -> str:
        self._worker = Worker(device, threads)
        return self.node()

    def node(self) -> str:
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, task: Task, prefetch: Task | None) -> TaskReport:
        return self._worker.run(task, prefetch)
