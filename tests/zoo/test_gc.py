"""Collecting: everything that nothing needs, nothing that anything names, and a crash anywhere leaves no lie behind."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, RequestError, StorageError, UnsupportedStoreError
from phlora_pipeline.zoo import dataset, gc, latest, layout, state
from phlora_pipeline.zoo.gc import Garbage
from tests import toys
from tests.s3_server import BUCKET, S3
from tests.zoo import nights, shelf

MODEL = shelf.MODEL
DAY = 86400
EXTRACTION = "e" * 32


def request(number: int) -> str:
    return f"{number:032x}"[::-1]


def publish(out: str, number: int, model: str = MODEL, *, when: float | None = None) -> str:
    """Everything that a run leaves of a committed version, in its order."""
    folder = shelf.publish(out, number, model)
    if when is not None:
        age(folder, when)
    settled = state.Outcome(request(number), "committed", shelf.version(number), "run", shelf.moment(number), {})
    state.record_outcome(out, model, settled)
    dataset.copy_manifest(out, model, "base", shelf.version(number))
    latest.advance(out, model, shelf.version(number), request(number), shelf.moment(number))
    return folder


def age(folder: str, when: float) -> None:
    """Make local files as old as that; where a store dates its objects itself, `now` is moved instead."""
    for path in Path(folder).rglob("*"):
        os.utime(path, (when, when))


def after(out: str, days: float) -> float:
    return storage.clock(out) + days * DAY


def told(found: list[Garbage], out: str) -> dict[str, str]:
    return {item.url.removeprefix(f"{out}/"): item.reason for item in found}


def committed(out: str, model: str = MODEL) -> set[int]:
    return {int(item.version, 16) for item in latest.versions(out, model)}


class TestSuperseded:
    """Versions beyond those that are kept."""

    @pytest.mark.parametrize("keep", [0, 1, 3, 9])
    def test_the_served_one_and_the_youngest_are_kept(self, tmp_path: Path, keep: int) -> None:
        out = str(tmp_path)
        now = after(out, 0)
        for number in range(1, 6):
            publish(out, number, when=now - (20 - number) * DAY)
        found = gc.collect(out, keep, delete=True)
        assert committed(out) == {5, *range(max(1, 5 - keep), 5)}
        assert len(found) == max(0, 4 - keep)
        assert gc.collect(out, keep) == []

    def test_nothing_is_left_of_them_and_all_of_the_others(self, out: str) -> None:
        publish(out, 1)
        publish(out, 3, "another")
        others = [name for name in shelf.names(out) if shelf.version(1) not in name and request(1) not in name]
        publish(out, 2)
        both = shelf.names(out)
        assert told(gc.collect(out, 0, now=after(out, 3)), out) == {
            f"{MODEL}/{shelf.version(1)}": "superseded, and not among the 0 that are kept"
        }
        assert shelf.names(out) == both  # only told
        [item] = gc.collect(out, 0, now=after(out, 3), delete=True)
        assert set(shelf.names(out)) == set(others) | {
            name for name in both if shelf.version(2) in name or request(2) in name
        }
        files = [len(data) for data in shelf.files(1).values()]
        assert sum(files) < item.bytes < 2 * sum(files)  # with its table in the dataset
        assert abs(item.age - 3 * DAY) < 60

    def test_young_ones_are_left(self, out: str) -> None:
        publish(out, 1)
        publish(out, 2)
        assert gc.collect(out, 0, delete=True) == []
        assert gc.collect(out, 0, delete=True, now=after(out, 1.9)) == []
        assert committed(out) == {1, 2}
        assert len(gc.collect(out, 0, delete=True, min_age_seconds=0, now=after(out, 0.1))) == 1

    def test_a_request_that_comes_back_is_due_again(self, out: str) -> None:
        """Otherwise it would count as settled by an adapter that is no more."""
        publish(out, 1)
        publish(out, 2)
        gc.collect(out, 0, delete=True, now=after(out, 3))
        ledger = state.Ledger.read(out)
        assert (ledger.due(MODEL, request(1)), ledger.due(MODEL, request(2))) == (True, False)

    def test_a_pinned_one_stays_and_so_does_the_one_behind_the_pin(self, out: str) -> None:
        for number in (1, 2, 3):
            publish(out, number)
        latest.rollback(out, MODEL, shelf.version(1))
        assert list(told(gc.collect(out, 0, delete=True, now=after(out, 9)), out)) == [f"{MODEL}/{shelf.version(2)}"]
        assert committed(out) == {1, 3}

    def test_what_is_newer_than_the_served_one_is_not_superseded(self, tmp_path: Path) -> None:
        """Committed, and its run died before the pointer moved."""
        out = str(tmp_path)
        publish(out, 1, when=after(out, -30))
        age(shelf.publish(out, 2), after(out, -20))
        assert gc.collect(out, 0, delete=True) == []
        assert committed(out) == {1, 2}

    def test_without_a_pointer_nothing_is_superseded(self, out: str) -> None:
        for number in (1, 2, 3):
            shelf.publish(out, number)
        assert gc.collect(out, 0, delete=True, now=after(out, 9)) == []

    def test_one_that_is_rolled_back_to_after_it_was_found_stays(
        self, out: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        publish(out, 1)
        publish(out, 2)

        def late(url: str) -> list[storage.Upload]:
            latest.rollback(out, MODEL, shelf.version(1))
            return []

        monkeypatch.setattr(storage, "uploads", late)  # the last thing that is looked for
        assert gc.collect(out, 0, delete=True, now=after(out, 9)) == []
        assert committed(out) == {1, 2}

    def test_a_crash_anywhere_leaves_no_lie_and_the_next_time_nothing(
        self, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """At no moment is a request settled by what no loader opens, or does the dataset outlive its adapter for good."""
        real = storage.delete
        for survived in range(12):
            out = str(tmp_path_factory.mktemp("out"))
            publish(out, 1, when=after(out, -30))
            publish(out, 2, when=after(out, -20))
            age(out, after(out, -10))
            left = survived

            def dying(url: str) -> None:
                nonlocal left
                if left == 0:
                    raise StorageError("killed")
                left -= 1
                real(url)

            monkeypatch.setattr(storage, "delete", dying)
            monkeypatch.setattr(gc, "_AT_ONCE", 1)
            try:
                gc.collect(out, 0, delete=True)
                ended = True
            except StorageError:
                ended = False
            monkeypatch.setattr(storage, "delete", real)
            due = state.Ledger.read(out).due(MODEL, request(1))
            assert due or committed(out) == {1, 2}
            gc.collect(out, 0, delete=True)
            assert [name for name in shelf.names(out) if shelf.version(1) in name or request(1) in name] == []
            assert committed(out) == {2}
            if ended:
                break
        assert ended
        assert survived == 7  # one outcome, five files, one table


class TestAbandoned:
    """Versions that never came to their commit."""

    def test_go_when_they_are_old(self, out: str) -> None:
        publish(out, 1)
        shelf.publish(out, 2, without=(layout.RUN, layout.CONFIG))
        assert gc.collect(out, 3, delete=True) == []
        found = gc.collect(out, 3, delete=True, now=after(out, 3))
        assert told(found, out) == {f"{MODEL}/{shelf.version(2)}": "given up before its commit"}
        assert not [name for name in shelf.names(out) if shelf.version(2) in name]
        assert committed(out) == {1}

    def test_are_as_young_as_their_youngest_file(self, tmp_path: Path) -> None:
        out = str(tmp_path)
        folder = shelf.publish(out, 1, without=(layout.CONFIG,))
        age(folder, after(out, -30))
        os.utime(f"{folder}/{layout.RUN}", (after(out, -1), after(out, -1)))
        assert gc.collect(out, 0, delete=True) == []
        assert len(gc.collect(out, 0, min_age_seconds=DAY / 2)) == 1

    def test_a_model_that_had_nothing_to_adapt_is_an_outcome_and_not_abandoned(self, out: str) -> None:
        """Its folder has a table and no adapter: the outcome names it."""
        shelf.publish(out, 1, without=(layout.WEIGHTS, layout.CARD, layout.RUN, layout.CONFIG))
        settled = state.Outcome(request(1), "nothing_to_adapt", shelf.version(1), "run", shelf.moment(1), {})
        state.record_outcome(out, MODEL, settled)
        assert gc.collect(out, 0, delete=True, now=after(out, 99)) == []

    @pytest.mark.parametrize("late", [layout.CONFIG, layout.RUN])
    def test_one_that_is_gone_on_with_after_it_was_found_stays(
        self, tmp_path: Path, late: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = str(tmp_path)
        folder = shelf.publish(out, 1, without=(layout.RUN, layout.CONFIG))
        age(folder, after(out, -30))

        def meanwhile(url: str) -> list[storage.Upload]:
            storage.put_new(f"{folder}/{late}", b"{}")
            return []

        monkeypatch.setattr(storage, "uploads", meanwhile)
        assert gc.collect(out, 0, delete=True) == []
        assert {layout.WEIGHTS, late} <= set(os.listdir(folder))


class TestParts:
    """Of extractions that no run has gone on with."""

    def put(self, out: str, *names: str) -> None:
        for name in names:
            storage.put_new(f"{out}/_parts/{MODEL}/{name}", b"part")

    def test_go_when_the_youngest_of_them_is_old(self, out: str) -> None:
        self.put(out, f"{EXTRACTION}/a.safetensors", f"{EXTRACTION}/b.safetensors", f"{'f' * 32}/c.safetensors")
        assert gc.collect(out, 0, delete=True) == []
        found = gc.collect(out, 0, delete=True, now=after(out, 3))
        assert [(item.url, item.bytes) for item in found] == [
            (f"{out}/_parts/{MODEL}/{EXTRACTION}", 8), (f"{out}/_parts/{MODEL}/{'f' * 32}", 4),
        ]  # fmt: skip
        assert shelf.names(out) == []

    def test_one_young_part_keeps_all_of_its_extraction(self, tmp_path: Path) -> None:
        out = str(tmp_path)
        self.put(out, f"{EXTRACTION}/a.safetensors", f"{'f' * 32}/c.safetensors")
        age(f"{out}/_parts", after(out, -30))
        self.put(out, f"{EXTRACTION}/b.safetensors")
        assert list(told(gc.collect(out, 0, delete=True), out)) == [f"_parts/{MODEL}/{'f' * 32}"]
        assert shelf.names(f"{out}/_parts/{MODEL}") == [f"{EXTRACTION}/a.safetensors", f"{EXTRACTION}/b.safetensors"]

    def test_those_that_a_version_was_made_of_stay_with_it_where_that_is_asked_for(self, tmp_path: Path) -> None:
        zoo = nights.Zoo(tmp_path / "zoo", out := str(tmp_path / "out"))
        zoo.add("m", toys.fine_tuned(zoo.add_base()))
        zoo.night(run={**nights.PLAIN, "keep_parts": True})
        [made_of] = storage.list_folders(f"{out}/_parts/m")
        storage.put_new(f"{out}/_parts/m/{EXTRACTION}/a.safetensors", b"of a run that was given up")
        found = gc.collect(out, 0, keep_parts=True, delete=True, now=after(out, 9))
        assert list(told(found, out)) == [f"_parts/m/{EXTRACTION}"]
        [version] = latest.versions(out, "m")
        storage.delete(storage.join(version.url, layout.CONFIG))
        left = told(gc.collect(out, 0, keep_parts=True, now=after(out, 9)), out)
        assert made_of.removeprefix(f"{out}/") in left, "no version is made of them any more"

    def test_those_that_a_run_goes_on_with_after_they_were_found_stay(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out = str(tmp_path)
        self.put(out, f"{EXTRACTION}/a.safetensors")
        age(f"{out}/_parts", after(out, -30))

        def meanwhile(url: str) -> list[storage.Upload]:
            self.put(out, f"{EXTRACTION}/b.safetensors")
            return []

        monkeypatch.setattr(storage, "uploads", meanwhile)
        assert gc.collect(out, 0, delete=True) == []
        assert len(shelf.names(out)) == 2


class TestUploads:
    """Writes that nobody has finished."""

    def test_local_ones(self, tmp_path: Path) -> None:
        out = str(tmp_path)
        folder = tmp_path / "_parts" / MODEL / EXTRACTION
        folder.mkdir(parents=True)
        (folder / ".a.safetensors.0123456789ab.tmp").write_bytes(b"half")
        assert gc.collect(out, 0, delete=True) == []
        age(out, after(out, -3))
        found = gc.collect(out, 0, delete=True)
        assert f"{folder}/a.safetensors" in [item.url for item in found if item.bytes == 4]
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []

    @pytest.mark.s3
    def test_those_of_a_bucket(self, s3: S3) -> None:
        out = s3.url("out")
        where = {"Bucket": BUCKET, "Key": s3.key("out/m/x")}
        started = s3.client.create_multipart_upload(**where)["UploadId"]
        s3.client.upload_part(**where, UploadId=started, PartNumber=1, Body=b"half")
        other = s3.client.create_multipart_upload(Bucket=BUCKET, Key=s3.key("elsewhere"))
        assert gc.collect(out, 0, delete=True) == []
        [item] = gc.collect(out, 0, delete=True, now=after(out, 3))
        assert (item.url, item.bytes, item.reason) == (f"{out}/m/x", 4, "an upload that was never finished")
        assert s3.uploads() == [other["Key"]]


class TestCaution:
    """What is not known is not removed."""

    def test_somebodys_files_and_folders_stay(self, out: str) -> None:
        names = [
            f"{MODEL}/notes/x", f"{MODEL}/{shelf.version(1)}/mine.txt", "x/y/z", "_parts/mine/a.safetensors", "_parts/m/mine/a.safetensors", "_runs/r/result.json",
            f"{MODEL}/{shelf.version(7)}/deep/adapter_model.safetensors", "a b/c", f"_manifest/base=b/model=m/{'0' * 32}.parquet",
        ]  # fmt: skip
        for name in names:
            storage.put_new(f"{out}/{name}", b"x")
        publish(out, 1)
        publish(out, 2)
        found = gc.collect(out, 0, delete=True, now=after(out, 99))
        assert list(told(found, out)) == [f"{MODEL}/{shelf.version(1)}"]
        assert set(names) <= set(shelf.names(out))
        assert committed(out) == {2}

    @pytest.mark.parametrize("damage", ["pointer", "outcome"])
    def test_where_it_cannot_be_read_what_is_named_nothing_goes(self, out: str, damage: str) -> None:
        for number in (1, 2):
            publish(out, number, "fine")
        shelf.publish(out, 3, without=(layout.CONFIG,))
        url = f"{out}/{MODEL}/latest.json" if damage == "pointer" else f"{out}/_state/{MODEL}/{request(3)}/outcome.json"
        storage.put_new(url, b"{")
        before = shelf.names(out)
        with pytest.raises(ConflictError, match=url.rpartition("/")[2]) as caught:
            gc.collect(out, 0, delete=True, now=after(out, 99))
        assert "remove" in caught.value.remedy
        assert shelf.names(out) == before

    def test_a_wrong_number_and_a_store_that_cannot_be_written_to(self, out: str) -> None:
        with pytest.raises(RequestError, match="not -1"):
            gc.collect(out, -1)
        with pytest.raises(UnsupportedStoreError):
            gc.collect("memory://zoo", 0)

    def test_this_machines_clock_decides_nothing(self, out: str, monkeypatch: pytest.MonkeyPatch) -> None:
        publish(out, 1)
        publish(out, 2)
        real = storage.clock(out)
        monkeypatch.setattr("time.time", lambda: real + 99 * DAY)
        assert gc.collect(out, 0, delete=True) == []

    def test_an_empty_output_has_no_garbage(self, out: str) -> None:
        assert gc.collect(out, 0, delete=True) == []

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_what_is_named_by_anything_survives_any_history(
        self, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
    ) -> None:
        out = str(tmp_path_factory.mktemp("out"))
        now = after(out, 0)
        steps = data.draw(
            st.lists(st.sampled_from(["publish", "crash", "commit only", "rollback", "unpin", "gc"]), max_size=12)
        )
        keep = data.draw(st.integers(0, 2))
        for number, step in enumerate(steps, start=1):
            when = now - (30 - number) * DAY
            if step == "publish":
                publish(out, number, when=when)
            elif step == "crash":
                age(shelf.publish(out, number, without=(layout.CONFIG,)), when)
            elif step == "commit only":
                age(shelf.publish(out, number), when)
            elif step == "rollback" and committed(out):
                latest.rollback(out, MODEL, shelf.version(data.draw(st.sampled_from(sorted(committed(out))))))
            elif step == "unpin":
                latest.unpin(out, MODEL)
            elif step == "gc":
                pointer, before = latest.read(out, MODEL), committed(out)
                gc.collect(out, keep, delete=True)
                assert latest.read(out, MODEL) == pointer
                named = {int(name, 16) for name in gc._served(pointer)}
                assert named & before <= committed(out)
                assert len(before - committed(out)) <= max(0, len(before) - keep - 1)
                for settled in state.Ledger.read(out).outcomes(MODEL):
                    assert int(settled.version, 16) in committed(out)
                assert gc.collect(out, keep) == []


def test_found_in_parallel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of models are hundreds of listings: not one after the other."""
    out = str(tmp_path)
    for number in range(1, 9):
        publish(out, number, f"model-{number}")
    together = threading.Barrier(4, timeout=10)
    real: Callable[[str], list[storage.ObjectInfo]] = storage.list_tree

    def list_tree(url: str) -> list[storage.ObjectInfo]:
        if "/model-" in url:
            together.wait()
        return real(url)

    monkeypatch.setattr(storage, "list_tree", list_tree)
    assert gc.collect(out, 0) == []
