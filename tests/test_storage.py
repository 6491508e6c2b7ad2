"""Local files and the read-only rest: what a listing shows, reads of the planned content only, create-only writes."""

from __future__ import annotations

import errno
import http.server
import io
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from phlora_pipeline import storage
from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    RequestError,
    SourceChangedError,
    StorageError,
    UnsupportedStoreError,
)
from phlora_pipeline.storage import ByteRange, ObjectInfo, local, verbs
from phlora_pipeline.storage.local import LocalStore

DATA = bytes(range(256)) * 40


def read(info: ObjectInfo, start: int, stop: int) -> bytes:
    into = bytearray(stop - start)
    storage.read_ranges([ByteRange(info.url, info.etag, start, memoryview(into))])
    return bytes(into)


@pytest.fixture
def planned(tmp_path: Path) -> ObjectInfo:
    """A file as a plan has seen it, some time ago."""
    path = tmp_path / "planned.bin"
    path.write_bytes(DATA)
    os.utime(path, ns=(0, 1_000_000_000))
    info = storage.stat(str(path))
    assert info is not None
    return info


def test_a_listing_has_the_files_of_the_folder_itself_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c d é"):
        (tmp_path / name).write_bytes(name.encode())
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "inner").write_bytes(b"")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    found = storage.list_folder(str(tmp_path))
    assert [(storage.basename(info.url), info.size) for info in found] == [("a", 1), ("b", 1), ("c d é", 6)]
    assert found == [storage.stat(info.url) for info in found]


def test_what_is_no_folder_lists_as_nothing(planned: ObjectInfo) -> None:
    assert storage.list_folder(f"{planned.url}-absent") == []
    assert storage.list_folder(planned.url) == []
    assert storage.list_folder(f"{planned.url}/below") == []
    assert storage.stat(os.path.dirname(planned.url)) is None
    assert storage.stat(f"{planned.url}/below") is None


def test_a_file_that_vanishes_while_it_is_listed_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stays").write_bytes(b"")
    (tmp_path / ".part.tmp").write_bytes(b"")

    def scandir(path: str) -> list[os.DirEntry[str]]:
        with real(path) as entries:
            seen = list(entries)
        (tmp_path / ".part.tmp").unlink()
        return seen

    real = os.scandir
    monkeypatch.setattr(local.os, "scandir", scandir)
    assert [storage.basename(info.url) for info in storage.list_folder(str(tmp_path))] == ["stays"]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(spans=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 700)), max_size=8), piece=st.integers(1, 300))
def test_ranges_are_slices_however_they_are_cut(
    planned: ObjectInfo, monkeypatch: pytest.MonkeyPatch, spans: list[tuple[int, int]], piece: int
) -> None:
    monkeypatch.setattr(LocalStore, "piece_bytes", piece)
    wanted = [(start, min(start + length, len(DATA))) for start, length in spans]
    into = [bytearray(stop - start) for start, stop in wanted]
    storage.read_ranges(
        [
            ByteRange(planned.url, planned.etag, start, memoryview(buffer))
            for (start, _), buffer in zip(wanted, into, strict=True)
        ]
    )
    assert into == [DATA[start:stop] for start, stop in wanted]


def replace(path: Path) -> None:
    (path.parent / "new").write_bytes(bytes(len(DATA)))
    (path.parent / "new").replace(path)


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(9_000)
        file.write(b"!")


def truncate(path: Path) -> None:
    os.truncate(path, 100)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"!")


@pytest.mark.parametrize("change", [replace, edit, truncate, append])
def test_a_file_that_changed_since_it_was_planned_is_an_error(
    planned: ObjectInfo, change: Callable[[Path], None]
) -> None:
    change(Path(planned.url))
    with pytest.raises(SourceChangedError, match="no longer what was planned") as caught:
        read(planned, 50, 200)
    assert planned.url in caught.value.what
    assert caught.value.exit_code == 3


def test_a_file_that_is_gone_is_not_there(planned: ObjectInfo) -> None:
    os.unlink(planned.url)
    with pytest.raises(NotFoundError, match=r"planned\.bin is not there") as caught:
        read(planned, 50, 200)
    assert caught.value.remedy


@pytest.mark.parametrize("change", [edit, truncate, append])
def test_a_file_that_changes_while_it_is_read_is_an_error(
    planned: ObjectInfo, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(descriptor: int, piece: ByteRange) -> None:
        real(descriptor, ByteRange(piece.url, piece.etag, piece.start, piece.into[:10]))
        change(Path(planned.url))
        real(descriptor, ByteRange(piece.url, piece.etag, piece.start + 10, piece.into[10:]))

    real = local._read_fully
    monkeypatch.setattr(local, "_read_fully", slowly)
    with pytest.raises(SourceChangedError):
        read(planned, 50, 200)


def test_without_an_etag_any_content_will_do(planned: ObjectInfo) -> None:
    replace(Path(planned.url))
    assert read(ObjectInfo(planned.url, planned.size, ""), 0, 3) == b"\0\0\0"


def test_after_the_first_error_no_memory_is_written_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller gives its buffers up when `read_ranges` raises: no straggler may still be filling them."""
    running = threading.Semaphore(0)

    class Slow(LocalStore):
        piece_bytes = 1
        busy = 0

        def read_into(self, piece: ByteRange) -> None:
            if piece.start == 0:
                running.acquire(timeout=5)  # fail only once another one is under way
                raise StorageError("the first piece")
            self.busy += 1
            running.release()
            time.sleep(0.05)
            self.busy -= 1

    slow = Slow()
    monkeypatch.setattr(verbs, "_store", lambda kind: slow)
    with pytest.raises(StorageError, match="the first piece"):
        storage.read_ranges([ByteRange("/x", "", 0, memoryview(bytearray(200)))])
    assert slow.busy == 0


def test_a_small_object_is_read_whole_and_a_large_one_refused(planned: ObjectInfo) -> None:
    assert storage.read_object(planned, limit=len(DATA)) == DATA
    with pytest.raises(NotFoundError, match=f"{len(DATA)} bytes; at most {len(DATA) - 1}"):
        storage.read_object(planned, limit=len(DATA) - 1)


def test_put_new_creates_once_and_then_compares(tmp_path: Path) -> None:
    url = str(tmp_path / "deep" / "er" / "x")
    assert storage.put_new(url, DATA) == "created"
    assert storage.put_new(url, lambda: iter([DATA[:7], DATA[7:]]), size=len(DATA)) == "same"
    assert storage.put_new(url, DATA[:-1] + b"!") == "different"
    assert storage.put_new(url, DATA[:-1]) == "different"
    assert Path(url).read_bytes() == DATA
    assert os.listdir(tmp_path / "deep" / "er") == ["x"]


def test_an_empty_object_can_be_put_and_read(tmp_path: Path) -> None:
    url = str(tmp_path / "x")
    assert storage.put_new(url, b"") == "created"
    info = storage.stat(url)
    assert info is not None
    assert storage.read_object(info, limit=0) == b""


@pytest.mark.parametrize("failure", [RuntimeError("lost"), StorageError("lost"), OSError(errno.EIO, "lost")], ids=repr)
def test_an_exception_inside_the_body_publishes_nothing(tmp_path: Path, failure: Exception) -> None:
    def body() -> Iterator[bytes]:
        yield b"half of it"
        raise failure

    with pytest.raises((RuntimeError, StorageError), match="lost"):
        storage.put_new(str(tmp_path / "x"), body, size=100)
    assert os.listdir(tmp_path) == []


def test_of_many_writers_one_creates(tmp_path: Path) -> None:
    bodies = [bytes([number]) * 100_000 for number in range(8)]
    barrier = threading.Barrier(len(bodies))

    def put(body: bytes) -> storage.PutOutcome:
        barrier.wait()
        return storage.put_new(str(tmp_path / "x"), body)

    with ThreadPoolExecutor(len(bodies)) as pool:
        outcomes = list(pool.map(put, bodies))
    assert sorted(outcomes) == ["created", *["different"] * 7]
    assert (tmp_path / "x").read_bytes() == bodies[outcomes.index("created")]
    assert os.listdir(tmp_path) == ["x"]


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Patched, because not every machine lets a test mount a small disk.
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(local.os, "fsync", full)
    with pytest.raises(StorageError, match="no space left") as caught:
        storage.put_new(str(tmp_path / "x"), DATA)
    assert caught.value.exit_code == 12
    assert os.listdir(tmp_path) == []


def test_where_no_folder_can_be_nothing_can_be_written(planned: ObjectInfo) -> None:
    below = f"{planned.url}/out"
    with pytest.raises(RequestError, match="is a file, not a folder"):
        storage.require_writable(below)
    with pytest.raises(RequestError):
        storage.put_new(f"{below}/x", b"")


def test_a_folder_that_may_be_made_is_writable_and_has_room(tmp_path: Path) -> None:
    storage.require_writable(str(tmp_path / "a" / "b"))
    assert (storage.free_bytes(str(tmp_path / "a" / "b")) or 0) > 0
    assert os.listdir(tmp_path) == []


def test_a_path_that_no_file_system_takes_is_a_wrong_request(tmp_path: Path) -> None:
    long = str(tmp_path / ("x" * 300))
    for verb in (storage.list_folder, storage.stat, lambda url: storage.put_new(url, b"")):
        with pytest.raises(RequestError, match="too long"):
            verb(long)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(RequestError, match="symbolic links"):
        storage.list_folder(str(tmp_path / "loop"))


def test_deleting_what_is_not_there_is_no_error(tmp_path: Path, planned: ObjectInfo) -> None:
    storage.delete(planned.url)
    storage.delete(planned.url)
    assert storage.stat(planned.url) is None
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_bytes(b"")
    storage.drop_empty_folder(str(tmp_path / "full"))
    assert (tmp_path / "full" / "x").exists()
    storage.delete(str(tmp_path / "full" / "x"))
    storage.drop_empty_folder(str(tmp_path / "full"))
    storage.drop_empty_folder(str(tmp_path / "full"))
    assert os.listdir(tmp_path) == []


@pytest.fixture
def memory() -> Iterator[fsspec.AbstractFileSystem]:
    """fsspec's store in memory, empty; the package's view on it is new."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    verbs._store.cache_clear()
    yield fs
    fs.store.clear()
    verbs._store.cache_clear()


def test_another_store_can_be_listed_and_read(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/m/b", DATA)
    memory.pipe_file("/m/a", b"")
    memory.pipe_file("/m/sub/c", DATA)
    found = storage.list_folder("memory://m")
    assert [(storage.basename(info.url), info.size) for info in found] == [("a", 0), ("b", len(DATA))]
    assert storage.stat("memory://m/b") == found[1]
    assert storage.stat("memory://m/sub") is None
    assert storage.stat("memory://m/absent") is None
    assert storage.list_folder("memory://absent") == []
    assert read(found[1], 3, 700) == DATA[3:700]


def test_another_stores_object_that_changed_is_an_error(memory: fsspec.AbstractFileSystem) -> None:
    memory.pipe_file("/m/x", DATA)
    info = storage.stat("memory://m/x")
    assert info is not None
    memory.pipe_file("/m/x", DATA)
    with pytest.raises(SourceChangedError):
        read(info, 3, 700)
    memory.pipe_file("/m/x", DATA[:100])
    with pytest.raises(SourceChangedError, match="97 bytes"):
        read(ObjectInfo(info.url, info.size, ""), 3, 700)


def test_another_store_is_never_written_to(memory: fsspec.AbstractFileSystem) -> None:
    for write in (
        lambda: storage.put_new("memory://m/x", b""),
        lambda: storage.delete("memory://m/x"),
        lambda: storage.drop_empty_folder("memory://m"),
        lambda: storage.require_writable("memory://m"),
    ):
        with pytest.raises(UnsupportedStoreError, match="can be read but not written"):
            write()
    assert storage.free_bytes("memory://m") is None
    assert not memory.store


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (PermissionError("no\nway"), CredentialsError),
        (RuntimeError("a client's\nown paragraph"), StorageError),
        (FileNotFoundError("x"), NotFoundError),
    ],
    ids=repr,
)
def test_another_stores_errors_become_ours(
    memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception]
) -> None:
    def fails(*_: object, **__: object) -> bytes:
        raise raised

    monkeypatch.setattr(type(memory), "cat_file", fails)
    with pytest.raises(expected) as caught:
        read(ObjectInfo("memory://m/x", 3, ""), 0, 3)
    assert "\n" not in str(caught.value)
    assert "memory://m/x" in str(caught.value)


def test_a_missing_client_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "filesystem", missing)
    verbs._store.cache_clear()
    with pytest.raises(RequestError, match="no client for gs://") as caught:
        storage.list_folder("gs://bucket/x")
    assert caught.value.remedy == "pip install 'phlora-pipeline[gcs]'"


def test_an_unknown_kind_of_url_is_refused() -> None:
    with pytest.raises(RequestError, match="unknown kind of URL: gopher://"):
        storage.stat("gopher://x/y")


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Python's own file server, which knows no ranges, taught them."""

    def send_head(self) -> Any:
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if not asked or not path.is_file():
            return super().send_head()
        data = path.read_bytes()[int(asked[1]) : int(asked[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        return io.BytesIO(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A web server's URL of `tmp_path`."""
    handler = partial(RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_web_server_can_be_listed_and_read(web: str, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "a.bin").write_bytes(DATA)
    (tmp_path / "m" / "b.bin").write_bytes(b"")
    found = storage.list_folder(f"{web}/m")
    assert [(storage.basename(info.url), info.size) for info in found] == [("a.bin", len(DATA)), ("b.bin", 0)]
    assert storage.stat(f"{web}/m/a.bin") == found[0]
    assert storage.stat(f"{web}/m/absent") is None
    assert read(found[0], 3, 700) == DATA[3:700]
    os.utime(tmp_path / "m" / "a.bin", (0, 0))
    with pytest.raises(SourceChangedError):
        read(found[0], 3, 700)
