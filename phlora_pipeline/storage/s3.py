"""S3 and what speaks like it: every byte that is read carries `If-Match`, every object is created by `If-None-Match`.

Two clients, one configuration. s3fs lists, and is where a user's fsspec settings live; the bytes go through boto3, because s3fs sends no `If-Match` on ranged reads (an object replaced mid-read comes back as a mixture), maps a
failed precondition to `OSError(22)`, and costs twice the processor time per byte. Retries happen here and nowhere
below: both clients are told to try once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import boto3
import s3fs
import stamina
from botocore import UNSIGNED
from botocore import exceptions as aws
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    PhloraError,
    RequestError,
    StorageError,
    one_line,
)
from phlora_pipeline.storage.base import ByteRange, Chunks, ObjectInfo, PutOutcome
from phlora_pipeline.storage.local import changed

T = TypeVar("T")

SINGLE_PUT_BYTES = 64 << 20
"""Larger bodies go up in parts of this size (S3 allows 10,000 of them: 640 GB)."""

_CREDENTIALS = {
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId",
    "InvalidToken", "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired", "Forbidden", "Unauthorized", "401", "403",
}  # fmt: skip
_MISSING = {"NoSuchKey", "NoSuchBucket", "NotFound", "404"}
_PRECONDITION = {"PreconditionFailed", "412"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_NO_CREDENTIALS = (
    aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound, aws.SSOError,
    aws.CredentialRetrievalError, aws.MetadataRetrievalError, aws.TokenRetrievalError,
)  # fmt: skip
_BROKEN = (
    aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.ChecksumError, aws.FlexibleChecksumError, OSError,
)  # fmt: skip
"""Connections, timeouts, cut or damaged bodies: worth another try. What else a client raises itself, it raises again."""

_CONFIG: dict[str, Any] = {
    "retries": {"max_attempts": 0},
    "connect_timeout": 5,
    "read_timeout": 30,
    "max_pool_connections": 32,
}


# A retry is no news: without a handler Python would print stamina's log record on a user's stderr.
logging.getLogger("stamina").addHandler(logging.NullHandler())


class _TransientError(Exception):
    """Worth another try: the store is busy, the connection broke, or a body was cut short."""


def _retrying(attempt: Callable[[], T]) -> T:
    """The only retry layer: exponential with jitter, bounded in attempts and in time."""
    for trial in stamina.retry_context(on=_TransientError, attempts=8, timeout=120.0, wait_initial=0.2, wait_max=10.0):
        with trial:
            return attempt()
    raise AssertionError("stamina either returns or raises")


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
        def attempt() -> list[dict[str, Any]]:
            with _errors(url):
                try:
                    return list(self._fs.ls(_path(url), detail=True, refresh=True))
                except FileNotFoundError as error:
                    if _code(error) == "NoSuchBucket":
                        raise _no_bucket(url) from error
                    return []

        entries = [entry for entry in _run(url, attempt) if entry["type"] == "file" and entry["name"] != _path(url)]
        # A key that ends with a slash is what consoles make for an empty folder.
        files = [entry for entry in entries if not entry["name"].endswith("/")]
        return sorted((_listed(entry) for entry in files), key=lambda info: info.url)

    def stat(self, url: str) -> ObjectInfo | None:
        # A ranged GET and not a HEAD: a HEAD's errors have no body, so expired credentials look like a bad request.
        bucket, key = _split(url)
        if not key:
            return None

        def attempt() -> ObjectInfo | None:
            with _errors(url):
                try:
                    answer = self._s3.get_object(Bucket=bucket, Key=key, Range="bytes=0-0")
                except ClientError as error:
                    if _code(error) == "NoSuchKey":
                        return None
                    if _code(error) == "InvalidRange":  # there, and empty
                        return ObjectInfo(url, 0, "")
                    raise
                answer["Body"].close()
                _require_range(url, answer, 0)
                return ObjectInfo(url, int(answer["ContentRange"].rpartition("/")[2]), answer["ETag"].strip('"'))

        return _run(url, attempt)

    def read_into(self, piece: ByteRange) -> None:
        bucket, key = _split(piece.url)
        wanted = {"Bucket": bucket, "Key": key, "Range": f"bytes={piece.start}-{piece.start + len(piece.into) - 1}"}
        if piece.etag:
            wanted["IfMatch"] = f'"{piece.etag}"'

        def attempt() -> None:
            with _errors(piece.url):
                try:
                    answer = self._s3.get_object(**wanted)
                except ClientError as error:
                    if _code(error) in _PRECONDITION | {"InvalidRange"}:
                        raise changed(piece.url, piece.etag, "another object") from error
                    raise
                with contextlib.closing(answer["Body"]) as body:
                    _require_range(piece.url, answer, piece.start)
                    _fill(piece, body)

        _run(piece.url, attempt)

    def put_new(self, url: str, chunks: Chunks, size: int) -> PutOutcome:
        create = self._put_single if size <= SINGLE_PUT_BYTES else self._put_parts
        if create(url, chunks):
            return "created"
        found = self.stat(url)
        if found is None:
            raise StorageError(f"{url} could not be created, and is not there", remedy="run again")
        return "same" if found.size == size and self._equal(found, chunks) else "different"

    def delete(self, url: str) -> None:
        bucket, key = _split(url)

        def attempt() -> None:
            with _errors(url):
                self._s3.delete_object(Bucket=bucket, Key=key)

        _run(url, attempt)

    def drop_empty_folder(self, url: str) -> None:
        """Prefixes vanish with their last object."""

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
                session = boto3.session.Session(profile_name=fs.kwargs.get("profile"))
                settings = {**_CONFIG, "signature_version": UNSIGNED} if fs.anon else _CONFIG
                self._client = session.client("s3", config=Config(**settings), **{**given, **fs.client_kwargs})
            return self._client

    def _put_single(self, url: str, chunks: Chunks) -> bool:
        bucket, key = _split(url)
        data = b"".join(chunks())

        def attempt() -> bool:
            with _errors(url):
                return self._create(lambda: self._s3.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*"))

        return _run(url, attempt)

    def _put_parts(self, url: str, chunks: Chunks) -> bool:
        bucket, key = _split(url)
        upload = {"Bucket": bucket, "Key": key, "UploadId": _run(url, lambda: self._start_parts(url, bucket, key))}
        try:
            parts = []
            for number, data in enumerate(_regroup(chunks(), SINGLE_PUT_BYTES), start=1):
                send = partial(self._upload_part, url, upload, number, data)
                parts.append({"PartNumber": number, **_run(url, send)})

            def attempt() -> bool:
                with _errors(url):
                    complete = {**upload, "MultipartUpload": {"Parts": parts}, "IfNoneMatch": "*"}
                    return self._create(lambda: self._s3.complete_multipart_upload(**complete))

            created = _run(url, attempt)
        except BaseException:
            self._abort(upload)
            raise
        if not created:
            self._abort(upload)
        return created

    def _start_parts(self, url: str, bucket: str, key: str) -> str:
        with _errors(url):
            # boto3 sends a CRC32 with every part; S3 wants it announced here, and repeated on completion.
            answer = self._s3.create_multipart_upload(Bucket=bucket, Key=key, ChecksumAlgorithm="CRC32")
            return str(answer["UploadId"])

    def _upload_part(self, url: str, upload: dict[str, Any], number: int, data: bytes) -> dict[str, str]:
        with _errors(url):
            answer = self._s3.upload_part(**upload, PartNumber=number, Body=data, ChecksumAlgorithm="CRC32")
            return {name: answer[name] for name in ("ETag", "ChecksumCRC32") if name in answer}

    def _abort(self, upload: dict[str, Any]) -> None:
        # Best effort: an upload that is left over is invisible, and the bucket's lifecycle rule takes it.
        with contextlib.suppress(ClientError, BotoCoreError):
            self._s3.abort_multipart_upload(**upload)

    @staticmethod
    def _create(put: Callable[[], object]) -> bool:
        """True: the object is there now, by us. False: there is one already (maybe ours, with the answer lost)."""
        try:
            put()
        except ClientError as error:
            if _code(error) in _PRECONDITION:
                return False
            if _code(error) == "NoSuchUpload":  # completed before, and the answer was lost
                return False
            raise
        return True

    def _equal(self, found: ObjectInfo, chunks: Chunks) -> bool:
        offset = 0
        for chunk in _regroup(chunks(), self.piece_bytes):
            there = bytearray(len(chunk))
            self.read_into(ByteRange(found.url, found.etag, offset, memoryview(there)))
            if there != chunk:
                return False
            offset += len(chunk)
        return True


def _run(url: str, attempt: Callable[[], T]) -> T:
    try:
        return _retrying(attempt)
    except _TransientError as error:
        raise StorageError(
            f"{url}: storage does not answer: {error}",
            remedy="check the endpoint and the network, then run again: finished parts are kept",
        ) from error


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Sort the clients' errors into: ours, gone, not allowed, wrong, worth another try."""
    try:
        yield
    except (PhloraError, _TransientError):
        raise
    except (ClientError, BotoCoreError, OSError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise _sorted_error(url, error) from error


def _sorted_error(url: str, error: Exception) -> Exception:
    answered = _client_error(error)
    if answered is not None:
        return _sorted_client_error(url, answered)
    if isinstance(error, _NO_CREDENTIALS):
        return CredentialsError(
            f"{url}: {one_line(error)}",
            remedy="set AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role",
        )
    if isinstance(error, _BROKEN):
        return _TransientError(f"{type(error).__name__}: {one_line(error)}")
    return RequestError(f"{url}: {one_line(error)}", remedy="check the URL and the AWS settings")


def _sorted_client_error(url: str, error: ClientError) -> Exception:
    code = _code(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if code == "NoSuchBucket":
        return _no_bucket(url)
    if code in _MISSING:
        return NotFoundError(f"{url} is not there", remedy="see whether it was moved or removed, and run again")
    if code in _CREDENTIALS or status in {401, 403}:
        return _denied(url, code)
    if (
        code in _CONFLICT
        or status >= 500
        or status == 429
        or code in {"SlowDown", "RequestTimeout", "Throttling", "BadDigest"}
    ):
        return _TransientError(f"{code} (HTTP {status})")
    return StorageError(f"{url}: {code} (HTTP {status}): {one_line(error)}")


def _denied(url: str, code: str) -> CredentialsError:
    return CredentialsError(f"{url}: access denied ({code})", remedy="check the credentials and the bucket's policy")


def _no_bucket(url: str) -> NotFoundError:
    return NotFoundError(
        f"there is no bucket {_split(url)[0]!r} ({url})", remedy="check the bucket's name, region and endpoint"
    )


def _code(error: BaseException) -> str:
    """The service's error code."""
    answered = _client_error(error)
    return "" if answered is None else str(answered.response.get("Error", {}).get("Code", ""))


def _client_error(error: BaseException) -> ClientError | None:
    """The service's answer, wherever in the chain of causes it is: s3fs hides it behind an errno."""
    seen: BaseException | None = error
    while seen is not None and not isinstance(seen, ClientError):
        seen = seen.__cause__
    return seen


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
            raise _TransientError(f"body cut short after {done} of {len(piece.into)} bytes")
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


def _path(url: str) -> str:
    return url.partition("://")[2].rstrip("/")


def _split(url: str) -> tuple[str, str]:
    bucket, _, key = _path(url).partition("/")
    return bucket, key


def _listed(entry: dict[str, Any]) -> ObjectInfo:
    return ObjectInfo(f"s3://{entry['name']}", int(entry["size"]), str(entry["ETag"]).strip('"'))
