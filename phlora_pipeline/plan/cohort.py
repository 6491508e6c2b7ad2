"""Cohorts: models of one base that are converted together, each block of the base read once for many of them. Pure.

A large cohort reads less, a small one is published sooner: with g models at a time the base is read n/g times, and the first
adapter is there when a g-th of the night is over. Cohorts say what goes first, not what waits: the next one fills the tail.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Literal, TypeVar

from phlora_pipeline.plan.blocks import TensorPair
from phlora_pipeline.plan.tasks import READ_RATE, Task, largest_first

T = TypeVar("T")
Share = Literal["auto", "max", "off"]

TASK_SECONDS = 20.0
"""A task is planned to take no longer, unless a single model's block does: so long a run waits when it is told to stop."""

TASK_SHARE = 2
"""Nor longer than a half of what each worker has to do in all, or the others wait for it in the end."""

BASE_SHARE = 8
"""A cohort is so large that the base takes at most an eighth of the time that its models take themselves."""


def in_cohorts(models: Mapping[str, Sequence[Task]], share: Share, workers: int) -> tuple[Task, ...]:
    """The tasks of several models, those that can share their base put together.

    Args:
        models: id → the tasks of its plan, one for each block.
        share: `max`: each block with all models of a base; `off`: with one; `auto`: as many as `TASK_SECONDS`,
            `TASK_SHARE` and `BASE_SHARE` say.
        workers: that will share the work.

    Returns:
        Largest first in each cohort; the same for the same models in any order.
    """
    cost = {model: sum(task.cost for task in tasks) for model, tasks in models.items()}
    most = math.inf if share == "max" else min(TASK_SECONDS, sum(cost.values()) / (TASK_SHARE * workers))
    found: list[Task] = []
    for number, members in enumerate(_cohorts(models, share, cost)):
        shared: dict[tuple[object, ...], list[Task]] = {}
        for model in members:
            for task in models[model]:
                key = (task.block.id, *(pair.base for pair in task.block.pairs), task.profile)
                shared.setdefault(key, []).append(task)
        for same in shared.values():
            chunks = _evenly(same, _parts(same, most))
            found += [Task(tuple(task.members[0] for task in chunk), same[0].profile, number) for chunk in chunks]
    return _begun_in_time(found, workers)


def cohorts(models: Mapping[str, Sequence[Task]], share: Share) -> list[list[str]]:
    """Which models are converted together: those of the base with the smallest models first, since they are published soonest."""
    return _cohorts(models, share, {model: sum(task.cost for task in tasks) for model, tasks in models.items()})


def _cohorts(models: Mapping[str, Sequence[Task]], share: Share, cost: Mapping[str, float]) -> list[list[str]]:
    by_base: dict[frozenset[str], list[str]] = {}
    for model in sorted(models):
        by_base.setdefault(_base(models[model]), []).append(model)
    found = []
    for group in sorted(by_base.values(), key=lambda group: (max(cost[model] for model in group), group)):
        size = len(group) if share == "max" else 1
        if share == "auto":
            base = sum(task.base_bytes for task in models[group[0]]) / READ_RATE
            own = sum(cost[model] for model in group) / len(group) - base
            size = math.ceil(BASE_SHARE * base / own) or 1
        # The largest models together: their blocks are alike, and small ones fill the tail.
        largest = sorted(group, key=lambda model: (-cost[model], model))
        found += _evenly(largest, math.ceil(len(group) / size))
    return found


def _parts(same: Sequence[Task], most: float) -> int:
    """Into how many tasks a block's members go, so that none is planned to take longer than `most` seconds, if it can."""
    base = same[0].base_bytes / READ_RATE
    longest = max(task.cost for task in same) - base
    room = max(int((most - base) / longest), 1) if most < math.inf else len(same)
    return math.ceil(len(same) / room)


def _begun_in_time(tasks: Iterable[Task], workers: int) -> tuple[Task, ...]:
    """Largest first in each cohort; but a task that would outlast all that comes after it goes to an earlier one."""
    ordered = largest_first(tasks)
    costs = [task.cost for task in ordered]
    behind = list(accumulate(reversed(costs)))  # work of the last one, of the last two …
    found = []
    for task, cost in zip(ordered, costs, strict=True):
        needed = bisect.bisect_left(behind, workers * cost)  # tasks after it that keep the others busy for as long
        earlier = ordered[max(len(ordered) - 1 - needed, 0)].cohort
        found.append(replace(task, cohort=earlier) if earlier < task.cohort else task)
    return largest_first(found)


def _evenly(items: Sequence[T], parts: int) -> list[list[T]]:
    """In order, as many as there are parts, none more than one longer than another."""
    return [list(items[len(items) * n // parts : len(items) * (n + 1) // parts]) for n in range(parts)]


def _base(tasks: Iterable[Task]) -> frozenset[str]:
    """What tells a base: the shards that it is read from, in the version that was seen."""
    pairs: Iterable[TensorPair] = (pair for task in tasks for pair in task.block.pairs)
    return frozenset(f"{pair.base.url} {pair.base.etag}" for pair in pairs)
