"""A night that ends at any moment, or runs beside another one: no reader ever sees half an adapter, and nothing is done twice."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import parts, reducer, storage
from phlora_pipeline.zoo import layout
from phlora_pipeline.zoo.publish import Publish, Published
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Stopped, Watcher, Zoo, states, watched_writes


def small_zoo(root: Path, out: Path) -> Zoo:
    """Two models of the same bytes, and one that is its base: all that a night can publish."""
    zoo = Zoo(root, str(out))
    base = zoo.add_base()
    for name in ("one", "two"):
        zoo.add(name, toys.fine_tuned(base))
    zoo.add("same", base)
    return zoo


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Zoo, dict[str, Any], int]:
    """A zoo, what an undisturbed night makes of it, and how many writes that takes; at each of them all is whole."""
    root = tmp_path_factory.mktemp("calm")
    zoo = small_zoo(root / "zoo", root / "out")
    with watched_writes(whole_at_each(zoo)) as writes:
        assert zoo.night().exit_code == 0
    nights.require_whole(zoo.out)
    return zoo, nights.left_behind(zoo.out), len(writes.calls)


def whole_at_each(zoo: Zoo) -> Callable[[int], None]:
    return lambda _: nights.require_whole(zoo.out)


def stop_at(number: int) -> Callable[[int], None]:
    def stop(count: int) -> None:
        if count == number:
            raise Stopped

    return stop


WRITES = 47
"""Of the undisturbed night: the test below fails where this is not so any more."""


def test_the_number_of_writes_is_known(calm: tuple[Zoo, dict[str, Any], int]) -> None:
    assert calm[2] == WRITES


@pytest.mark.parametrize("share", ["max", "off"])
@pytest.mark.parametrize("first", range(0, WRITES, 4))
def test_ended_between_any_two_writes_the_next_night_makes_it_whole(
    calm: tuple[Zoo, dict[str, Any], int], tmp_path: Path, share: str, first: int
) -> None:
    run = {**nights.PLAIN, "share_base": share}
    for number in range(first, min(first + 4, WRITES)):
        zoo = Zoo(calm[0].root, str(tmp_path / f"{number}"))
        with watched_writes(stop_at(number)) as before, pytest.raises(Stopped):
            zoo.night(run=run)
        assert len(before.calls) == number
        nights.require_whole(zoo.out)
        stood = {storage.join(zoo.out, name) for name in nights.names(zoo.out, "_parts")}
        with watched_writes(whole_at_each(zoo)) as after:
            assert zoo.night(run=run).exit_code == 0
        assert nights.left_behind(zoo.out) == calm[1]
        assert not stood & after.of_parts().keys()
        assert zoo.night(run=run).run == ""


def test_ended_twice_is_no_worse(calm: tuple[Zoo, dict[str, Any], int], tmp_path: Path) -> None:
    """Each night gets five writes further than the one before, until one has nothing left to do."""
    zoo = Zoo(calm[0].root, str(tmp_path / "out"))
    for _ in range(WRITES):
        with watched_writes(stop_at(8)):
            try:
                ended = zoo.night()
            except Stopped:
                nights.require_whole(zoo.out)
                continue
        if not ended.run:
            break
    assert ended.counts == {"published": 2, "unchanged": 1}
    assert nights.left_behind(zoo.out) == calm[1]


def test_moved_while_it_was_half_published_it_is_still_the_same_version(tmp_path: Path) -> None:
    """The next night finds the files of the first one, which named another place."""
    for number in range(WRITES):
        zoo = Zoo(tmp_path / f"zoo{number}", str(tmp_path / f"out{number}"))
        zoo.add("m1", toys.fine_tuned(zoo.add_base()))
        with watched_writes(stop_at(number)):
            try:
                zoo.night()
            except Stopped:
                pass
            else:
                break
        (zoo.root / "tuned").rename(zoo.root / "moved")
        again = zoo.night(discover=[{"prefix": str(zoo.root / "moved"), "base": "b"}])
        assert again.exit_code == 0, f"ended before write {number}"
        assert states(again)["m1"] in {"committed", "published"}
        nights.require_whole(zoo.out)


# ------------------------------------------------------------------------------------------------- two nights at once, by hand


def test_a_part_that_another_night_takes_away_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one published and cleaned up, just after this one saw that the part is there."""
    zoo = small_zoo(tmp_path / "zoo", tmp_path / "out")
    watcher = Watcher()
    zoo.night(watcher, stopping=lambda: len(watcher.reports) >= 2)
    load = parts.load
    taken: list[str] = []

    def gone(url: str) -> parts.Part:
        if not taken:
            taken.append(url)
            storage.delete(url)
        return load(url)

    monkeypatch.setattr(parts, "load", gone)
    assert zoo.night().counts == {"committed": 2, "nothing_to_adapt": 1}
    assert taken
    nights.require_whole(zoo.out)


def test_parts_that_another_night_takes_away_before_they_are_published_are_nobodys_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the same extraction with other ranks, say; or its tensor failed there, too."""
    zoo = small_zoo(tmp_path / "zoo", tmp_path / "out")
    real = Publish.run

    def late(job: Publish) -> Published:
        if job.model == "two":
            reducer.drop_parts(job.prepared.plan)
        return real(job)

    with monkeypatch.context() as patch:
        patch.setattr(Publish, "run", late)
        assert states(zoo.night()) == {"one": "committed", "same": "nothing_to_adapt", "two": "changed"}
    assert states(zoo.night()) == {"one": "published", "same": "unchanged", "two": "committed"}
    nights.require_whole(zoo.out)


@pytest.mark.parametrize("moment", ["planned", "first task", "last task"])
def test_a_night_inside_another_one_changes_nothing(
    calm: tuple[Zoo, dict[str, Any], int], tmp_path: Path, moment: str
) -> None:
    """The inner one does everything; the outer one finds it done, whenever it looks."""
    zoo = Zoo(calm[0].root, str(tmp_path / "out"))
    watcher, inside = Watcher(), []

    def inner() -> None:
        tasks = {"planned": 0, "first task": 1, "last task": len(watcher.tasks)}[moment]
        if len(watcher.reports) == tasks and not inside:
            inside.append(zoo.night().counts)

    watcher._planned = watcher._done = inner
    assert zoo.night(watcher).counts == {"committed": 2, "nothing_to_adapt": 1}
    assert [sum(counts.values()) for counts in inside] == [3]
    assert set(inside[0]) <= {"committed", "nothing_to_adapt", "published", "unchanged"}
    assert nights.left_behind(zoo.out) == calm[1]


@pytest.mark.parametrize("number", range(0, WRITES, 6))
def test_a_night_inside_anothers_writes_changes_nothing(
    calm: tuple[Zoo, dict[str, Any], int], tmp_path: Path, number: int
) -> None:
    zoo = Zoo(calm[0].root, str(tmp_path / "out"))
    inner: list[dict[str, int]] = []

    def meanwhile(count: int) -> None:
        if count == number and not inner:
            inner.append({})
            inner[0] = zoo.night().counts

    with watched_writes(meanwhile):
        outer = zoo.night().counts
    assert set(outer) | set(inner[0]) <= {"committed", "nothing_to_adapt", "published", "unchanged"}
    assert nights.left_behind(zoo.out) == calm[1]
    nights.require_whole(zoo.out)


def test_committed_just_after_it_was_looked_for_it_is_no_conflict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two listings the other night puts the config, and drops the parts."""
    zoo = small_zoo(tmp_path / "zoo", tmp_path / "out")
    put_new = storage.put_new

    def without_config(url: str, *arguments: Any, **named: Any) -> Any:
        if url.endswith(f"/{layout.CONFIG}"):
            raise Stopped
        return put_new(url, *arguments, **named)

    monkeypatch.setattr(storage, "put_new", without_config)
    with pytest.raises(Stopped):
        zoo.night()
    monkeypatch.setattr(storage, "put_new", put_new)
    listing, inner = storage.list_folder, Zoo(zoo.root, zoo.out)

    def meanwhile(url: str) -> Any:
        if "/_parts/" in url and reducer.storage.list_folder is meanwhile:
            monkeypatch.setattr(storage, "list_folder", listing)
            assert inner.night().exit_code == 0
        return listing(url)

    monkeypatch.setattr(storage, "list_folder", meanwhile)
    result = zoo.night()
    assert storage.list_folder is listing
    assert (result.exit_code, states(result)) == (
        0,
        {"one": "committed", "same": "nothing_to_adapt", "two": "committed"},
    )
    nights.require_whole(zoo.out)


# ------------------------------------------------------------------------------------------------------------ real processes


@pytest.mark.slow
def test_two_nights_racing_publish_everything_once(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    base = zoo.add_base()
    for seed in range(12):
        zoo.add(f"m{seed:02d}", toys.fine_tuned(base, seed=seed))
    zoo.settings = {"run": {**nights.PLAIN, "share_base": "off"}}
    calm = Zoo(zoo.root, str(tmp_path / "calm"), zoo.settings)
    calm.night()
    racers = [nights.process(zoo) for _ in range(2)]
    nights.go(*racers)
    told = [racer.communicate(timeout=120) for racer in racers]
    for racer, (out, err) in zip(racers, told, strict=True):
        assert racer.returncode == 0, err
        assert json.loads(out)["exit_code"] == 0
        assert json.loads(out)["counts"].get("committed", 0) + json.loads(out)["counts"].get("published", 0) == 12
    assert nights.left_behind(zoo.out) == nights.left_behind(calm.out)
    nights.require_whole(zoo.out)


@pytest.mark.slow
def test_killed_again_and_again_it_gets_there(calm: tuple[Zoo, dict[str, Any], int], tmp_path: Path) -> None:
    """SIGKILL, later each time: whatever the kernel had by then is what there is."""
    zoo = Zoo(calm[0].root, str(tmp_path / "out"))
    killed = 0
    for turn in range(6):
        night = nights.process(zoo)
        nights.go(night)
        time.sleep(0.02 + 0.06 * turn)
        killed += night.poll() is None
        night.send_signal(signal.SIGKILL)
        night.communicate(timeout=30)
        nights.require_whole(zoo.out)
    assert killed >= 3
    assert zoo.night().exit_code == 0
    left = {name: data for name, data in nights.left_behind(zoo.out).items() if not name.endswith((".tmp", ".lock"))}
    assert left == calm[1]
