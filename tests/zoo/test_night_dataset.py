"""A night repairs the dataset over the whole zoo: what an outcome names is there, whoever took it away; what gc removed stays away."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import storage
from phlora_pipeline.errors import RequestError
from phlora_pipeline.zoo import dataset, gc, latest, night
from phlora_pipeline.zoo.state import Ledger
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo, states, watched_writes

RANK_2 = {"rank": 2, "dtype": "float32"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Two models in two versions each, and one that is its base."""
    root = tmp_path_factory.mktemp("made")
    zoo = Zoo(root / "zoo", str(root / "out"))
    base = zoo.add_base()
    for seed in (1, 2):
        zoo.add(f"m{seed}", toys.fine_tuned(base, seed=seed))
    zoo.add("same", base)
    zoo.night(extract=RANK_2)
    zoo.night()
    return zoo


@pytest.fixture
def zoo(made: Zoo, tmp_path: Path) -> Zoo:
    """The same once more: links to its checkpoints, which are settled so, and a copy of its output."""
    shutil.copytree(made.root, tmp_path / "zoo", copy_function=os.link)
    shutil.copytree(made.out, tmp_path / "out")
    return Zoo(tmp_path / "zoo", str(tmp_path / "out"))


def tables(zoo: Zoo) -> set[str]:
    return nights.names(zoo.out, "_manifest")


def remove(zoo: Zoo, *names: str) -> None:
    for name in names:
        storage.delete(storage.join(zoo.out, name))


@pytest.mark.parametrize("pinned", [False, True])
def test_all_that_is_gone_is_there_again_byte_for_byte_though_nothing_is_due(zoo: Zoo, pinned: bool) -> None:
    if pinned:
        latest.rollback(zoo.out, "m1", latest.versions(zoo.out, "m1")[0].version)
    before = nights.left_behind(zoo.out)
    assert len(tables(zoo)) == 6
    shutil.rmtree(Path(zoo.out) / "_manifest")
    watcher = Watcher()
    result = zoo.night(watcher)
    assert (result.run, result.read_bytes, result.counts) == ("", 0, {"published": 2, "unchanged": 1})
    assert nights.left_behind(zoo.out) == before
    assert watcher.warnings == ["_manifest lacked the tables of 6 versions: they are copied there again"]
    with watched_writes() as writes:
        zoo.night(watcher)
    assert (writes.calls, len(watcher.warnings)) == ([], 1)


def test_one_that_is_gone_is_all_that_is_written(zoo: Zoo) -> None:
    gone = min(tables(zoo))
    remove(zoo, gone)
    with watched_writes() as writes:
        zoo.night()
    assert writes.calls == [("put_new", storage.join(zoo.out, gone))]


def test_what_was_made_from_tonights_base_comes_back_whatever_has_become_of_the_model(zoo: Zoo) -> None:
    """It fails, is quarantined, and is served as it was."""
    zoo.add("m1", nights.poisoned(nights.tensors()))
    before = tables(zoo)
    for state in ("failed", "failed", "quarantined"):
        remove(zoo, *before)
        assert states(zoo.night())["m1"] == state
        assert tables(zoo) == before


def test_a_base_of_another_name_has_its_tables_already(zoo: Zoo) -> None:
    before = tables(zoo)
    renamed: dict[str, Any] = {
        "bases": {"other": str(zoo.root / "bases" / "b")},
        "discover": [{"prefix": str(zoo.root / "tuned"), "base": "other"}],
    }
    assert zoo.night(**renamed).run == ""
    assert tables(zoo) == before


def test_the_tables_of_another_base_are_not_taken_for_tonights(zoo: Zoo) -> None:
    """Under which id they belong nobody knows; a table in the wrong place would be worse than none."""
    other = zoo.add_base("c", seed=5)
    zoo.add("m1", toys.fine_tuned(other))
    remove(zoo, *tables(zoo))
    moved = {"prefix": str(zoo.root / "tuned"), "rules": [{"match": "m1", "base": "c"}, {"match": "*", "base": "b"}]}
    assert states(zoo.night(discover=[moved]))["m1"] == "committed"
    folders = [name.rpartition("/")[0] for name in sorted(tables(zoo))]
    of_b = [*["_manifest/base=b/model=m2"] * 2, *["_manifest/base=b/model=same"] * 2]
    assert folders == [*of_b, "_manifest/base=c/model=m1"]


def test_a_version_that_somebody_removed_is_named_and_hinders_nobody(zoo: Zoo) -> None:
    outcome = Ledger.read(zoo.out).latest_outcome("m1")
    assert outcome is not None
    shutil.rmtree(Path(zoo.out) / "m1" / outcome.version)
    remove(zoo, *tables(zoo))
    watcher = Watcher()
    assert zoo.night(watcher).exit_code == 0
    assert len(tables(zoo)) == 5
    told, problem = watcher.warnings
    assert "5 versions" in told
    record = f"{zoo.out}/_state/m1/{outcome.request}"
    assert problem.startswith("m1: there is no manifest at ")
    assert problem.endswith(f"if that version is meant to be gone, remove {record}, too")
    shutil.rmtree(record)
    assert states(zoo.night(Watcher()))["m1"] == "committed"
    nights.require_whole(zoo.out)


def test_what_gc_takes_away_while_the_night_looks_stays_away(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Just between its two looks, whichever comes first."""
    looks = 0

    def collecting(real: Any) -> Any:
        def look(*arguments: Any) -> Any:
            nonlocal looks
            found, looks = real(*arguments), looks + 1
            if looks == 1:
                garbage = gc.collect(zoo.out, 0, delete=True, now=storage.clock(zoo.out) + 9 * 86400)
                assert len(garbage) == 2
            return found

        return look

    monkeypatch.setattr(dataset, "tables", collecting(dataset.tables))
    monkeypatch.setattr(night, "standings", collecting(night.standings))
    watcher = Watcher()
    with watched_writes() as writes:
        zoo.night(watcher)
    assert looks >= 2
    assert watcher.warnings == []
    assert not [url for verb, url in writes.calls if verb == "put_new"]
    assert len(tables(zoo)) == 4


def test_a_refused_night_repairs_nothing(zoo: Zoo) -> None:
    remove(zoo, *tables(zoo))
    with pytest.raises(RequestError, match=r"more than limits\.max_models_due"):
        zoo.night(extract={"rank": 3, "dtype": "float32"}, limits={"max_models_due": 1})
    assert tables(zoo) == set()
