"""Planning alone, of a large zoo: `python -m jobs.bench.planning MODELS` plans so many and prints what it took, as JSON.

Fine-tunes of 705 tensors each, from headers in memory, planned and put into cohorts chunk by chunk, so that memory does not
grow with the zoo. Making up the headers is not counted: in a zoo they are read, and that takes what the storage takes.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace

from phlora_pipeline import lowrank
from phlora_pipeline.plan import PlanSettings, in_cohorts, make_plan
from phlora_pipeline.targets import Selection

from . import measure
from .headers import LLAMA_8B, checkpoint
from .settings import Bench

ARCHITECTURE = replace(LLAMA_8B, name="example/of-705-tensors", layers=78)

CHUNK = 100
"""Models that are planned before their plans are summed up and forgotten."""

WORKERS = 64


@dataclass(frozen=True, slots=True)
class Planned:
    """What planning took, and what it found.

    Attributes:
        models: that were planned.
        tensors: of all of them.
        tasks: of all cohorts.
        nbytes: that they read.
        seconds: of `make_plan` and `in_cohorts`, on the wall.
        processor: the same, of processor time.
    """

    models: int
    tensors: int
    tasks: int
    nbytes: int
    seconds: float
    processor: float


def run(bench: Bench) -> None:
    """In a process of its own, whose memory is its own."""
    models = bench.sizes.zoo
    bench.say(f"planning: {models} models")
    cost, said = measure.run_command([sys.executable, "-m", "jobs.bench.planning", str(models)])
    bench.save({f"{models} models": {**measure.stamp(), **json.loads(said), "peak_mib": cost.peak_mib}})


def plan_zoo(models: int) -> Planned:
    """Plan so many fine-tunes of one base."""
    tasks = nbytes = 0
    wall = processor = 0.0
    base = checkpoint(ARCHITECTURE, "s3://bases/of-705-tensors")
    for start in range(0, models, CHUNK):
        chunk = range(start, min(start + CHUNK, models))
        tuned = {f"model-{number:04d}": checkpoint(ARCHITECTURE, f"s3://tuned/{number:04d}") for number in chunk}
        began = time.perf_counter(), time.process_time()
        plans = {model: make_plan(base, headers, settings_of(model)).tasks for model, headers in tuned.items()}
        shared = in_cohorts(plans, "auto", WORKERS)
        tasks, nbytes = tasks + len(shared), nbytes + sum(task.nbytes for task in shared)
        wall, processor = wall + time.perf_counter() - began[0], processor + time.process_time() - began[1]
    return Planned(models, models * len(base.tensors), tasks, nbytes, wall, processor)


def settings_of(model: str) -> PlanSettings:
    """What `zoo.yaml` says where it says nothing."""
    profile = lowrank.PROFILES["sm90"]
    return PlanSettings(Selection(), "portable", 32, "s3://out/_parts", lowrank.Settings(32), profile, model=model)


if __name__ == "__main__":
    print(json.dumps(asdict(plan_zoo(int(sys.argv[1])))))
