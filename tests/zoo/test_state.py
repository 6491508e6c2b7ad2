"""The record of each request: written once, numbered without gaps, read from one listing, and never in the way."""

from __future__ import annotations

import dataclasses
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from phlora_pipeline import storage
from phlora_pipeline.zoo import state
from phlora_pipeline.zoo.state import Attempt, Ledger, Outcome
from tests.zoo import shelf

MODEL = shelf.MODEL
REQUEST, OTHER = "a" * 32, "b" * 32


def outcome(request: str = REQUEST, number: int = 1, **changed: object) -> Outcome:
    made = Outcome(request, "committed", shelf.version(number), f"run-{number}", shelf.moment(number), {"tensors": 7})
    return dataclasses.replace(made, **changed)  # type: ignore[arg-type]


def fail(
    out: str, request: str = REQUEST, *, kind: str = "failed", reason: str = "a NaN", model: str = MODEL
) -> Attempt:
    assert kind in {"failed", "changed"}
    return state.record_attempt(out, model, request, kind=kind, reason=reason, remedy="mend it", run="run-1")  # type: ignore[arg-type]


def test_records_come_back(out: str) -> None:
    settled = state.record_outcome(out, MODEL, outcome())
    first, second = fail(out, OTHER), fail(out, OTHER, kind="changed")
    ledger = Ledger.read(out)
    assert ledger.models == (MODEL,)
    assert ledger.outcome(MODEL, REQUEST) == settled == outcome()
    assert ledger.attempts(MODEL, OTHER) == (first, second)
    assert (first.number, second.number) == (1, 2)
    assert (ledger.outcome(MODEL, OTHER), ledger.attempts(MODEL, REQUEST), ledger.problems) == (None, (), ())
    assert shelf.names(f"{out}/_state/{MODEL}") == [
        f"{REQUEST}/outcome.json", f"{OTHER}/attempt-1.json", f"{OTHER}/attempt-2.json",
    ]  # fmt: skip


def test_where_nothing_was_recorded_everything_is_due(out: str) -> None:
    ledger = Ledger.read(out)
    assert (ledger.models, ledger.due(MODEL, REQUEST), ledger.latest_outcome(MODEL), ledger.latest_attempts(MODEL)) == (
        (), True, None, (),
    )  # fmt: skip


def test_a_request_is_due_until_it_is_settled_or_has_failed_twice(out: str) -> None:
    told = []
    for kind in ("failed", "changed", "changed", "changed", "failed"):
        told.append(Ledger.read(out).due(MODEL, REQUEST))
        fail(out, kind=kind)
    assert told == [True] * 5  # that a source changes under one's hands is not its fault
    assert Ledger.read(out).quarantined(MODEL, REQUEST)
    assert not Ledger.read(out).due(MODEL, REQUEST)
    assert Ledger.read(out).due(MODEL, OTHER)  # new sources, new luck
    state.record_outcome(out, MODEL, outcome(OTHER))
    assert not Ledger.read(out).due(MODEL, OTHER)


def test_retry_forgets_the_attempts_and_nothing_else(out: str) -> None:
    fail(out), fail(out), fail(out, OTHER), fail(out, model="another")
    state.record_outcome(out, MODEL, outcome("c" * 32))
    assert state.retry(out, MODEL) == 3
    assert state.retry(out, MODEL) == 0
    ledger = Ledger.read(out)
    assert ledger.due(MODEL, REQUEST)
    assert ledger.outcome(MODEL, "c" * 32) is not None
    assert len(ledger.attempts("another", REQUEST)) == 1
    assert fail(out).number == 1


def test_the_first_outcome_stands_and_is_adopted(out: str) -> None:
    first = state.record_outcome(out, MODEL, outcome(number=1))
    assert state.record_outcome(out, MODEL, outcome(number=1)) == first
    assert state.record_outcome(out, MODEL, outcome(number=2)) == first
    assert Ledger.read(out).outcome(MODEL, REQUEST) == first


def test_of_eight_outcomes_one_is_everybodys(out: str) -> None:
    barrier = threading.Barrier(8)

    def record(number: int) -> Outcome:
        barrier.wait()
        return state.record_outcome(out, MODEL, outcome(number=number))

    with ThreadPoolExecutor(8) as pool:
        adopted = set(map(repr, pool.map(record, range(1, 9))))
    assert adopted == {repr(Ledger.read(out).outcome(MODEL, REQUEST))}


def test_eight_attempts_at_once_have_eight_numbers(out: str) -> None:
    barrier = threading.Barrier(8)

    def record(number: int) -> Attempt:
        barrier.wait()
        return fail(out, reason=f"reason {number}")

    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(record, range(8)))
    assert sorted(attempt.number for attempt in made) == list(range(1, 9))
    assert Ledger.read(out).attempts(MODEL, REQUEST) == tuple(sorted(made, key=lambda attempt: attempt.number))


def test_ten_attempts_are_in_the_order_of_their_numbers(out: str) -> None:
    made = tuple(fail(out, kind="changed") for _ in range(11))
    assert Ledger.read(out).attempts(MODEL, REQUEST) == made  # 10 comes after 9, not after 1


def test_what_came_last_is_told_of_any_request(out: str) -> None:
    for number, request in ((2, REQUEST), (3, OTHER), (1, "c" * 32)):
        state.record_outcome(out, MODEL, outcome(request, number))
    fail(out, REQUEST), fail(out, OTHER)
    last = fail(out, REQUEST)
    ledger = Ledger.read(out)
    assert ledger.latest_outcome(MODEL) == outcome(OTHER, 3)
    assert [found.request for found in ledger.outcomes(MODEL)] == ["c" * 32, REQUEST, OTHER]
    assert [attempt.number for attempt in ledger.latest_attempts(MODEL)] == [1, 2]
    assert ledger.latest_attempts(MODEL)[-1] == last


DAMAGED = {
    "empty": b"",
    "no json": b"{",
    "not utf-8": b"\xff\xfe",
    "a list": b"[]",
    "of a later format": json.dumps({"request": REQUEST}).encode(),
    "another request": json.dumps(dataclasses.asdict(outcome(OTHER))).encode(),
    "an outcome that is none": json.dumps({**dataclasses.asdict(outcome()), "outcome": "perhaps"}).encode(),
    "a number for a text": json.dumps({**dataclasses.asdict(outcome()), "version": 7}).encode(),
    "a time that is none": json.dumps({**dataclasses.asdict(outcome()), "ended": "yesterday"}).encode(),
    "huge": b" " * (2 << 20),
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_record_stops_nobody_and_is_mended_by_the_next(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    out = str(tmp_path_factory.mktemp("damaged"))
    url = f"{out}/_state/{MODEL}/{REQUEST}/outcome.json"
    storage.put_new(url, data)
    state.record_outcome(out, "another", outcome())
    ledger = Ledger.read(out)
    ledger.open()
    assert ledger.due(MODEL, REQUEST)
    assert not ledger.due("another", REQUEST)
    [problem] = ledger.problems
    assert url in problem
    assert state.record_outcome(out, MODEL, outcome()) == outcome()
    assert Ledger.read(out).outcome(MODEL, REQUEST) == outcome()


def test_an_attempt_under_another_number_is_no_record(out: str) -> None:
    fail(out)
    [info] = storage.list_tree(f"{out}/_state")
    storage.put_new(info.url.replace("attempt-1", "attempt-2"), storage.read_object(info, limit=1 << 20))
    ledger = Ledger.read(out)
    assert [attempt.number for attempt in ledger.attempts(MODEL, REQUEST)] == [1]
    assert "attempt-2.json" in ledger.problems[0]
    assert fail(out).number == 3


def test_unknown_keys_of_a_later_version_are_passed_over(out: str) -> None:
    document = {**dataclasses.asdict(outcome()), "later": {"than": "this"}}
    storage.put_new(f"{out}/_state/{MODEL}/{REQUEST}/outcome.json", json.dumps(document).encode())
    assert Ledger.read(out).outcome(MODEL, REQUEST) == outcome()


def test_foreign_files_are_passed_over(out: str) -> None:
    for name in (
        f"{MODEL}/{REQUEST}/notes.txt", f"{MODEL}/outcome.json", "outcome.json", f"{MODEL}/{REQUEST}/attempt-0.json",
        f"{MODEL}/{REQUEST}/attempt-1.json.bak", f"_x/{REQUEST}/outcome.json", f"{MODEL}/{REQUEST}/deeper/outcome.json",
    ):  # fmt: skip
        storage.put_new(f"{out}/_state/{name}", b"?")
    ledger = Ledger.read(out)
    ledger.open()
    assert (ledger.models, ledger.problems) == ((), ())
    assert state.retry(out, MODEL) == 0
    assert fail(out).number == 1


def test_a_record_that_is_removed_after_the_listing_is_not_there(out: str) -> None:
    fail(out), fail(out)
    ledger = Ledger.read(out)
    state.retry(out, MODEL)
    again = fail(out, reason="another")
    assert ledger.attempts(MODEL, REQUEST) == (again,)
    assert ledger.problems == ()


def test_one_listing_and_each_small_file_once(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(30):
        state.record_outcome(out, f"model-{number}", outcome())
        fail(out, OTHER, model=f"model-{number}")
    asked: list[str] = []

    def counted(verb: str) -> None:
        real = getattr(storage, verb)
        monkeypatch.setattr(storage, verb, lambda *args, **named: (asked.append(verb), real(*args, **named))[1])

    for verb in ("list_tree", "list_folder", "stat", "read_object"):
        counted(verb)
    ledger = Ledger.read(out)
    assert asked == ["list_tree"]
    assert ledger.outcome("model-7", REQUEST) == outcome()
    assert asked == ["list_tree", "read_object", "read_object"]
    ledger.open()
    assert not any(ledger.due(model, REQUEST) for model in ledger.models)
    assert sorted(asked) == ["list_tree", *["read_object"] * 60]


@pytest.mark.parametrize("told", ["line\nbreak\x00", "x" * 1_000_000, "é" * 9_000, "<script>"])
def test_a_reason_of_any_length_is_one_line_that_can_be_read_again(out: str, told: str) -> None:
    made = fail(out, reason=told)
    assert Ledger.read(out).attempts(MODEL, REQUEST) == (made,)
    assert "\n" not in made.reason
    assert len(made.reason) < 5000
    assert made.reason.startswith(told[:4])


def test_outcomes_that_name_a_version_are_forgotten_with_it(out: str) -> None:
    for request, number in ((REQUEST, 1), (OTHER, 2), ("c" * 32, 1)):
        state.record_outcome(out, MODEL, outcome(request, number))
    assert state.forget(out, MODEL, shelf.version(1)) == 2
    ledger = Ledger.read(out)
    assert [ledger.due(MODEL, request) for request in (REQUEST, OTHER, "c" * 32)] == [True, False, True]
