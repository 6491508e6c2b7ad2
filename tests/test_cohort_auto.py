"""How large cohorts and tasks are: on the shapes of public models, planned from headers alone."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.bench import night
from jobs.bench.fleet import Assumed
from jobs.bench.headers import LLAMA_8B, LLAMA_70B
from phlora_pipeline.plan import READ_RATE, cohorts, in_cohorts
from phlora_pipeline.plan.cohort import BASE_SHARE, TASK_SECONDS, TASK_SHARE


@pytest.fixture(scope="module")
def models() -> night.Models:
    return night.planned([(LLAMA_8B, 20), (LLAMA_70B, 3)], "auto", Assumed())


def test_a_cohort_is_as_large_as_the_base_is_dear_and_small_models_go_first(models: night.Models) -> None:
    assert [len(group) for group in cohorts(models, "auto")] == [6, 7, 7, 3]
    for group in cohorts(models, "auto"):
        base = sum(task.base_bytes for task in models[group[0]]) / READ_RATE
        own = sum(task.cost for task in models[group[0]]) - base
        assert (len(group) - 1) * own <= BASE_SHARE * base
    assert [len(group) for group in cohorts(models, "off")] == [1] * 23
    assert [len(group) for group in cohorts(models, "max")] == [20, 3]


def test_where_computing_is_dear_nothing_is_shared() -> None:
    """Of an SVD's time on a processor the base's bytes are a thousandth: sharing gains nothing, and adapters would come later."""
    exact = night.planned([(LLAMA_8B, 3)], "exact", Assumed(profile="cpu"))
    assert [len(group) for group in cohorts(exact, "auto")] == [1, 1, 1]


@pytest.mark.parametrize("workers", [1, 8, 64, 300, 1000])
def test_no_task_is_too_long_for_a_stop_or_for_the_end(models: night.Models, workers: int) -> None:
    total = sum(task.cost for tasks in models.values() for task in tasks)
    made = in_cohorts(models, "auto", workers)
    assert all(
        task.cost <= min(TASK_SECONDS, total / (TASK_SHARE * workers)) * (1 + 1e-9)
        for task in made if len(task.members) > 1
    )  # fmt: skip


@pytest.mark.parametrize("workers", [1, 8, 64, 300, 1000])
def test_large_tasks_begin_in_time(models: night.Models, workers: int) -> None:
    """Where nothing but work takes time, the end is near the best: all work shared evenly, or the largest task alone."""
    made = in_cohorts(models, "auto", workers)
    alone = replace(Assumed(), worker_rate=READ_RATE, node_rate=1e15, storage_rate=1e15, ahead=0)
    costs = [task.cost for task in made]
    assert night.simulate(made, workers, alone).makespan <= 1.1 * max(sum(costs) / workers, *costs)
