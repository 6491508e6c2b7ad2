"""The tail of a night, simulated: real plans of public models, the real cohorts and dispatcher, assumed rates of reading.

Nothing is read and nothing computed: a worker does what `Worker` does, block after block, reading the next one ahead, in
the time that the bytes take at what its node and the storage leave it, and the routes as they are planned. A night is as
long as its last task. What that is beside the ideal is the tail, and what `in_cohorts` and `Dispatcher` are judged by.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from phlora_pipeline import lowrank
from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.plan import PlanSettings, Task, in_cohorts, make_plan
from phlora_pipeline.targets import Selection

from .fleet import Assumed, Fleet, Steps, steps_of
from .headers import LLAMA_8B, LLAMA_70B, QWEN3_235B, Architecture, checkpoint
from .settings import Bench

ASKED = {8: 1.05, 64: 1.10, 512: 1.25}
"""GPUs → the tail that is asked for: makespan over the ideal, at most."""

NIGHTS: dict[str, tuple[tuple[Architecture, int], ...]] = {
    "40 × 8B": ((LLAMA_8B, 40),),
    "10 × 70B": ((LLAMA_70B, 10),),
    "4 × 235B": ((QWEN3_235B, 4),),
    "all 54": ((LLAMA_8B, 40), (LLAMA_70B, 10), (QWEN3_235B, 4)),
}
"""Fine-tunes of a night, each kind with a base of its own."""

Models = Mapping[str, Sequence[Task]]


def run(bench: Bench) -> None:
    """Every night with either solver on clusters of every size, saved one by one."""
    assumed = Assumed()
    for solver in bench.sizes.solvers:
        for name in bench.sizes.nights:
            models = planned(NIGHTS[name], solver, assumed)
            least = least_bytes(models)
            for gpus in bench.sizes.gpus:
                bench.say(f"night: {name}, {solver}, {gpus} GPUs")
                told = {"night": name, "solver": solver, "gpus": gpus, "assumed": asdict(assumed), "least_bytes": least}
                bench.save({f"{name}, {solver}, {gpus} GPUs": told | simulated(models, gpus, assumed)})


def planned(kinds: Iterable[tuple[Architecture, int]], solver: lowrank.Solver, assumed: Assumed) -> Models:
    """The real plans of such fine-tunes: rank 32, portable, all targets."""
    models: dict[str, Sequence[Task]] = {}
    for architecture, count in kinds:
        base = checkpoint(architecture, f"s3://bases/{architecture.name}")
        for number in range(count):
            model = f"{architecture.name.rpartition('/')[2]}-{number:02d}"
            settings = PlanSettings(
                Selection(), "portable", 32, "s3://out/_parts", lowrank.Settings(32, solver), lowrank.PROFILES[assumed.profile], model=model
            )  # fmt: skip
            models[model] = make_plan(base, checkpoint(architecture, f"s3://tuned/{model}"), settings).tasks
    return models


def simulated(models: Models, gpus: int, assumed: Assumed) -> dict[str, Any]:
    """One row."""
    tasks = in_cohorts(models, "auto", gpus)
    night = simulate(tasks, gpus, assumed)
    ended = sorted(night.published.values())
    return {
        "tasks": len(tasks),
        "cohorts": len({task.cohort for task in tasks}),
        "largest_task": max(span.ended - span.began for span in night.spans),
        "makespan": night.makespan,
        "ideal": night.ideal,
        "tail": night.makespan / night.ideal,
        "asked": ASKED.get(gpus),
        "first_published": ended[0],
        "half_published": ended[(len(ended) - 1) // 2],
        "read_bytes": night.read,
        "vain_bytes": night.vain,
    }


def least_bytes(models: Models) -> int:
    """Bytes of reading every fine-tune once, and every base once for all of its own."""
    return sum(task.nbytes for task in in_cohorts(models, "max", 1))


@dataclass(frozen=True, slots=True)
class Span:
    """A task that a worker did."""

    worker: int
    task: Task
    began: float
    ended: float


@dataclass(frozen=True, slots=True)
class Night:
    """How it went.

    Attributes:
        spans: every task, in the order in which they ended.
        published: model → when its last part was there; reducers are not simulated.
        ideal: seconds below which no order of these tasks ends.
        read: bytes, with those that were read ahead in vain.
        vain: bytes read ahead of tasks that another worker then got.
    """

    spans: tuple[Span, ...]
    published: Mapping[str, float]
    ideal: float
    read: float
    vain: float

    @property
    def makespan(self) -> float:
        """Seconds until the last task ended."""
        return max((span.ended for span in self.spans), default=0.0)


def simulate(tasks: Sequence[Task], gpus: int, assumed: Assumed) -> Night:
    """Have so many workers do these tasks, in the order that the dispatcher gives them out in."""
    dispatcher: Dispatcher[int] = Dispatcher(tasks, gpus)
    steps = steps_of(tasks, assumed)
    unfinished = Counter(member.model for task in tasks for member in task.members)
    fleet, idle, began = Fleet(gpus, assumed), list(range(gpus)), dict[int, float]()
    spans, published = list[Span](), dict[str, float]()
    while True:
        for worker in idle:
            if (assignment := dispatcher.take(worker)) is not None:
                task, told = assignment
                began[worker] = fleet.now
                fleet.begin(worker, steps[task.id], steps[told.id] if told else None)
        if not dispatcher.running:
            return Night(tuple(spans), published, ideal(steps.values(), gpus, assumed), fleet.read, fleet.vain)
        idle = fleet.advance()
        for worker in idle:
            task = dispatcher.done(worker)
            spans.append(Span(worker, task, began[worker], fleet.now))
            unfinished.subtract(member.model for member in task.members)
            published |= {member.model: fleet.now for member in task.members if not unfinished[member.model]}


def ideal(steps: Iterable[Steps], gpus: int, assumed: Assumed) -> float:
    """The larger of all computing shared evenly, and of all bytes at the rate that they come at for so many workers."""
    every = [step for task in steps for step in task]
    return max(
        sum(step.seconds for step in every) / gpus, sum(step.nbytes for step in every) / assumed.whole_rate(gpus)
    )
