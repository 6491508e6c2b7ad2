"""The pointer: forwards only, whoever writes last; never past a pin; and what was published behind the pin is not lost."""

from __future__ import annotations

import itertools
import json
import random
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.zoo import latest, state
from phlora_pipeline.zoo.latest import Head, Latest
from tests.zoo import shelf

MODEL = shelf.MODEL


def request(number: int) -> str:
    return f"{number:032x}"[::-1]


def head(number: int) -> Head:
    return Head(shelf.version(number), request(number), shelf.moment(number))


def advance(out: str, number: int) -> str:
    return latest.advance(out, MODEL, shelf.version(number), request(number), shelf.moment(number))


def served(out: str) -> int | None:
    pointer = latest.read(out, MODEL)
    return int(pointer.version, 16) if pointer else None


def test_it_goes_forwards_only(out: str) -> None:
    told = [(advance(out, number), served(out)) for number in (2, 1, 2, 4, 3)]
    assert told == [("moved", 2), ("kept", 2), ("kept", 2), ("moved", 4), ("kept", 4)]
    assert latest.read(out, MODEL) == Latest(shelf.version(4), request(4), shelf.moment(4))
    assert shelf.names(out) == [f"{MODEL}/latest.json"]


def test_where_nothing_is_published_there_is_nothing(out: str) -> None:
    assert (latest.read(out, MODEL), latest.versions(out, MODEL), latest.unpin(out, MODEL)) == (None, [], None)
    assert shelf.names(out) == []


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3))))
def test_any_order_of_the_same_nights_ends_at_the_last(
    tmp_path_factory: pytest.TempPathFactory, order: tuple[int, ...]
) -> None:
    out = str(tmp_path_factory.mktemp("out"))
    for number in order:
        advance(out, number)
    assert served(out) == 3


def test_the_same_version_of_a_later_run_holds_its_place(out: str) -> None:
    """Sources that went back: what the night between them made must not come up again."""
    advance(out, 1)
    assert latest.advance(out, MODEL, shelf.version(1), request(1), shelf.moment(9)) == "kept"
    assert (advance(out, 5), served(out)) == ("kept", 1)
    assert (advance(out, 10), served(out)) == ("moved", 10)


def test_of_eight_nights_at_once_the_last_is_served(out: str) -> None:
    barrier = threading.Barrier(8)

    def race(number: int) -> str:
        barrier.wait()
        return advance(out, number)

    numbers = list(range(1, 9))
    random.Random(4).shuffle(numbers)
    with ThreadPoolExecutor(8) as pool:
        told = dict(zip(numbers, pool.map(race, numbers), strict=True))
    assert served(out) == 8
    assert told[8] == "moved"


def test_a_rollback_stays_whatever_is_published(out: str) -> None:
    for number in (1, 2):
        shelf.publish(out, number)
        advance(out, number)
    assert latest.rollback(out, MODEL, shelf.version(1)).pinned
    for number in (3, 2, 1):
        assert advance(out, number) == "pinned"
    assert served(out) == 1
    assert latest.rollback(out, MODEL, shelf.version(1)) == latest.read(out, MODEL)


def test_without_the_pin_what_was_published_last_is_served(out: str) -> None:
    for number in (1, 2):
        shelf.publish(out, number)
        advance(out, number)
    latest.rollback(out, MODEL, shelf.version(1))
    advance(out, 3)
    assert latest.unpin(out, MODEL) == Latest(*(getattr(head(3), name) for name in ("version", "request", "began")))
    assert (advance(out, 2), served(out)) == ("kept", 3)
    assert (advance(out, 4), served(out)) == ("moved", 4)
    before = latest.read(out, MODEL)
    assert latest.unpin(out, MODEL) == before  # not pinned: nothing to do


def test_a_rollback_of_a_rollback_remembers_the_newest(out: str) -> None:
    for number in (1, 2, 3):
        shelf.publish(out, number)
        advance(out, number)
    latest.rollback(out, MODEL, shelf.version(2))
    latest.rollback(out, MODEL, shelf.version(1))
    assert served(out) == 1
    latest.unpin(out, MODEL)
    assert served(out) == 3
    assert latest.rollback(out, MODEL, shelf.version(3)) == Latest(
        shelf.version(3), request(3), shelf.moment(3), pinned=True, newest=head(3)
    )


def test_a_rollback_knows_the_request_of_its_version(out: str) -> None:
    for number in (1, 2):
        shelf.publish(out, number)
        advance(out, number)
        settled = state.Outcome(request(number), "committed", shelf.version(number), "run", shelf.moment(number), {})
        state.record_outcome(out, MODEL, settled)
    assert latest.rollback(out, MODEL, shelf.version(1)).request == request(1)


def test_a_version_whose_pointer_was_lost_can_be_served(out: str) -> None:
    shelf.publish(out, 1)
    latest.rollback(out, MODEL, shelf.version(1))
    assert (advance(out, 2), served(out)) == ("pinned", 1)
    latest.unpin(out, MODEL)
    assert served(out) == 2


@pytest.mark.parametrize("version", [shelf.version(3), shelf.version(9), "", "..", f"../{MODEL}/{shelf.version(1)}"])
def test_only_committed_versions_can_be_rolled_back_to(out: str, version: str) -> None:
    shelf.publish(out, 1)
    shelf.publish(out, 2)
    shelf.publish(out, 3, without=("adapter_config.json",))
    advance(out, 2)
    with pytest.raises(RequestError, match="has no published version") as caught:
        latest.rollback(out, MODEL, version)
    assert all(shelf.version(number) in caught.value.what for number in (1, 2))
    assert served(out) == 2


def test_versions_are_told_by_their_age_with_their_sizes(out: str) -> None:
    for number in (2, 1):
        shelf.publish(out, number)
    shelf.publish(out, 3, without=("adapter_config.json",))
    storage.put_new(f"{out}/{MODEL}/notes/adapter_config.json", b"{}")
    advance(out, 1)
    found = {item.version: item for item in latest.versions(out, MODEL)}
    assert set(found) == {shelf.version(1), shelf.version(2)}
    for number in (1, 2):
        item = found[shelf.version(number)]
        assert item.url == f"{out}/{MODEL}/{shelf.version(number)}"
        assert item.size == sum(map(len, shelf.files(number).values()))
        assert abs(item.modified - storage.clock(out)) < 60
    ages = [item.modified for item in latest.versions(out, MODEL)]
    assert ages == sorted(ages)


DAMAGED = [
    b"", b"{", b"[]", b"null", b"{}", b'{"version": 7}', b'{"version": "../x", "request": "", "began": "", "pinned": false}',
    json.dumps({"version": shelf.version(1), "request": "", "began": "yesterday", "pinned": False}).encode(),
    b" " * (2 << 20),
]  # fmt: skip


@pytest.mark.parametrize("data", DAMAGED, ids=range(len(DAMAGED)))
def test_a_damaged_pointer_is_told_and_never_written_over(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    """It may have been a pin: nobody but the user can know."""
    out = str(tmp_path_factory.mktemp("out"))
    shelf.publish(out, 1)
    url = f"{out}/{MODEL}/latest.json"
    storage.put_new(url, data)
    for verb in (
        lambda: latest.read(out, MODEL),
        lambda: advance(out, 1),
        lambda: latest.rollback(out, MODEL, shelf.version(1)),
        lambda: latest.unpin(out, MODEL),
    ):
        with pytest.raises(ConflictError, match=r"latest\.json does not name a version") as caught:
            verb()
        assert "remove it" in caught.value.remedy
    storage.delete(url)
    assert advance(out, 1) == "moved"


def test_who_looks_while_it_is_swapped_sees_one_or_the_other(out: str) -> None:
    stop, seen = threading.Event(), set()
    advance(out, 1)

    def look() -> None:
        while not stop.is_set():
            seen.add(served(out))

    with ThreadPoolExecutor(3) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        for number in range(2, 25):
            advance(out, number)
        stop.set()
        for future in looking:
            future.result()
    assert seen <= set(range(1, 25))
    assert served(out) == 24
