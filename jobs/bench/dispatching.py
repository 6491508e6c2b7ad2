"""The driver's own cost: `python -m jobs.bench.dispatching TASKS` has Ray do tasks of nothing and prints what that took, as JSON.

The real loop, queue and pool, with tasks of real plans, on actors without torch (`noop`), so that a small machine's
processors are left to the driver.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

from phlora_pipeline import driver
from phlora_pipeline.cli.leaving import exit_code_kept
from phlora_pipeline.engine import Reports, Resources
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.plan import Task, in_cohorts, make_plan
from phlora_pipeline.pool import Pool

from . import measure
from .headers import checkpoint
from .noop import NoOp
from .planning import ARCHITECTURE, settings_of
from .settings import Bench

ACTORS = 4

UNCOUNTED = 10
"""One task in so many goes before the measurement: the first ones start what is started once."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What the driver took.

    Attributes:
        tasks: that were counted.
        processor_ms: of all threads of the driver's process, for each of these.
        wall_ms: for each, of driver and actors together.
        grown_mib: what the driver's process held more after the last task than before the first that was counted.
        task_bytes: of one task with its forecast, pickled.
    """

    tasks: int
    processor_ms: float
    wall_ms: float
    grown_mib: float
    task_bytes: float


def run(bench: Bench) -> None:
    """In a process of its own."""
    tasks = bench.sizes.calls
    bench.say(f"dispatch: {tasks} tasks")
    _, said = measure.run_command([sys.executable, "-m", "jobs.bench.dispatching", str(tasks)])
    bench.save({f"{tasks} tasks": {**measure.stamp(), **json.loads(said)}})


def dispatch(tasks: list[Task]) -> Dispatched:
    """Through `run_ray`, on a cluster of this process' own."""
    import ray

    marks, done = dict[int, tuple[float, float, float]](), 0
    counted = len(tasks) - len(tasks) // UNCOUNTED

    def on_report(_: TaskReport) -> None:
        nonlocal done
        done += 1
        if done in {len(tasks) - counted, len(tasks)}:
            marks[done] = time.process_time(), time.perf_counter(), _resident_mib()

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=ACTORS, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        with mock.patch.object(driver, "Pool", NoOpPool):
            lost = driver.run_ray(tasks, Resources("cpu", threads=1, workers=ACTORS), Reports(on_report))
    finally:
        ray.shutdown()
    if lost:
        raise measure.BenchError(f"{len(lost)} blocks failed, the first of: {next(iter(lost.values()))}")
    (processor, wall, memory), (*after, memory_after) = marks.values()
    task_bytes = len(pickle.dumps((tasks[0], tasks[1])))
    return Dispatched(
        counted, 1e3 * (after[0] - processor) / counted, 1e3 * (after[1] - wall) / counted, memory_after - memory, task_bytes
    )  # fmt: skip


class NoOpPool(Pool):
    """Of actors that are sent what a worker is sent, and do nothing with it."""

    def __init__(self, ray: Any, resources: Resources, worker: type) -> None:
        """Whatever worker is asked for."""
        super().__init__(ray, resources, NoOp)

    def run(self, slot: int, task: Task, prefetch: Task | None) -> Any:
        """The task goes as bytes: to unpickle it is the worker's business, and would load torch there."""
        parts = tuple((member.model, member.part_url, len(member.block.pairs)) for member in task.members)
        return self._actors[slot].run.remote(task.id, parts, pickle.dumps((task, prefetch)))


def real_tasks(count: int) -> list[Task]:
    """Of as many fine-tunes as it takes, each for itself."""
    base, found = checkpoint(ARCHITECTURE, "s3://bases/of-705-tensors"), 0
    plans: dict[str, tuple[Task, ...]] = {}
    while found < count:
        model = f"model-{len(plans):04d}"
        plans[model] = make_plan(base, checkpoint(ARCHITECTURE, f"s3://tuned/{model}"), settings_of(model)).tasks
        found += len(plans[model])
    return list(in_cohorts(plans, "off", ACTORS)[:count])


def _resident_mib() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    with exit_code_kept():
        print(json.dumps(asdict(dispatch(real_tasks(int(sys.argv[1]))))))
        sys.exit()
