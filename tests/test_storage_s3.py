"""S3 as it is, by a real server: what is read is what was planned, what is written is whole, and each refusal is typed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
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
    SourceChangedError,
    StorageError,
)
from phlora_pipeline.storage import ByteRange, ObjectInfo, verbs
from phlora_pipeline.storage import s3 as s3_store
from phlora_pipeline.storage.s3 import S3Store
from tests.s3_server import ADMIN, BUCKET, READER, S3, running_server

pytestmark = pytest.mark.s3

PIECE = 8 << 20


def the_store() -> S3Store:
    store = verbs._store("s3")
    assert isinstance(store, S3Store)
    return store


def planned(url: str) -> ObjectInfo:
    info = storage.stat(url)
    assert info is not None
    return info


def read(info: ObjectInfo, start: int, stop: int) -> bytes:
    into = bytearray(stop - start)
    storage.read_ranges([ByteRange(info.url, info.etag, start, memoryview(into))])
    return bytes(into)


class TestReading:
    """Listings, stats and ranges."""

    def test_a_listing_has_the_objects_of_the_folder_itself_by_name(self, s3: S3) -> None:
        for name in ("b", "a", "sub/inner", "sp ace é+#?%20=&"):
            s3.put(f"f/{name}", name.encode())
        found = storage.list_folder(s3.url("f"))
        assert [(storage.basename(info.url), info.size) for info in found] == [
            ("a", 1),
            ("b", 1),
            ("sp ace é+#?%20=&", 17),
        ]
        assert found == [planned(info.url) for info in found]
        assert read(found[2], 0, 17) == "sp ace é+#?%20=&".encode()

    @pytest.mark.slow
    def test_a_listing_of_many_objects_is_whole(self, s3: S3) -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda number: s3.put(f"many/{number:04d}", b""), range(1001)))
        assert [storage.basename(info.url) for info in storage.list_folder(s3.url("many"))] == [
            f"{number:04d}" for number in range(1001)
        ]

    def test_what_is_not_there_lists_as_nothing(self, s3: S3) -> None:
        file = s3.put("f/a", b"1")
        assert storage.list_folder(s3.url("absent")) == []
        assert storage.list_folder(file) == []
        assert storage.list_folder(f"{file}/below") == []
        assert storage.stat(s3.url("absent")) is None
        assert storage.stat(s3.url("f")) is None
        assert storage.stat(f"s3://{BUCKET}") is None

    def test_a_consoles_folder_marker_is_no_file(self, s3: S3) -> None:
        s3.client.put_object(Bucket=BUCKET, Key=s3.key("made/"), Body=b"")
        assert storage.list_folder(s3.url("made")) == []

    def test_a_listing_is_never_stale(self, s3: S3) -> None:
        assert storage.list_folder(s3.url("f")) == []
        s3.put("f/a", b"1")
        [first] = storage.list_folder(s3.url("f"))
        s3.put("f/a", b"22")
        [second] = storage.list_folder(s3.url("f"))
        assert (first.size, second.size) == (1, 2)
        assert first.etag != second.etag
        assert second == planned(second.url)
        s3.client.delete_object(Bucket=BUCKET, Key=s3.key("f/a"))
        assert storage.list_folder(s3.url("f")) == []
        assert storage.stat(second.url) is None

    def test_an_empty_object_is_there(self, s3: S3) -> None:
        info = planned(s3.put("empty", b""))
        assert (info.size, storage.read_object(info, limit=0)) == (0, b"")

    def test_ranges_across_pieces_are_exact(self, s3: S3) -> None:
        data = os.urandom(3 * PIECE + 12_345)
        info = planned(s3.put("large", data))
        assert info.size == len(data)
        edges = sorted({0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, len(data) - 1, len(data)})
        into = [bytearray(stop - start) for start, stop in pairwise(edges)]
        storage.read_ranges(
            [
                ByteRange(info.url, info.etag, start, memoryview(buffer))
                for start, buffer in zip(edges, into, strict=False)
            ]
        )
        assert b"".join(into) == data
        assert read(info, 5, len(data) - 5) == data[5:-5]

    def test_pieces_are_read_in_parallel(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        info = planned(s3.put("large", bytes(4 * PIECE)))
        together = threading.Barrier(4, timeout=20)  # breaks unless four requests are under way at once

        def get_object(**wanted: Any) -> Any:
            together.wait()
            return real(**wanted)

        real = the_store()._s3.get_object
        monkeypatch.setattr(the_store()._s3, "get_object", get_object)
        read(info, 0, 4 * PIECE)

    def test_a_multipart_object_is_listed_as_it_is_read(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 5 << 20)
        storage.put_new(s3.url("f/parts"), os.urandom(11 << 20))
        [listed] = storage.list_folder(s3.url("f"))
        assert listed == planned(listed.url)
        read(listed, 0, listed.size)


class TestChanging:
    """An object that is no longer the planned one."""

    def test_replaced_before_the_read(self, s3: S3) -> None:
        info = planned(s3.put("x", b"a" * 100))
        s3.put("x", b"b" * 100)
        with pytest.raises(SourceChangedError, match="no longer what was planned") as caught:
            read(info, 10, 20)
        assert (caught.value.exit_code, info.url in caught.value.what) == (3, True)

    def test_replaced_by_a_shorter_one(self, s3: S3) -> None:
        info = planned(s3.put("x", b"a" * 100))
        s3.put("x", b"b" * 5)
        with pytest.raises(SourceChangedError):
            read(info, 10, 20)

    def test_removed(self, s3: S3) -> None:
        info = planned(s3.put("x", b"a" * 100))
        s3.client.delete_object(Bucket=BUCKET, Key=s3.key("x"))
        with pytest.raises(NotFoundError, match="x is not there"):
            read(info, 10, 20)

    @pytest.mark.parametrize("piece", range(4))
    def test_replaced_between_pieces_is_never_a_mixture(
        self, s3: S3, piece: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """s3fs returns ten megabytes of the one and twenty of the other here, without a word."""
        info = planned(s3.put("x", b"a" * (4 * PIECE)))
        monkeypatch.setattr(verbs, "READ_THREADS", 1)
        verbs._readers.cache_clear()
        asked = iter(range(4))

        def get_object(**wanted: Any) -> Any:
            if next(asked) == piece:
                s3.put("x", b"b" * (4 * PIECE))
            return real(**wanted)

        real = the_store()._s3.get_object
        monkeypatch.setattr(the_store()._s3, "get_object", get_object)
        with pytest.raises(SourceChangedError):
            read(info, 0, 4 * PIECE)
        verbs._readers.cache_clear()

    def test_replaced_with_the_same_bytes_is_the_same(self, s3: S3) -> None:
        info = planned(s3.put("x", b"a" * 100))
        s3.put("x", b"a" * 100)
        assert read(info, 10, 20) == b"a" * 10


def test_fsspecs_settings_hold_for_both_clients(s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
    url = s3.put("x", b"abc")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL"):
        monkeypatch.delenv(name)
    own = {"key": ADMIN[0], "secret": ADMIN[1], "endpoint_url": s3.server.endpoint}
    monkeypatch.setitem(fsspec.config.conf, "s3", own)
    s3.forget()
    assert storage.list_folder(s3.url()) == [planned(url)]
    assert read(planned(url), 0, 3) == b"abc"
    monkeypatch.setitem(fsspec.config.conf, "s3", {**own, "key": None, "secret": None, "anon": True})
    s3.forget()
    for verb in VERBS:
        refused(verb, url, CredentialsError, "AccessDenied")


class TestBrokenAnswers:
    """What a network does to an answer on its way."""

    def test_a_body_that_is_cut_short_is_read_again(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        data = os.urandom(100_000)
        info = planned(s3.put("x", data))
        tries = []

        class Cut:
            def __init__(self, body: Any) -> None:
                self.body, self.left = body, 10_000

            def readinto(self, into: memoryview) -> int:
                count = self.body.readinto(into[: self.left])
                self.left -= count
                return int(count)

            def close(self) -> None:
                self.body.close()

        def get_object(**wanted: Any) -> Any:
            answer = real(**wanted)
            tries.append(wanted)
            return answer if len(tries) == 3 else {**answer, "Body": Cut(answer["Body"])}

        real = the_store()._s3.get_object
        monkeypatch.setattr(the_store()._s3, "get_object", get_object)
        assert read(info, 0, len(data)) == data
        assert len(tries) == 3

    def test_a_range_that_was_ignored_is_not_taken_for_the_answer(
        self, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = planned(s3.put("x", bytes(range(100))))
        real = the_store()._s3.get_object
        monkeypatch.setattr(the_store()._s3, "get_object", lambda Range, **wanted: real(**wanted))
        with pytest.raises(StorageError, match="other bytes than those it was asked for"):
            read(info, 50, 60)

    @pytest.mark.parametrize(
        "code", ["SlowDown", "InternalError", "ServiceUnavailable", "ErrTooManyRequest", "RequestTimeout"]
    )
    def test_a_busy_store_is_asked_again_and_not_for_ever(
        self, s3: S3, code: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = planned(s3.put("x", b"abc"))
        calls = []

        def busy(**_: Any) -> Any:
            calls.append(1)
            status = 400 if code == "RequestTimeout" else 503
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")

        real = the_store()._s3.get_object
        monkeypatch.setattr(the_store()._s3, "get_object", busy)
        with pytest.raises(StorageError, match=f"does not answer: {code}") as caught:
            read(info, 0, 3)
        assert (len(calls), caught.value.exit_code) == (3, 12)  # three tries, as conftest allows
        monkeypatch.setattr(
            the_store()._s3, "get_object", lambda **wanted: real(**wanted) if len(calls) > 4 else busy()
        )
        assert read(info, 0, 3) == b"abc"


class TestCreating:
    """Objects appear whole, once."""

    @pytest.fixture(params=["single", "multipart"])
    def size(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
        """Of a body that goes up in one request, or in three parts."""
        if request.param == "single":
            return 1_000_000
        monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 5 << 20)  # the least that S3 takes for a part
        return (11 << 20) + 7

    def test_created_then_same_then_different(self, s3: S3, size: int) -> None:
        data = os.urandom(size)
        assert storage.put_new(s3.url("x"), data) == "created"
        assert s3.get("x") == data
        assert storage.put_new(s3.url("x"), lambda: iter([data[:7], b"", data[7:]]), size=size) == "same"
        assert storage.put_new(s3.url("x"), data[:-1] + bytes([data[-1] ^ 1])) == "different"
        assert storage.put_new(s3.url("x"), data[:-1]) == "different"
        assert s3.get("x") == data
        assert s3.uploads() == []

    @pytest.fixture
    def one_completion_at_a_time(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        """SeaweedFS 4.48, unlike S3, lets several conditional completions through where they overlap."""
        real, lock = the_store()._s3.complete_multipart_upload, threading.Lock()

        def complete(**wanted: Any) -> Any:
            with lock:
                return real(**wanted)

        monkeypatch.setattr(the_store()._s3, "complete_multipart_upload", complete)

    @pytest.mark.slow
    @pytest.mark.usefixtures("one_completion_at_a_time")
    def test_of_eight_writers_one_creates(self, s3: S3, size: int) -> None:
        bodies = [bytes([number]) * size for number in range(8)]
        barrier = threading.Barrier(len(bodies))

        def put(body: bytes) -> storage.PutOutcome:
            barrier.wait()
            return storage.put_new(s3.url("x"), body)

        with ThreadPoolExecutor(len(bodies)) as pool:
            outcomes = list(pool.map(put, bodies))
        assert sorted(outcomes) == ["created", *["different"] * 7]
        assert s3.get("x") == bodies[outcomes.index("created")]
        assert s3.uploads() == []

    @pytest.mark.usefixtures("one_completion_at_a_time")
    def test_of_four_writers_of_the_same_all_are_content(self, s3: S3, size: int) -> None:
        data = os.urandom(size)
        with ThreadPoolExecutor(4) as pool:
            outcomes = list(pool.map(lambda _: storage.put_new(s3.url("x"), data), range(4)))
        assert sorted(outcomes) == ["created", *["same"] * 3]

    def test_an_exception_inside_the_body_publishes_nothing(self, s3: S3, size: int) -> None:
        def body() -> Iterator[bytes]:
            yield bytes(size - 10)
            raise RuntimeError("lost")

        with pytest.raises(RuntimeError, match="lost"):
            storage.put_new(s3.url("x"), body, size=size)
        assert (s3.names(), s3.uploads()) == (set(), [])

    @pytest.mark.parametrize("foreign", [None, b"somebody else's"], ids=["ours", "theirs"])
    def test_a_lost_answer_is_no_failure(
        self, s3: S3, size: int, foreign: bytes | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The write was applied, the answer was lost: the retry meets what we have written ourselves."""
        data = os.urandom(size)
        client = the_store()._s3
        verb = "put_object" if size <= s3_store.SINGLE_PUT_BYTES else "complete_multipart_upload"
        lost = []

        def applied_but_lost(**wanted: Any) -> Any:
            if lost:
                return real(**wanted)
            lost.append(s3.put("x", foreign) if foreign else real(**wanted))
            raise ConnectionClosedError(endpoint_url="http://x")

        real = getattr(client, verb)
        monkeypatch.setattr(client, verb, applied_but_lost)
        assert storage.put_new(s3.url("x"), data) == ("different" if foreign else "same")
        assert s3.get("x") == (foreign or data)
        assert s3.uploads() == []

    @pytest.mark.parametrize("code", ["ConditionalRequestConflict", "OperationAborted"])
    def test_a_conflict_is_tried_again(self, s3: S3, size: int, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
        client, conflicts = the_store()._s3, []
        verb = "put_object" if size <= s3_store.SINGLE_PUT_BYTES else "complete_multipart_upload"

        def conflicted(**wanted: Any) -> Any:
            if conflicts:
                return real(**wanted)
            conflicts.append(1)
            raise ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": 409}}, "Put")

        real = getattr(client, verb)
        monkeypatch.setattr(client, verb, conflicted)
        assert storage.put_new(s3.url("x"), bytes(size)) == "created"

    @pytest.mark.parametrize("applied", [True, False])
    def test_an_upload_that_is_gone_was_completed_or_was_not(
        self, s3: S3, applied: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The answer that S3 may give to a second completion, and to one whose upload somebody has aborted."""
        monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 5 << 20)
        real = the_store()._s3.complete_multipart_upload

        def gone(**wanted: Any) -> Any:
            if applied:
                real(**wanted)
            raise ClientError(
                {"Error": {"Code": "NoSuchUpload"}, "ResponseMetadata": {"HTTPStatusCode": 404}}, "Complete"
            )

        monkeypatch.setattr(the_store()._s3, "complete_multipart_upload", gone)
        if applied:
            assert storage.put_new(s3.url("x"), bytes(6 << 20)) == "same"
        else:
            with pytest.raises(StorageError, match="is not there"):
                storage.put_new(s3.url("x"), bytes(6 << 20))

    def test_refused_as_existing_but_gone_is_not_called_different(
        self, s3: S3, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(**_: Any) -> Any:
            raise ClientError({"Error": {"Code": "PreconditionFailed"}}, "PutObject")

        monkeypatch.setattr(the_store()._s3, "put_object", refused)
        with pytest.raises(StorageError, match="is not there"):
            storage.put_new(s3.url("x"), b"")

    def test_parts_carry_their_checksums(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        """S3 proper, unlike SeaweedFS, refuses to complete an upload whose parts had checksums without them."""
        monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 5 << 20)
        client = the_store()._s3
        seen: dict[str, Any] = {}

        def spy(verb: str) -> Callable[..., Any]:
            real = getattr(client, verb)

            def call(**wanted: Any) -> Any:
                seen[verb] = wanted
                answer = real(**wanted)
                return {"ChecksumCRC32": "AAAAAA==", **answer} if verb == "upload_part" else answer

            return call

        for verb in ("create_multipart_upload", "upload_part"):
            monkeypatch.setattr(client, verb, spy(verb))
        monkeypatch.setattr(client, "complete_multipart_upload", seen.update)
        storage.put_new(s3.url("x"), bytes(6 << 20))
        assert seen["create_multipart_upload"]["ChecksumAlgorithm"] == "CRC32"
        parts = seen["MultipartUpload"]["Parts"]
        assert [sorted(part) for part in parts] == [["ChecksumCRC32", "ETag", "PartNumber"]] * 2

    def test_deleting_what_is_not_there_is_no_error(self, s3: S3) -> None:
        url = s3.put("x", b"1")
        storage.delete(url)
        storage.delete(url)
        storage.drop_empty_folder(s3.url())
        storage.require_writable(s3.url("out"))
        assert (s3.names(), storage.free_bytes(s3.url())) == (set(), None)


VERBS: dict[str, Callable[[str], object]] = {
    "list": storage.list_folder,
    "stat": storage.stat,
    "read": lambda url: read(ObjectInfo(url, 3, ""), 0, 3),
    "put": lambda url: storage.put_new(url, b"abc"),
    "delete": storage.delete,
}


def refused(verb: str, url: str, kind: type[PhloraError], told: str) -> None:
    """A verb ends in this kind of error, which says so in one line, and soon."""
    began = time.monotonic()
    with pytest.raises(kind, match=told) as caught:
        VERBS[verb](url)
    assert type(caught.value) is kind, verb
    assert time.monotonic() - began < 20
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


class TestRefusals:
    """Every verb says the same of the same trouble."""

    @pytest.mark.parametrize("identity", [(ADMIN[0], "wrong"), ("nobody", ADMIN[1])], ids=["secret", "key"])
    def test_wrong_credentials(self, s3: S3, identity: tuple[str, str]) -> None:
        s3.use(identity)
        for verb in VERBS:
            refused(
                verb, s3.url("x"), CredentialsError, r"access denied \((SignatureDoesNotMatch|InvalidAccessKeyId)\)"
            )

    def test_no_credentials(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        s3.forget()
        for verb in VERBS:
            refused(verb, s3.url("x"), CredentialsError, "Unable to locate credentials")

    def test_a_profile_that_is_not_there(self, s3: S3, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_PROFILE", "absent")
        s3.forget()
        for verb in VERBS:
            refused(verb, s3.url("x"), CredentialsError, "absent")

    def test_a_key_that_may_only_read(self, s3: S3) -> None:
        url = s3.put("x", b"abc")
        s3.use(READER)
        assert storage.list_folder(s3.url()) == [planned(url)]
        assert read(planned(url), 0, 3) == b"abc"
        for verb in ("put", "delete"):
            refused(verb, url, CredentialsError, "AccessDenied")
        assert s3.get("x") == b"abc"

    def test_a_missing_bucket(self, s3: S3) -> None:
        for verb in VERBS:
            refused(verb, "s3://no-such-bucket/x", NotFoundError, "no bucket 'no-such-bucket'")

    def test_an_impossible_bucket(self, s3: S3) -> None:
        for verb in VERBS:
            refused(verb, "s3://Bad_Bucket!/x", RequestError, "Bad_Bucket!")

    def test_an_endpoint_that_is_no_url(self, s3: S3) -> None:
        s3.use(endpoint="nowhere")
        for verb in VERBS:
            refused(verb, s3.url("x"), RequestError, "Invalid endpoint: nowhere")

    def test_an_endpoint_where_nobody_listens(self, s3: S3) -> None:
        s3.use(endpoint="http://127.0.0.1:9")
        for verb in VERBS:
            refused(verb, s3.url("x"), StorageError, "127.0.0.1:9")

    @pytest.mark.slow
    def test_a_server_that_dies(self, s3: S3) -> None:
        with running_server() as server:
            s3.use(endpoint=server.endpoint)
            url = f"s3://{BUCKET}/x"
            assert storage.put_new(url, b"abc") == "created"
            server.kill()
            for verb in VERBS:
                refused(verb, url, StorageError, "storage does not answer")

    @pytest.mark.slow
    @pytest.mark.parametrize("verb", VERBS)
    def test_a_server_that_hangs(self, s3: S3, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """It takes connections and never answers; and no client below ours tries once more on its own."""
        connections = []

        def take() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                while True:
                    connections.append(silent.accept()[0])

        with socket.create_server(("127.0.0.1", 0)) as silent:
            thread = threading.Thread(target=take, daemon=True)
            thread.start()
            monkeypatch.setitem(s3_store._CONFIG, "read_timeout", 0.2)
            s3.use(endpoint=f"http://127.0.0.1:{silent.getsockname()[1]}")
            refused(verb, s3.url("x"), StorageError, "Timeout")
            silent.shutdown(socket.SHUT_RDWR)
            thread.join()
        assert len(connections) == 3  # as many as conftest allows
        for connection in connections:
            connection.close()


@pytest.mark.slow
def test_a_retry_prints_nothing(s3: S3, tmp_path: Path) -> None:
    """Without a handler, Python's logging puts a word of the retry library on a user's stderr; pytest has handlers."""
    s3.use(endpoint="http://127.0.0.1:9")
    script = "import stamina; stamina.set_testing(True, attempts=3); from phlora_pipeline.cli import main; main()"
    flags = ["--base", s3.url("base"), "--tuned", s3.url("tuned"), "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", script, "extract", *flags], capture_output=True, text=True)
    assert done.returncode == 12
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["error:", "fix:"]
