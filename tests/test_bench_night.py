"""The simulated night: its headers are the public models', its clock obeys its rates, and it does all work once."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.bench import headers, night, zoo_table
from jobs.bench.fleet import Assumed, Fleet, Step, steps_of
from phlora_pipeline.plan import Share, Task, in_cohorts

SMALL = replace(headers.LLAMA_8B, name="small", layers=3)
EXPERTS = replace(headers.QWEN3_235B, name="experts", layers=1, experts=10)
SLOW = Assumed(worker_rate=10, node_rate=15, storage_rate=1e9, gpus_per_node=2)
NO_LIMIT = Assumed(node_rate=1e15, storage_rate=1e15, ahead=0)


@pytest.fixture(scope="module")
def zoo() -> night.Models:
    return night.planned([(SMALL, 5), (EXPERTS, 2)], "auto", Assumed())


class TestHeaders:
    @pytest.mark.parametrize(
        ("architecture", "parameters", "tensors"),
        [
            (headers.LLAMA_8B, 8_030_261_248, 291),
            (headers.LLAMA_70B, 70_553_706_496, 723),
            (headers.QWEN3_235B, 235_093_634_560, 36_945),
        ],
        ids=lambda value: value.name if isinstance(value, headers.Architecture) else "",
    )
    def test_sizes_are_those_that_the_hub_tells(
        self, architecture: headers.Architecture, parameters: int, tensors: int
    ) -> None:
        assert architecture.parameters == parameters
        assert len(list(architecture.shapes())) == tensors

    def test_tensors_lie_side_by_side_in_shards_of_five_gib(self) -> None:
        found = headers.checkpoint(headers.LLAMA_8B, "s3://b/x")
        assert found.nbytes == 2 * headers.LLAMA_8B.parameters
        shards = defaultdict(list)
        for ref in found.tensors.values():
            assert ref.nbytes == 2 * math.prod(ref.shape)
            shards[ref.url].append(ref)
        assert len(shards) == 3 + 1
        for refs in shards.values():
            assert refs[0].start == 0
            assert all(one.stop == other.start for one, other in pairwise(refs))
            assert refs[-1].stop <= headers.SHARD_BYTES

    def test_another_url_is_another_checkpoint(self) -> None:
        one, other = (headers.checkpoint(SMALL, f"s3://b/{name}") for name in "ab")
        assert one.fingerprint != other.fingerprint
        assert headers.checkpoint(SMALL, "s3://b/a") == one

    def test_experts_are_adapted(self, zoo: night.Models) -> None:
        kinds = {pair.kind for task in zoo["experts-00"] if task.block.purpose == "factor" for pair in task.block.pairs}
        assert kinds == {"attention", "expert", "embedding", "lm_head"}


class TestFleet:
    @given(reading=st.lists(st.booleans(), min_size=1, max_size=40), storage=st.floats(1, 1e3))
    def test_nobody_reads_faster_than_worker_node_and_storage_allow(self, reading: list[bool], storage: float) -> None:
        assumed = replace(SLOW, storage_rate=storage, gpus_per_node=3)
        rates = assumed.rates(np.array(reading))
        assert all((rate > 0) == reads for rate, reads in zip(rates, reading, strict=True))
        assert rates.max() <= assumed.worker_rate
        for start in range(0, len(rates), 3):
            assert rates[start : start + 3].sum() <= assumed.node_rate * (1 + 1e-9)
        assert rates.sum() <= assumed.whole_rate(len(rates)) * (1 + 1e-9)

    def test_two_on_a_node_share_it_until_one_is_done(self) -> None:
        """15 bytes a second: both have read 30 after 4 s; the other's last 10 come at its own rate, in one."""
        fleet = Fleet(3, SLOW)
        fleet.begin(0, (Step(30, 0, ahead=False),), None)
        fleet.begin(1, (Step(40, 0, ahead=False),), None)
        assert (fleet.advance(), fleet.now) == ([0], 4)
        assert (fleet.advance(), fleet.now) == ([1], 5)

    def test_a_model_is_read_while_the_one_before_is_computed(self) -> None:
        fleet = Fleet(1, SLOW)
        fleet.begin(0, (Step(20, 5, ahead=True), Step(30, 1, ahead=True)), None)
        assert until_done(fleet) == 2 + 5 + 1
        fleet = Fleet(1, SLOW)
        fleet.begin(0, (Step(20, 5, ahead=True), Step(30, 1, ahead=False)), None)
        assert until_done(fleet) == 2 + 5 + 3 + 1

    def test_a_told_task_is_read_ahead_and_another_in_vain(self) -> None:
        told, other = (Step(30, 1, ahead=True),), (Step(30, 1, ahead=True),)
        for following, seconds, vain in ((told, 2 + 2 + 1 + 1, 0), (other, 2 + 2 + 1 + 3 + 1, 30)):
            fleet = Fleet(1, SLOW)
            fleet.begin(0, (Step(20, 2, ahead=True),), told)
            assert until_done(fleet) == 4
            fleet.begin(0, following, None)
            assert until_done(fleet) == seconds
            assert (fleet.vain, fleet.read) == (vain, 50 + vain)

    def test_what_is_read_ahead_for_nobody_ends_nothing(self) -> None:
        fleet = Fleet(2, SLOW)
        fleet.begin(0, (Step(10, 1, ahead=True),), (Step(1000, 1, ahead=True),))
        fleet.begin(1, (Step(10, 300, ahead=True),), None)
        assert until_done(fleet) < 3
        assert until_done(fleet) > 300


def until_done(fleet: Fleet) -> float:
    while not fleet.advance():
        pass
    return fleet.now


@settings(max_examples=25, deadline=None)
@given(
    gpus=st.integers(1, 40),
    share=st.sampled_from(["auto", "max", "off"]),
    noise=st.sampled_from([0.0, 0.5]),
    storage=st.sampled_from([5e9, 1e12]),
    seed=st.integers(0, 9),
)
def test_all_is_done_once_by_workers_that_do_one_thing_at_a_time(
    zoo: night.Models, gpus: int, share: Share, noise: float, storage: float, seed: int
) -> None:
    assumed = Assumed(noise=noise, seed=seed, storage_rate=storage)
    tasks = in_cohorts(zoo, share, gpus)
    found = night.simulate(tasks, gpus, assumed)
    assert sorted(span.task.id for span in found.spans) == sorted(task.id for task in tasks)
    by_worker = defaultdict(list)
    for span in found.spans:
        assert 0 <= span.began <= span.ended
        by_worker[span.worker].append(span)
    assert set(by_worker) <= set(range(gpus))
    for spans in by_worker.values():
        assert all(one.ended <= other.began for one, other in pairwise(spans))
    steps = steps_of(tasks, assumed)
    assert found.read - found.vain == pytest.approx(sum(step.nbytes for task in steps.values() for step in task))
    assert found.ideal <= found.makespan * (1 + 1e-9)
    last: dict[str, float] = {}
    for span in found.spans:
        last |= {member.model: span.ended for member in span.task.members}
    assert found.published == last
    assert set(last) == set(zoo)
    assert max(last.values()) == found.makespan


def alone(task: Task, assumed: Assumed) -> float:
    [steps] = steps_of([task], assumed).values()
    return sum(step.nbytes / assumed.worker_rate + step.seconds for step in steps)


class TestNight:
    @pytest.mark.parametrize("share", ["auto", "max", "off"])
    def test_one_worker_that_reads_nothing_ahead_takes_the_sum_of_all(self, zoo: night.Models, share: Share) -> None:
        tasks = in_cohorts(zoo, share, 1)
        found = night.simulate(tasks, 1, NO_LIMIT)
        assert found.makespan == pytest.approx(sum(alone(task, NO_LIMIT) for task in tasks))
        assert found.vain == 0
        ahead = night.simulate(tasks, 1, replace(NO_LIMIT, ahead=1 << 40))
        assert ahead.ideal <= ahead.makespan < found.makespan

    @pytest.mark.parametrize("gpus", [2, 7, 30])
    def test_no_worker_waits_while_there_is_something_to_do(self, zoo: night.Models, gpus: int) -> None:
        """Graham's bound for any order: all work shared evenly, and the largest task after that."""
        tasks = in_cohorts(zoo, "auto", gpus)
        costs = [alone(task, NO_LIMIT) for task in tasks]
        assert night.simulate(tasks, gpus, NO_LIMIT).makespan <= (sum(costs) / gpus + max(costs)) * (1 + 1e-9)

    def test_a_night_is_the_same_every_time_and_with_noise_another_for_another_seed(self, zoo: night.Models) -> None:
        tasks = in_cohorts(zoo, "auto", 4)
        noisy = [night.simulate(tasks, 4, Assumed(noise=0.3, seed=seed)).makespan for seed in (1, 1, 2)]
        assert noisy[0] == noisy[1] != noisy[2]
        assert len({night.simulate(tasks, 4, Assumed(seed=seed)).makespan for seed in (1, 2)}) == 1

    def test_more_storage_does_not_hold_anybody_up(self, zoo: night.Models) -> None:
        tasks = in_cohorts(zoo, "auto", 16)
        slow, fast = (night.simulate(tasks, 16, Assumed(storage_rate=rate)) for rate in (5e9, 50e9))
        assert slow.makespan > 2 * fast.makespan
        assert slow.ideal == pytest.approx(sum(task.nbytes for task in tasks) / 5e9)

    def test_nothing_to_do_takes_no_time(self) -> None:
        assert night.simulate([], 3, Assumed()).makespan == 0

    def test_least_is_every_fine_tune_and_every_base_once(self, zoo: night.Models) -> None:
        small, experts = (2 * architecture.parameters for architecture in (SMALL, EXPERTS))
        assert night.least_bytes(zoo) == (5 + 1) * small + (2 + 1) * experts


def test_a_row_is_saved_and_shown_with_what_was_assumed(zoo: night.Models) -> None:
    assumed = Assumed(noise=0.1)
    found = night.simulated(zoo, 8, assumed)
    row = {"night": "a few", "solver": "auto", "gpus": 8, "assumed": asdict(assumed), "least_bytes": 1e9, **found}
    title, table, told = zoo_table.night({"x": json.loads(json.dumps(row))})
    assert "simulated" in title
    assert f"| a few | auto | 8 | {found['tasks']} | {found['cohorts']} |" in table
    assert f"| {found['tail']:.3f} | 1.05 |" in table
    assert "profile sm90, 8 on a node; a worker reads 2 GB/s at most, a node 12.5 GB/s" in told
    assert "task times vary by 10.00 %" in told
    assert found["first_published"] <= found["half_published"] <= found["makespan"]
    assert night.least_bytes(zoo) <= found["read_bytes"] - found["vain_bytes"]
    assert found["tail"] >= 1


def test_the_nights_that_are_asked_for_are_there() -> None:
    assert {name: sum(count for _, count in kinds) for name, kinds in night.NIGHTS.items()} == {
        "40 × 8B": 40, "10 × 70B": 10, "4 × 235B": 4, "all 54": 54,
    }  # fmt: skip
    assert night.ASKED == {8: 1.05, 64: 1.10, 512: 1.25}
