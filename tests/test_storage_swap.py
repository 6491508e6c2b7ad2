"""What a zoo needs of its stores, locally and on a real S3 server: trees, ages, pointers that swap, and what killed writers leave."""

from __future__ import annotations

import datetime as dt
import email.utils
import fcntl
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import pytest
from botocore.exceptions import ClientError, ConnectionClosedError

from phlora_pipeline import storage
from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    PhloraError,
    RequestError,
    StorageError,
    UnsupportedStoreError,
)
from phlora_pipeline.storage import ObjectInfo, Upload, generic, local, s3_listing, verbs
from phlora_pipeline.storage.s3 import S3Store
from tests.s3_server import BUCKET, READER, S3


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder's URL, in each store that can be written to."""
    return str(tmp_path / "root") if request.param == "local" else str(request.getfixturevalue("s3").url("root"))


def the_store() -> S3Store:
    store = verbs._store("s3")
    assert isinstance(store, S3Store)
    return store


def put(*names: str, body: bytes = b"x") -> str:
    url = storage.join(*names)
    assert storage.put_new(url, body) == "created"
    return url


def seen(url: str) -> ObjectInfo:
    info = storage.stat(url)
    assert info is not None
    return info


def content(url: str) -> bytes:
    return storage.read_object(seen(url), limit=1 << 20)


class TestListing:
    """Trees and folders, whole and in order, however deep and however many."""

    def test_a_tree_has_every_object_and_a_folder_its_folders(self, root: str) -> None:
        names = ["a", "b/c", "b/d/e", "b-2/x", "_state/m/r/outcome.json", "sp ace é+#&/deep/er/y"]
        for name in names:
            put(root, *name.split("/"), body=name.encode())
        found = storage.list_tree(root)
        assert [info.url for info in found] == sorted(f"{root}/{name}" for name in names)
        assert found == [seen(info.url) for info in found]
        assert [storage.basename(url) for url in storage.list_folders(root)] == ["_state", "b", "b-2", "sp ace é+#&"]
        assert storage.list_folders(f"{root}/b") == [f"{root}/b/d"]
        assert [info.url for info in storage.list_tree(f"{root}/b")] == [f"{root}/b/c", f"{root}/b/d/e"]  # and not b-2

    def test_what_is_not_there_has_nothing_below_it(self, root: str) -> None:
        file = put(root, "a")
        for url in (f"{root}/absent", file, f"{file}/below", f"{root}-not"):
            assert (storage.list_tree(url), storage.list_folders(url)) == ([], [])

    def test_a_folder_is_gone_with_its_last_object(self, root: str) -> None:
        storage.delete(put(root, "a", "b", "c"))
        for name in ("a/b", "a"):
            storage.drop_empty_folder(f"{root}/{name}")
        assert storage.list_tree(root) == []
        if not root.startswith("s3://"):  # SeaweedFS, which has folders inside, shows them a while longer
            assert storage.list_folders(root) == []

    @pytest.mark.parametrize("page", [1, 2, 7])
    def test_pages_are_put_together(self, root: str, page: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_listing, "PAGE", page)
        names = sorted(f"{folder}/{name}" for folder in ("a", "b", "c") for name in ("x", "y", "z"))
        for name in names:
            put(root, name)
        assert [info.url for info in storage.list_tree(root)] == [f"{root}/{name}" for name in names]
        assert storage.list_folders(root) == [f"{root}/{name}" for name in "abc"]
        assert [info.url for info in storage.list_folder(f"{root}/b")] == [f"{root}/b/{name}" for name in "xyz"]

    def test_modification_times_are_the_stores_and_take_no_part_in_comparisons(self, root: str) -> None:
        before = storage.clock(root)
        url = put(root, "f", "a")
        after = storage.clock(root)
        [listed], [walked], info = storage.list_folder(f"{root}/f"), storage.list_tree(root), seen(url)
        for found in (listed, walked, info):
            assert int(before) <= found.modified <= after + 1  # S3 tells whole seconds
        assert ObjectInfo(info.url, info.size, info.etag, modified=1.0) == info

    def test_the_clock_goes(self, root: str) -> None:
        assert abs(storage.clock(f"{root}/not/yet/there") - time.time()) < 60
        assert storage.list_tree(root) == []

    def test_links_to_folders_are_not_followed_and_links_to_files_are_files(self, tmp_path: Path) -> None:
        put(str(tmp_path), "real", "a")
        (tmp_path / "real" / "up").symlink_to(tmp_path)
        (tmp_path / "real" / "b").symlink_to("a")
        (tmp_path / "real" / "dangling").symlink_to("nowhere")
        (tmp_path / "real" / "loop").symlink_to("loop")
        os.mkfifo(tmp_path / "real" / "pipe")
        assert [storage.basename(info.url) for info in storage.list_tree(str(tmp_path))] == ["a", "b"]
        (tmp_path / "link").symlink_to("real")
        assert storage.list_folders(str(tmp_path)) == [str(tmp_path / "link"), str(tmp_path / "real")]

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may look everywhere")
    def test_what_may_not_be_looked_into_is_no_empty_folder(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0)
        with pytest.raises(RequestError, match="no permission"):
            storage.list_tree(str(tmp_path))

    def test_an_error_within_a_walk_is_an_error(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`os.walk` leaves out what it cannot read, without a word: a collector would take the rest for all."""
        (tmp_path / "closed").mkdir()

        def scandir(path: str) -> Any:
            if str(path).endswith("closed"):
                raise PermissionError(13, "Permission denied", path)
            return real(path)

        real = os.scandir
        monkeypatch.setattr(os, "scandir", scandir)
        with pytest.raises(RequestError, match="no permission"):
            storage.list_tree(str(tmp_path))

    @pytest.mark.s3
    def test_each_page_is_tried_again_on_its_own(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_listing, "PAGE", 1)
        for name in "abc":
            s3.put(f"f/{name}", b"")
        asked: list[str] = []

        def flaky(**wanted: Any) -> Any:
            asked.append(wanted.get("ContinuationToken", ""))
            if len(asked) % 2:
                raise ConnectionClosedError(endpoint_url="http://x")
            return real(**wanted)

        real = the_store()._s3.list_objects_v2
        monkeypatch.setattr(the_store()._s3, "list_objects_v2", flaky)
        assert [storage.basename(info.url) for info in storage.list_tree(s3.url("f"))] == ["a", "b", "c"]
        assert asked[::2] == asked[1::2]
        assert len(set(asked)) == len(asked) // 2

    @pytest.mark.s3
    def test_a_listing_that_turns_in_a_circle_is_left(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        answer = {"IsTruncated": True, "NextContinuationToken": "again", "Contents": []}
        monkeypatch.setattr(the_store()._s3, "list_objects_v2", lambda **_: answer)
        with pytest.raises(StorageError, match="does not go on"):
            storage.list_tree(s3.url("f"))


class TestSwap:
    """Compare and swap: of all who have seen the same, one."""

    def test_only_who_has_seen_what_stands_there_replaces_it(self, root: str) -> None:
        url = f"{root}/deep/latest.json"
        assert storage.swap(url, b"one", None)
        first = seen(url)
        assert not storage.swap(url, b"two", None)
        assert storage.swap(url, b"two", first)
        second = seen(url)
        assert not storage.swap(url, b"three", first)
        assert content(url) == b"two"
        assert storage.swap(url, b"three", second)
        assert content(url) == b"three"
        assert [info.url for info in storage.list_tree(root)] == [url]

    def test_equal_bytes_of_another_are_a_lost_race_too(self, root: str) -> None:
        url = f"{root}/x"
        assert storage.swap(url, b"one", None)
        assert not storage.swap(url, b"one", None)
        before = seen(url)
        assert storage.swap(url, b"two", before)
        assert not storage.swap(url, b"two", before)

    def test_what_is_gone_is_not_replaced(self, root: str) -> None:
        url = put(root, "x")
        before = seen(url)
        storage.delete(url)
        assert not storage.swap(url, b"new", before)
        assert storage.list_tree(root) == []
        assert not storage.swap(f"{root}/no/such/folder/x", b"new", before)

    def test_an_empty_object_can_be_swapped(self, root: str) -> None:
        url = put(root, "x", body=b"")
        before = seen(url)
        assert storage.swap(url, b"full", before)
        assert not storage.swap(url, b"fuller", before)
        assert storage.swap(url, b"", seen(url))
        assert content(url) == b""

    def test_of_eight_who_have_seen_the_same_one_swaps(self, root: str) -> None:
        url = put(root, "x", body=b"start")
        for turn in range(5):
            before, barrier = seen(url), threading.Barrier(8)

            def race(number: int, before: ObjectInfo = before, barrier: threading.Barrier = barrier) -> bool:
                barrier.wait()
                return storage.swap(url, b"%d of turn %d" % (number, turn), before)  # noqa: B023

            with ThreadPoolExecutor(8) as pool:
                won = list(pool.map(race, range(8)))
            assert sum(won) == 1
            assert content(url) == b"%d of turn %d" % (won.index(True), turn)

    def test_of_eight_who_create_one_does(self, root: str) -> None:
        barrier = threading.Barrier(8)

        def race(number: int) -> bool:
            barrier.wait()
            return storage.swap(f"{root}/x", b"%d" % number, None)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(race, range(8)))
        assert sum(won) == 1
        assert content(f"{root}/x") == b"%d" % won.index(True)

    @pytest.mark.slow
    def test_eight_processes_lose_no_update(self, root: str) -> None:
        """Each adds its own marks to a list, one at a time: at the end every mark is there, once."""
        url = put(root, "list", body=b"[]")
        script = (
            "import json, sys\n"
            "from phlora_pipeline import storage\n"
            "from phlora_pipeline.errors import NotFoundError, SourceChangedError\n"
            "url, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])\n"
            "for turn in range(count):\n"
            "    while True:\n"
            "        info = storage.stat(url)\n"
            "        try:\n"
            "            told = json.loads(storage.read_object(info, limit=1 << 20))\n"
            "        except (NotFoundError, SourceChangedError):\n"
            "            continue\n"
            "        if storage.swap(url, json.dumps([*told, [name, turn]]).encode(), info):\n"
            "            break\n"
        )
        count = 6
        racing = [
            subprocess.Popen([sys.executable, "-c", script, url, str(number), str(count)], stderr=subprocess.PIPE)
            for number in range(8)
        ]
        for process in racing:
            assert (process.communicate(timeout=240)[1], process.returncode) == (b"", 0)
        marks = [tuple(mark) for mark in json.loads(content(url))]
        assert sorted(marks) == sorted((str(number), turn) for number in range(8) for turn in range(count))
        assert [info.url for info in storage.list_tree(root)] == [url]


class TestLocalSwap:
    """What is peculiar to files: locks, clocks that tick, inodes that come back."""

    def test_each_version_is_younger_than_the_one_before(self, tmp_path: Path) -> None:
        url = put(str(tmp_path), "x")
        tomorrow = time.time_ns() + 86_400 * 10**9
        os.utime(url, ns=(tomorrow, tomorrow))
        times = []
        for number in range(20):
            assert storage.swap(url, b"%02d" % number, seen(url))
            times.append(os.stat(url).st_mtime_ns)
        assert times == sorted(set(times))
        assert times[0] > tomorrow

    def test_an_inode_that_comes_back_within_a_tick_is_not_what_was_seen(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A file system may give the next but one version the first one's inode, and a coarse clock its time."""

        def one_tick(path: str, chunks: Any) -> None:
            write(path, chunks)
            os.utime(path, ns=(10**18, 10**18))

        write = local._write_durably
        monkeypatch.setattr(local, "_write_durably", one_tick)
        monkeypatch.setattr(local, "_etag", lambda found: f"{found.st_size}-{found.st_mtime_ns}-1")
        url = put(str(tmp_path), "x", body=b"A")
        before = seen(url)
        assert storage.swap(url, b"B", before)
        assert storage.swap(url, b"C", seen(url))
        assert not storage.swap(url, b"D", before)
        assert content(url) == b"C"

    def test_a_lock_that_a_killed_process_left_holds_nobody_up(self, tmp_path: Path) -> None:
        url = put(str(tmp_path), "x")
        (tmp_path / ".x.lock").touch()
        assert storage.swap(url, b"new", seen(url))
        assert os.listdir(tmp_path) == ["x"]

    def test_who_waited_for_a_lock_that_was_removed_starts_over(self, tmp_path: Path) -> None:
        """Otherwise two hold locks on two files of one name, and both swap."""
        url, lock = put(str(tmp_path), "x"), tmp_path / ".x.lock"
        before = seen(url)
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            with ThreadPoolExecutor(1) as pool:
                swapped = pool.submit(storage.swap, url, b"late", before)
                time.sleep(0.1)
                lock.unlink()
                with local._locked(str(lock)):
                    fcntl.flock(held, fcntl.LOCK_UN)
                    time.sleep(0.1)
                    assert not swapped.done()
                    assert local._replace(url, b"early", before.etag)
                assert swapped.result(timeout=10) is False
        assert content(url) == b"early"

    def test_a_failed_swap_leaves_what_was_there(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        url = put(str(tmp_path), "x", body=b"old")
        before = seen(url)

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(local.os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            storage.swap(url, b"new", before)
        assert (content(url), os.listdir(tmp_path)) == (b"old", ["x"])

    def test_where_nothing_may_be_written_this_machines_clock_has_to_do(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(**_: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(local.tempfile, "TemporaryFile", refused)
        assert abs(storage.clock(str(tmp_path)) - time.time()) < 5


@pytest.mark.s3
class TestS3Swap:
    """What is peculiar to a network: answers that get lost."""

    @pytest.mark.parametrize("foreign", [None, b"theirs", "gone"], ids=["ours", "theirs", "gone"])
    @pytest.mark.parametrize("fresh", [True, False], ids=["create", "replace"])
    def test_a_lost_answer_is_no_lost_race(
        self, s3: S3, foreign: bytes | str | None, fresh: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The write was applied, the answer was lost: the retry is refused because of what we have written ourselves."""
        url = s3.url("x")
        before = None if fresh else seen(s3.put("x", b"old"))
        lost: list[Any] = []

        def applied_but_lost(**wanted: Any) -> Any:
            if lost:
                if foreign == "gone":
                    raise ClientError({"Error": {"Code": "PreconditionFailed"}}, "PutObject")
                return real(**wanted)
            lost.append(s3.put("x", foreign) if isinstance(foreign, bytes) else real(**wanted))
            if foreign == "gone":
                s3.client.delete_object(Bucket=BUCKET, Key=s3.key("x"))
            raise ConnectionClosedError(endpoint_url="http://x")

        real = the_store()._s3.put_object
        monkeypatch.setattr(the_store()._s3, "put_object", applied_but_lost)
        assert storage.swap(url, b"ours", before) is (foreign is None)
        assert s3.names() == (set() if foreign == "gone" else {"x"})

    def test_a_conflict_is_tried_again(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        before, conflicts = seen(s3.put("x", b"old")), []

        def conflicted(**wanted: Any) -> Any:
            if conflicts:
                return real(**wanted)
            conflicts.append(1)
            error = {"Code": "ConditionalRequestConflict"}
            raise ClientError({"Error": error, "ResponseMetadata": {"HTTPStatusCode": 409}}, "PutObject")

        real = the_store()._s3.put_object
        monkeypatch.setattr(the_store()._s3, "put_object", conflicted)
        assert storage.swap(s3.url("x"), b"new", before)

    def test_what_aws_answers_where_nothing_can_match(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        """AWS says NoSuchKey to an `If-Match` on nothing, SeaweedFS PreconditionFailed; both mean no."""

        def missing(**_: Any) -> Any:
            raise ClientError(
                {"Error": {"Code": "NoSuchKey"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "PutObject"
            )

        before = seen(s3.put("x", b"old"))
        monkeypatch.setattr(the_store()._s3, "put_object", missing)
        assert not storage.swap(s3.url("x"), b"new", before)

    def test_a_server_that_does_not_date_its_answers(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        told: dict[str, Any] = {"ResponseMetadata": {"HTTPHeaders": {}}}
        monkeypatch.setattr(the_store()._s3, "list_objects_v2", lambda **_: told)
        with pytest.raises(StorageError, match="does not say what time it is"):
            storage.clock(s3.url())
        told["ResponseMetadata"]["HTTPHeaders"]["date"] = "Thu, 01 Jan 1970 00:01:00 GMT"
        assert storage.clock(s3.url()) == 60.0


class TestUploads:
    """What a killed writer leaves behind: invisible to readers, found and removed here."""

    @pytest.fixture
    def dangling(self, root: str, request: pytest.FixtureRequest) -> str:
        """The URL of an object of which 5 MiB and 3 bytes have been written, and the writer killed."""
        url = f"{root}/m/v/adapter_model.safetensors"
        body = [bytes(5 << 20), b"abc"]
        if not root.startswith("s3://"):
            folder = Path(url).parent
            folder.mkdir(parents=True)
            (folder / ".adapter_model.safetensors.0123456789ab.tmp").write_bytes(b"".join(body))
            return url
        s3 = request.getfixturevalue("s3")
        where = {"Bucket": BUCKET, "Key": s3.key("root/m/v/adapter_model.safetensors")}
        where["UploadId"] = s3.client.create_multipart_upload(**where)["UploadId"]
        for number, part in enumerate(body, start=1):
            s3.client.upload_part(**where, PartNumber=number, Body=part)
        return url

    def test_is_found_with_its_age_and_size_and_given_up_once(self, root: str, dangling: str) -> None:
        put(root, "m", "v", "whole")
        [upload] = storage.uploads(root)
        assert (upload.url, upload.size) == (dangling, (5 << 20) + 3)
        assert abs(upload.started - storage.clock(root)) < 60
        assert storage.uploads(f"{root}/m/v") == [upload]
        assert storage.uploads(f"{root}/m/other") == []
        assert storage.stat(dangling) is None
        storage.abort_upload(upload)
        storage.abort_upload(upload)
        assert storage.uploads(root) == []
        assert [info.url for info in storage.list_tree(root)] == [f"{root}/m/v/whole"]

    def test_a_killed_writer_leaves_one(self, root: str, tmp_path: Path) -> None:
        """The real thing: a process that dies by SIGKILL in the middle of its second part."""
        script = (
            "import os, signal, sys\n"
            "from phlora_pipeline import storage\n"
            "from phlora_pipeline.storage import s3\n"
            "s3.SINGLE_PUT_BYTES = 5 << 20\n"
            "def body():\n"
            "    yield bytes(5 << 20)\n"
            "    yield bytes(5 << 20)\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "storage.put_new(sys.argv[1], body, size=20 << 20)\n"
        )
        done = subprocess.run([sys.executable, "-c", script, f"{root}/x"], capture_output=True, timeout=120)
        assert done.returncode == -9, done.stderr
        assert storage.stat(f"{root}/x") is None
        [upload] = storage.uploads(root)
        assert upload.url == f"{root}/x"
        storage.abort_upload(upload)
        assert (storage.uploads(root), storage.list_tree(root)) == ([], [])
        assert storage.put_new(f"{root}/x", b"whole") == "created"

    def test_a_name_that_is_no_temporary_files_is_not_removed(self, tmp_path: Path) -> None:
        url = put(str(tmp_path), "precious")
        with pytest.raises(AssertionError, match="precious"):
            storage.abort_upload(Upload(url, "precious", 0.0, 1))
        assert content(url) == b"x"

    @pytest.mark.s3
    def test_pages_of_uploads_are_put_together(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_listing, "PAGE", 2)
        for name in "abcde":
            s3.client.create_multipart_upload(Bucket=BUCKET, Key=s3.key(f"f/{name}"))
        assert [storage.basename(upload.url) for upload in storage.uploads(s3.url("f"))] == list("abcde")

    @pytest.mark.s3
    def test_one_that_ends_while_it_is_looked_at_has_no_size(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        where = {"Bucket": BUCKET, "Key": s3.key("f/x")}
        started = s3.client.create_multipart_upload(**where)["UploadId"]

        def ended(**wanted: Any) -> Any:
            s3.client.abort_multipart_upload(**where, UploadId=started)
            return real(**wanted)

        real = the_store()._s3.list_parts
        monkeypatch.setattr(the_store()._s3, "list_parts", ended)
        [upload] = storage.uploads(s3.url("f"))
        assert upload.size == 0


class TestOthers:
    """Stores that can only be read."""

    @pytest.fixture
    def memory(self) -> Iterator[fsspec.AbstractFileSystem]:
        fs = fsspec.filesystem("memory")
        fs.store.clear()
        verbs._store.cache_clear()
        yield fs
        fs.store.clear()
        verbs._store.cache_clear()

    def test_are_listed_like_any(self, memory: fsspec.AbstractFileSystem) -> None:
        for name in ("/m/b/c", "/m/a", "/m/b/d/e", "/n/x"):
            memory.pipe_file(name, b"x")
        found = storage.list_tree("memory://m")
        assert [info.url.removeprefix("memory://").strip("/") for info in found] == ["m/a", "m/b/c", "m/b/d/e"]
        assert [url.removeprefix("memory://").strip("/") for url in storage.list_folders("memory://m")] == ["m/b"]
        assert (storage.list_tree("memory://absent"), storage.list_folders("memory://absent")) == ([], [])
        assert all(abs(info.modified - time.time()) < 60 for info in storage.list_tree("memory://m"))

    @pytest.mark.parametrize(
        "verb",
        [
            lambda url: storage.swap(url, b"", None),
            storage.uploads,
            lambda url: storage.abort_upload(Upload(url, "", 0.0, 0)),
            storage.clock,
        ],
        ids=["swap", "uploads", "abort", "clock"],
    )
    def test_promise_nothing(self, memory: fsspec.AbstractFileSystem, verb: Callable[[str], object]) -> None:
        with pytest.raises(UnsupportedStoreError, match="can be read but not written"):
            verb("memory://m/x")

    @pytest.mark.parametrize(
        "told",
        [
            60,
            60.0,
            dt.datetime(1970, 1, 1, 0, 1, tzinfo=dt.UTC),
            "1970-01-01T00:01:00Z",
            email.utils.formatdate(60, usegmt=True),
        ],
        ids=["int", "float", "datetime", "iso", "http"],
    )
    def test_tell_a_moment_in_many_ways(self, told: object) -> None:
        assert generic._seconds(told) == 60.0
        assert generic._seconds("yesterday") == generic._seconds(None) == 0.0


@pytest.mark.s3
@pytest.mark.parametrize("verb", ["swap", "abort"])
def test_a_key_that_may_only_read_is_told_so(s3: S3, verb: str) -> None:
    info = seen(s3.put("x", b"abc"))
    upload = s3.client.create_multipart_upload(Bucket=BUCKET, Key=s3.key("y"))["UploadId"]
    s3.use(READER)
    verbs_of = {
        "swap": lambda: storage.swap(info.url, b"new", info),
        "abort": lambda: storage.abort_upload(Upload(s3.url("y"), upload, 0.0, 0)),
    }
    with pytest.raises(CredentialsError, match="AccessDenied"):
        verbs_of[verb]()
    assert s3.get("x") == b"abc"


@pytest.mark.s3
@pytest.mark.parametrize(
    "verb",
    [storage.list_tree, storage.list_folders, lambda url: storage.swap(url, b"", None), storage.uploads, storage.clock],
    ids=["tree", "folders", "swap", "uploads", "clock"],
)
def test_a_missing_bucket_and_a_store_that_is_down_are_told_apart(s3: S3, verb: Callable[[str], object]) -> None:
    def error(url: str) -> PhloraError:
        with pytest.raises(PhloraError) as caught:
            verb(url)
        return caught.value

    assert isinstance(error("s3://no-such-bucket/x"), NotFoundError)
    s3.use(endpoint="http://127.0.0.1:9")
    assert type(error(s3.url("x"))) is StorageError
