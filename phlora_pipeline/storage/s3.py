"""S3 and what speaks like it: every byte that is read carries `If-Match`, every object is created by `If-None-Match`.

boto3 does the work. s3fs sends no `If-Match` on ranged reads (an object replaced mid-read comes back as a mixture), maps a
failed precondition to `OSError(22)`, lists the whole parent of a folder that is not there, and costs twice the processor
time per byte; but it is where a user's fsspec settings live, so it is asked for those. Retries happen in `s3_errors` and
nowhere below: the client is told to try once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import boto3
import s3fs
from botocore import UNSIGNED
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from phlora_pipeline.errors import NotFoundError, SourceChangedError, StorageError
from phlora_pipeline.storage import s3_listing
from phlora_pipeline.storage.base import ByteRange, Chunks, ObjectInfo, PutOutcome, Upload
from phlora_pipeline.storage.local import changed
from phlora_pipeline.storage.s3_errors import PRECONDITION, TransientError, code, errors, run
from phlora_pipeline.storage.urls import bucket_and_key

SINGLE_PUT_BYTES = 64 << 20
"""Larger bodies go up in parts of this size (S3 allows 10,000 of them: 640 GB)."""

_CONFIG: dict[str, Any] = {
    "retries": {"max_attempts": 0},
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 32,
}


class S3Store:
    """Buckets, reached with the ambient credentials (environment, profile, IRSA, instance role) or fsspec's settings."""

    piece_bytes = 8 << 20

    def __init__(self) -> None:
        # skip_instance_cache: a stale listing cache shared with other code in the process is a wrong plan.
        self._fs: Any = s3fs.S3FileSystem(
            use_listings_cache=False, skip_instance_cache=True, config_kwargs=dict(_CONFIG)
        )
        self._fs.retries = 1
        self._local = threading.Lock()
        self._client: Any = None

    def list_folder(self, url: str) -> list[ObjectInfo]:
        return s3_listing.objects(lambda: self._s3, url, deep=False)

    def list_folders(self, url: str) -> list[str]:
        return s3_listing.folders(lambda: self._s3, url)

    def list_tree(self, url: str) -> list[ObjectInfo]:
        return s3_listing.objects(lambda: self._s3, url, deep=True)

    def stat(self, url: str) -> ObjectInfo | None:
        # A ranged GET and not a HEAD: a HEAD's errors have no body, so expired credentials look like a bad request.
        bucket, key = bucket_and_key(url)
        if not key:
            return None

        def attempt() -> ObjectInfo | None:
            with errors(url):
                try:
                    answer = self._s3.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
                except ClientError as error:
                    if code(error) == "NoSuchKey":
                        return None
                    if code(error) == "InvalidRange":  # there, and empty
                        return self._stat_empty(url)
                    raise
                answer["Body"].close()
                _require_range(url, answer, 0)
                size = int(answer["ContentRange"].rpartition("/")[2])
                return ObjectInfo(url, size, answer["ETag"].strip('"'), answer["LastModified"].timestamp())

        return run(url, attempt)

    def read_into(self, piece: ByteRange) -> None:
        bucket, key = bucket_and_key(piece.url)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={piece.start}-{piece.start + len(piece.into) - 1}"}
        if piece.etag:
            wanted["IfMatch"] = f'"{piece.etag}"'

        def attempt() -> None:
            with errors(piece.url):
                try:
                    answer = self._s3.get_object(**wanted)
                except ClientError as error:
                    if code(error) in PRECONDITION | {"InvalidRange"}:
                        raise changed(piece.url, piece.etag, "another object") from error
                    raise
                with contextlib.closing(answer["Body"]) as body:
                    _require_range(piece.url, answer, piece.start)
                    _fill(piece, body)

        run(piece.url, attempt)

    def put_new(self, url: str, chunks: Chunks, size: int, *, in_parts: bool = False) -> PutOutcome:
        create = self._put_parts if in_parts or size > SINGLE_PUT_BYTES else self._put_single
        if create(url, chunks):
            return "created"
        found = self.stat(url)
        if found is None:
            raise StorageError(f"{url} could not be created, and is not there", remedy="run again")
        return "same" if found.size == size and self._equal(found, chunks) else "different"

    def swap(self, url: str, data: bytes, expected: ObjectInfo | None) -> bool:
        bucket, key = bucket_and_key(url)
        condition = {"IfNoneMatch": "*"} if expected is None else {"IfMatch": f'"{expected.etag}"'}
        tries = 0

        def attempt() -> bool:
            nonlocal tries
            tries += 1
            with errors(url):
                return self._create(lambda: self._s3.put_object(Bucket=bucket, Key=key, Body=data, **condition))

        if run(url, attempt):
            return True
        # The first try's answer is what it says. A later one may have met what an earlier one, its answer lost, has put.
        return tries > 1 and self._holds(url, data)

    def uploads(self, url: str) -> list[Upload]:
        return s3_listing.uploads(lambda: self._s3, url)

    def abort_upload(self, upload: Upload) -> None:
        bucket, key = bucket_and_key(upload.url)

        def attempt() -> None:
            with errors(upload.url):
                try:
                    self._s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload.id)
                except ClientError as error:
                    if code(error) != "NoSuchUpload":  # completed or aborted meanwhile
                        raise

        run(upload.url, attempt)

    def clock(self, url: str) -> float:
        return s3_listing.clock(lambda: self._s3, url)

    def delete(self, url: str) -> None:
        bucket, key = bucket_and_key(url)

        def attempt() -> None:
            with errors(url):
                self._s3.delete_object(Bucket=bucket, Key=key)

        run(url, attempt)

    def drop_empty_folder(self, url: str) -> None:
        """Prefixes vanish with their last object."""

    def identity(self, url: str) -> str:
        if self._fs.anon or self._fs.key:
            return "nobody" if self._fs.anon else f"a key of fsspec's settings, …{str(self._fs.key)[-4:]}"

        def attempt() -> str:
            with errors(url):
                found = self._session().get_credentials()
                if found is None:
                    raise NoCredentialsError
                # A role is taken on here, and not before.
                return f"found by {found.method}, key …{found.get_frozen_credentials().access_key[-4:]}"

        return run(url, attempt)

    def require_writable(self, url: str) -> None:
        """Nothing can be told without writing; the run's first write, a few bytes, comes before its first read."""

    def free_bytes(self, url: str) -> int | None:
        return None

    @property
    def _s3(self) -> Any:
        with self._local:  # creating a boto3 client is not thread-safe; using one is
            if self._client is None:
                fs = self._fs
                given = {
                    "endpoint_url": fs.endpoint_url, "aws_access_key_id": fs.key, "aws_secret_access_key": fs.secret,
                    "aws_session_token": fs.token, "use_ssl": fs.use_ssl,
                }  # fmt: skip
                settings = {**_CONFIG, "signature_version": UNSIGNED} if fs.anon else _CONFIG
                self._client = self._session().client("s3", config=Config(**settings), **{**given, **fs.client_kwargs})
            return self._client

    def _session(self) -> Any:
        return boto3.session.Session(profile_name=self._fs.kwargs.get("profile"))

    def _put_single(self, url: str, chunks: Chunks) -> bool:
        bucket, key = bucket_and_key(url)
        data = b"".join(chunks())

        def attempt() -> bool:
            with errors(url):
                return self._create(lambda: self._s3.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))

        return run(url, attempt)

    def _put_parts(self, url: str, chunks: Chunks) -> bool:
        bucket, key = bucket_and_key(url)
        upload = {"Bucket": bucket, "Key": key, "UploadId": run(url, lambda: self._start_parts(url, bucket, key))}
        try:
            parts = []
            for number, data in enumerate(_regroup(chunks(), SINGLE_PUT_BYTES), start=1):
                send = partial(self._upload_part, url, upload, number, data)
                parts.append({"PartNumber": number, **run(url, send)})

            def attempt() -> bool:
                with errors(url):
                    complete = {**upload, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
                    return self._create(lambda: self._s3.complete_multipart_upload(**complete))

            created = run(url, attempt)
        except BaseException:
            self._abort(upload)
            raise
        if not created:
            self._abort(upload)
        return created

    def _start_parts(self, url: str, bucket: str, key: str) -> str:
        with errors(url):
            # boto3 sends a CRC32 with every part; S3 wants it announced here, and repeated on completion.
            answer = self._s3.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32")
            return str(answer["UploadId"])

    def _upload_part(self, url: str, upload: dict[str, Any], number: int, data: bytes) -> dict[str, str]:
        with errors(url):
            answer = self._s3.upload_part(**upload, PartNumber=number, Body=data, ChecksumAlgorithm="CRC32")
            return {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}

    def _abort(self, upload: dict[str, Any]) -> None:
        # Best effort: an upload that is left over is invisible, and the bucket's lifecycle rule takes it.
        with contextlib.suppress(ClientError, BotoCoreError):
            self._s3.abort_multipart_upload(**upload)

    @staticmethod
    def _create(put: Callable[[], object]) -> bool:
        """True: the condition held, and what was put is there now. False: it did not (maybe of ours, its answer lost)."""
        try:
            put()
        except ClientError as error:
            # NoSuchUpload: completed before, and the answer was lost. NoSuchKey: nothing is there that could match.
            if code(error) in PRECONDITION | {"NoSuchUpload", "NoSuchKey"}:
                return False
            raise
        return True

    def _stat_empty(self, url: str) -> ObjectInfo | None:
        bucket, key = bucket_and_key(url)
        try:
            answer = self._s3.head_object(Bucket=bucket, Key=key)
        except ClientError as error:
            if code(error) == "404":
                return None
            raise
        return ObjectInfo(
            url, int(answer["ContentLength"]), answer["ETag"].strip('"'), answer["LastModified"].timestamp()
        )

    def _holds(self, url: str, data: bytes) -> bool:
        found = self.stat(url)
        try:
            return found is not None and found.size == len(data) and self._equal(found, lambda: iter([data]))
        except (NotFoundError, SourceChangedError):  # another one's by now
            return False

    def _equal(self, found: ObjectInfo, chunks: Chunks) -> bool:
        offset = 0
        for chunk in _regroup(chunks(), self.piece_bytes):
            there = bytearray(len(chunk))
            self.read_into(ByteRange(found.url, found.etag, offset, memoryview(there)))
            if there != chunk:
                return False
            offset += len(chunk)
        return True


def _require_range(url: str, answer: dict[str, Any], start: int) -> None:
    # A proxy that ignores Range sends the object from its beginning: right length, other bytes.
    if not answer.get("ContentRange", "").startswith(f"bytes {start}-"):
        raise StorageError(
            f"{url}: the server sends other bytes than those it was asked for",
            remedy="reach the store directly: what is between ignores ranges",
        )


def _fill(piece: ByteRange, body: Any) -> None:
    done = 0
    while done < len(piece.into):
        count = body.readinto(piece.into[done:])
        if not count:
            raise TransientError(f"body cut short after {done} of {len(piece.into)} bytes")
        done += count


def _regroup(chunks: Iterator[bytes], size: int) -> Iterator[bytes]:
    """The same bytes in chunks of exactly `size`, the last one shorter."""
    pending = bytearray()
    for chunk in chunks:
        pending += chunk
        while len(pending) >= size:
            yield bytes(pending[:size])
            del pending[:size]
    if pending:
        yield bytes(pending)
