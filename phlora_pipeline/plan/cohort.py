"""Cohorts: models of one base that are converted together, each block of the base read once for all of them. Pure.

A large cohort reads less, a small one ends sooner: with g models at a time the base is read n/g times, tasks take g times
as long, and the first adapter is published when a g-th of the night is over.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from phlora_pipeline.plan.blocks import TensorPair
from phlora_pipeline.plan.tasks import Member, Task, largest_first

Share = Literal["auto", "max", "off"]

TASK_SECONDS = 20.0
"""A task is planned to take no longer, unless a single model's block does: so long a run waits when it is told to stop."""

TASKS_PER_WORKER = 4
"""At least so many tasks of a cohort for each worker, or the workers wait for each other at its end."""


def in_cohorts(models: Mapping[str, Sequence[Task]], share: Share, workers: int) -> tuple[Task, ...]:
    """The tasks of several models, those that can share their base put together.

    Args:
        models: id → the tasks of its plan, one for each block.
        share: `max`: all models of a base together; `off`: none; `auto`: as many as `TASK_SECONDS` and the workers allow.
        workers: that will share the work.

    Returns:
        Largest first in each cohort; the same for the same models in any order.
    """
    found: list[Task] = []
    for number, members in enumerate(cohorts(models, share, workers)):
        shared: dict[tuple[object, ...], list[Member]] = {}
        profiles = {}
        for model in members:
            for task in models[model]:
                [member] = task.members
                key = (member.block.id, *(pair.base for pair in member.block.pairs), task.profile)
                shared.setdefault(key, []).append(member)
                profiles[key] = task.profile
        found += [Task(tuple(same), profiles[key], number) for key, same in shared.items()]
    return largest_first(found)


def cohorts(models: Mapping[str, Sequence[Task]], share: Share, workers: int) -> list[list[str]]:
    """Which models are converted together: those of the base with the most work first."""
    by_base: dict[frozenset[str], list[str]] = {}
    for model in sorted(models):
        by_base.setdefault(_base(models[model]), []).append(model)
    cost = {model: sum(task.cost for task in tasks) for model, tasks in models.items()}
    ordered = sorted(by_base.values(), key=lambda group: (-sum(cost[model] for model in group), group))
    found = []
    for group in ordered:
        size = _size([models[model] for model in group], share, workers)
        # The largest models together: their blocks are alike, and small ones fill the tail.
        largest = sorted(group, key=lambda model: (-cost[model], model))
        found += [largest[start : start + size] for start in range(0, len(group), size)]
    return found


def _size(group: Sequence[Sequence[Task]], share: Share, workers: int) -> int:
    if share != "auto":
        return len(group) if share == "max" else 1
    longest = max(task.cost for tasks in group for task in tasks)
    within_time = max(int(TASK_SECONDS / longest), 1)
    # A cohort has as many tasks as one model has blocks, whatever its size: so many cohorts give the workers enough to share.
    tasks = sum(len(tasks) for tasks in group) / len(group)
    batches = math.ceil(TASKS_PER_WORKER * workers / tasks)
    return max(min(len(group), within_time, len(group) // max(batches, 1)), 1)


def _base(tasks: Iterable[Task]) -> frozenset[str]:
    """What tells a base: the shards that it is read from, in the version that was seen."""
    pairs: Iterable[TensorPair] = (pair for task in tasks for pair in task.block.pairs)
    return frozenset(f"{pair.base.url} {pair.base.etag}" for pair in pairs)
