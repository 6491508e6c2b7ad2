"""Whom a loss is charged to: a worker that dies alone to its task, a node that goes to nobody, within reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from ray import exceptions

from phlora_pipeline.dispatch import MAX_ATTEMPTS, Dispatcher
from phlora_pipeline.driver import loop, starts
from phlora_pipeline.engine import Reports, Resources
from phlora_pipeline.errors import DeviceError

UNAVAILABLE = exceptions.ActorUnavailableError("RPC error: Socket closed", b"\0" * 16)
DIED = exceptions.ActorDiedError()


class FakePool:
    """Slots, and whether their node is known to be gone."""

    size, desks, wish, desk_wish = 2, 1, "1 GPU", "a processor"

    def __init__(self) -> None:
        self.gone, self.started_slots = False, 0
        self.started: list[int] = []
        self.open_desks: list[int] = []
        self.did: list[str] = []

    def ask(self, slot: int) -> object:
        self.did.append(f"ask {slot}")
        return object()

    def run(self, slot: int, task: Any, prefetch: Any) -> object:
        self.did.append(f"run {slot}")
        return object()

    def open_desk(self, desk: int) -> object:
        self.did.append(f"open {desk}")
        return object()

    def desk_is_open(self, desk: int) -> None:
        self.open_desks.append(desk)

    def run_job(self, desk: int, job: Any) -> object:
        self.did.append(f"job {desk}")
        return object()

    def node_is_gone(self, slot: int) -> bool:
        return self.gone

    def start(self, slot: int) -> object:
        self.started_slots += 1
        return object()

    def ready(self, slot: int, node: str) -> None:
        pass

    def close_desk(self, desk: int) -> None:
        self.did.append(f"close {desk}")


class Bench:
    """A loop, with one task that its only worker has."""

    def __init__(self) -> None:
        member = SimpleNamespace(part_url="part")
        task: Any = SimpleNamespace(id="part", members=(member,), cohort=0, cost=1.0)
        self.pool = FakePool()
        self.queue: Dispatcher[int] = Dispatcher([task])
        self.ended: list[Any] = []
        listener = Reports(lambda _: None)
        ray = SimpleNamespace(exceptions=exceptions, get=self.get)
        pool: Any = self.pool
        self.loop = loop.Loop(ray, pool, self.queue, listener, Resources("cpu", 1))
        self.loop._listener = SimpleNamespace(  # type: ignore[assignment]
            retried=lambda *_, **__: None, ended=lambda job, outcome: self.ended.append(outcome)
        )
        self.answer: Any = None

    def get(self, _: object) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def lose(self, error: Exception) -> bool:
        """The worker takes the task and is lost; whether the task is given up."""
        assert self.queue.take(0) is not None
        self.loop._failed(0, error)
        return bool(self.queue.lost)

    def answers(self, answer: Any) -> None:
        """What is being waited for comes."""
        self.answer = answer
        for reference in [*self.loop._calls, *self.loop._jobs, *self.loop._opening]:
            self.loop._ended(reference)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The driver's, which goes when it is told to."""
    time = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(loop.time, "monotonic", lambda: time.now)
    return time


def test_a_worker_that_dies_alone_is_charged_to_its_task() -> None:
    bench = Bench()
    assert [bench.lose(DIED) for _ in range(MAX_ATTEMPTS)] == [False, True]


@pytest.mark.parametrize("known", [True, False])
def test_a_node_that_goes_is_charged_to_nobody_unless_it_goes_on_like_that(known: bool) -> None:
    """Whether Ray knows it yet, or knows of a broken connection only."""
    bench = Bench()
    bench.pool.gone = known
    given_up = [bench.lose(DIED if known else UNAVAILABLE) for _ in range(loop.MAX_LOSSES + MAX_ATTEMPTS)]
    assert given_up.index(True) == loop.MAX_LOSSES + MAX_ATTEMPTS - 1


def test_a_job_that_loses_its_process_is_done_again_some_times() -> None:
    bench = Bench()
    job: Any = object()
    for losses in range(loop.MAX_DESKS + 1):
        reference = object()
        bench.loop._jobs[reference], bench.answer = (0, job), UNAVAILABLE
        bench.loop._ended(reference)
        assert len(bench.ended) == (losses == loop.MAX_DESKS)
        assert list(bench.loop._backlog) == [] if bench.ended else [job]
        bench.loop._backlog.clear()
    assert bench.ended == [UNAVAILABLE]


def false_starts(bench: Bench, clock: SimpleNamespace, seconds: float, *, every: float = 0.5) -> Iterator[int]:
    """Whatever is started dies at once, for so long; how many have been started after each moment."""
    bench.loop._calls = {object(): slot for slot in range(bench.pool.size)}
    end = clock.now + seconds
    while clock.now < end:
        bench.answers(DIED)
        clock.now += every
        bench.loop._start_again()
        yield bench.pool.started_slots


def test_a_burst_of_false_starts_ends_no_night(clock: SimpleNamespace) -> None:
    """On a busy machine all die within seconds, and a moment later none would."""
    bench = Bench()
    most = max(false_starts(bench, clock, 9, every=0.05))
    assert 2 * bench.pool.size < most <= 5 * bench.pool.size


def test_the_pause_between_them_grows_up_to_a_bound(clock: SimpleNamespace) -> None:
    bench = Bench()
    bench.pool.started = [9]  # somebody works, and nobody gives up
    counts = list(false_starts(bench, clock, 600))
    seconds = [number / 2 for number, (before, after) in enumerate(pairwise(counts)) if after > before]
    pauses = [after - before for before, after in pairwise(seconds)]
    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (starts.SHORTEST_PAUSE, starts.LONGEST_PAUSE)


def test_workers_that_never_start_are_given_up_in_time(clock: SimpleNamespace) -> None:
    bench = Bench()
    began = clock.now
    with pytest.raises(
        DeviceError, match=r"^[0-9]+ Ray workers died before their first task, within [0-9]+ s, .*ActorDied"
    ):
        max(false_starts(bench, clock, 10 * starts.PATIENCE_SECONDS))
    assert 0 < clock.now - began - starts.PATIENCE_SECONDS <= starts.LONGEST_PAUSE
    assert bench.pool.started_slots > MAX_ATTEMPTS * bench.pool.size


def test_every_place_is_tried_however_slowly_they_die(clock: SimpleNamespace) -> None:
    bench = Bench()
    with pytest.raises(DeviceError, match=f"^{MAX_ATTEMPTS * bench.pool.size + 1} Ray workers died"):
        max(false_starts(bench, clock, 100 * starts.PATIENCE_SECONDS, every=2 * starts.PATIENCE_SECONDS))


def test_workers_that_do_not_start_count_one_after_another(clock: SimpleNamespace) -> None:
    """A night of lost nodes is no proof that none can start."""
    bench = Bench()
    for _ in range(5):
        max(false_starts(bench, clock, 0.9 * starts.PATIENCE_SECONDS))
        clock.now += starts.LONGEST_PAUSE
        bench.loop._start_again()
        bench.answers("node")


def test_a_desk_that_does_not_open_is_tried_after_a_pause_and_given_up(clock: SimpleNamespace) -> None:
    bench = Bench()
    job: Any = object()
    bench.loop._backlog.append(job)

    def turns(seconds: int) -> None:
        for _ in range(seconds):
            bench.loop._hand_out_jobs()
            bench.answers(DIED)
            clock.now += 1

    began = clock.now
    bench.loop._hand_out_jobs()
    bench.answers(DIED)
    bench.loop._hand_out_jobs()
    assert bench.pool.did == ["open 0", "close 0"]
    with pytest.raises(DeviceError, match="Ray processes that publish died before their first task"):
        turns(10 * int(starts.PATIENCE_SECONDS))
    assert clock.now - began <= starts.PATIENCE_SECONDS + starts.LONGEST_PAUSE
    assert bench.pool.did.count("open 0") > MAX_ATTEMPTS * bench.pool.desks


def test_a_worker_that_died_while_it_had_nothing_to_do_is_nobodys_loss(clock: SimpleNamespace) -> None:
    bench = Bench()
    bench.pool.started = [0]
    bench.loop._calls[object()] = 0
    bench.answers("node")
    clock.now += loop.REST_SECONDS + 1
    bench.loop._hand_out()
    assert bench.pool.did == ["ask 0"]
    bench.answers(DIED)
    assert (bench.pool.started_slots, bench.queue.waiting, bench.queue.lost) == (1, 1, {})
    bench.answers("node")
    bench.loop._hand_out()
    assert bench.pool.did == ["ask 0", "run 0"]


def test_a_worker_that_has_just_answered_is_not_asked(clock: SimpleNamespace) -> None:
    bench = Bench()
    bench.pool.started = [0]
    bench.loop._calls[object()] = 0
    bench.answers("node")
    clock.now += loop.REST_SECONDS / 2
    bench.loop._hand_out()
    assert bench.pool.did == ["run 0"]


def test_a_job_waits_for_a_desk_that_is_there_and_not_for_ever(clock: SimpleNamespace) -> None:
    bench = Bench()
    bench.pool.started = [0]
    job: Any = object()
    bench.loop._backlog.append(job)
    for _ in range(3):
        bench.loop._hand_out_jobs()
        bench.loop._require_places()
    assert bench.pool.did == ["open 0"]
    clock.now += bench.loop._start_seconds + 1
    with pytest.raises(
        DeviceError, match="no process that publishes has started within 901 s; each asks for a processor"
    ):
        bench.loop._require_places()
    bench.answers(DIED)  # its node went
    clock.now += starts.SHORTEST_PAUSE
    bench.loop._hand_out_jobs()
    bench.answers(None)
    bench.loop._hand_out_jobs()
    bench.loop._require_places()
    assert bench.pool.did == ["open 0", "close 0", "open 0", "job 0"]
    assert not bench.loop._backlog
