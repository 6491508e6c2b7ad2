"""Adapters of several ranks from one extraction: the same bytes as one by one, also after a crash between two."""

from __future__ import annotations

from pathlib import Path

import pytest

from phlora_pipeline import pipeline, several
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.verify import verify
from tests import runs, toys

RANKS = (4, 16, 8)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    base = toys.llama_tensors(layers=1)
    return toys.save(folder / "base", base), toys.save(folder / "tuned", toys.fine_tuned(base))


def extract(pair: tuple[Path, Path], out: Path, watcher: runs.Watcher | None = None, **others: object) -> list:
    config = runs.settings(*pair, out, rank=max(RANKS), dialect="peft", **others)
    return several.extract(config, RANKS, watcher or runs.Watcher())


def test_each_has_the_bytes_of_its_own_extraction_and_nothing_else_is_left(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    watcher = runs.Watcher()
    results = extract(pair, tmp_path / "out", watcher)
    assert [(Path(one.out).name, one.rank, one.outcome) for one in results] == [
        ("r4", 4, "committed"), ("r8", 8, "committed"), ("r16", 16, "committed"),
    ]  # fmt: skip
    assert sum(report.tensors for report in watcher.reports) == len(runs.rows(tmp_path / "out" / "r4"))
    for rank in RANKS:
        runs.extract(*pair, tmp_path / f"alone{rank}", rank=rank, max_rank=max(RANKS), dialect="peft")
        assert runs.contents(tmp_path / "out" / f"r{rank}") == runs.contents(tmp_path / f"alone{rank}")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["_runs", "r16", "r4", "r8"]
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out" / "r8")).passed
    again = runs.Watcher()
    assert [one.outcome for one in extract(pair, tmp_path / "out", again)] == ["exists"] * 3
    assert again.plan is None  # nothing was begun


@pytest.mark.parametrize("committed", [0, 1, 2])
def test_killed_between_two_it_goes_on_from_the_parts(
    committed: int, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, conclude = [], pipeline.conclude

    def dies(*args: object) -> object:
        if len(calls) == committed:
            raise KeyboardInterrupt
        calls.append(args)
        return conclude(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "conclude", dies)
    with pytest.raises(KeyboardInterrupt):
        extract(pair, tmp_path / "out")
    monkeypatch.undo()
    assert list((tmp_path / "out" / "_parts").iterdir())
    watcher = runs.Watcher()
    results = extract(pair, tmp_path / "out", watcher)
    assert all(report.reused for report in watcher.reports)
    assert [one.outcome for one in results] == ["exists"] * committed + ["committed"] * (3 - committed)
    assert not (tmp_path / "out" / "_parts").exists()
    extract(pair, tmp_path / "whole")
    assert runs.contents(tmp_path / "whole") == runs.contents(tmp_path / "out")


def test_parts_stay_where_they_are_wanted(pair: tuple[Path, Path], tmp_path: Path) -> None:
    extract(pair, tmp_path / "out", keep_parts=True)
    assert list((tmp_path / "out" / "_parts").iterdir())


def test_what_stands_in_one_folder_is_found_before_anything_is_read(pair: tuple[Path, Path], tmp_path: Path) -> None:
    runs.extract(*pair, tmp_path / "out" / "r8", rank=2)
    watcher = runs.Watcher()
    with pytest.raises(ConflictError, match="r8 already holds another adapter"):
        extract(pair, tmp_path / "out", watcher)
    assert watcher.plan is None
    assert not (tmp_path / "out" / "_runs").exists()


def test_a_rank_above_the_largest_that_is_kept_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"max_rank must be between rank \(16\)"):
        extract(pair, tmp_path / "out", max_rank=8)
