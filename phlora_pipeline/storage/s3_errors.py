"""What S3 answers, as this package's errors, and the only retry layer: transient trouble is tried again here and nowhere else."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TypeVar

import stamina
from botocore import exceptions as aws
from botocore.exceptions import BotoCoreError, ClientError

from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    PhloraError,
    RequestError,
    StorageError,
    one_line,
)
from phlora_pipeline.storage import traffic
from phlora_pipeline.storage.traffic import Reason
from phlora_pipeline.storage.urls import bucket_and_key

T = TypeVar("T")

PRECONDITION = {"PreconditionFailed", "412"}
"""Codes of a refused `If-Match` or `If-None-Match`."""

_CREDENTIALS = {
    "AccessDenied", "AllAccessDisabled", "AccountProblem", "ExpiredToken", "ExpiredTokenException", "InvalidAccessKeyId",
    "InvalidToken", "RequestExpired", "SignatureDoesNotMatch", "TokenRefreshRequired", "Forbidden", "Unauthorized", "401", "403",
}  # fmt: skip
_MISSING = {"NoSuchKey", "NoSuchBucket", "NotFound", "404"}
_CONFLICT = {"ConditionalRequestConflict", "OperationAborted"}
_NO_CREDENTIALS = (
    aws.NoCredentialsError, aws.PartialCredentialsError, aws.ProfileNotFound, aws.SSOError,
    aws.CredentialRetrievalError, aws.MetadataRetrievalError, aws.TokenRetrievalError,
)  # fmt: skip
_BROKEN = (
    aws.HTTPClientError, aws.ConnectionError, aws.IncompleteReadError, aws.ChecksumError, aws.FlexibleChecksumError, OSError,
)  # fmt: skip
"""Connections, timeouts, cut or damaged bodies: worth another try. What else a client raises itself, it raises again."""

# A retry is no news: without a handler Python would print stamina's log record on a user's stderr.
logging.getLogger("stamina").addHandler(logging.NullHandler())


class TransientError(Exception):
    """Worth another try: the store is busy, the connection broke, or a body was cut short."""

    def __init__(self, what: str, reason: Reason = "connection") -> None:
        super().__init__(what)
        self.reason = reason


def _retrying(attempt: Callable[[], T]) -> T:
    """Exponential with jitter, bounded in attempts and in time."""
    for trial in stamina.retry_context(on=TransientError, attempts=8, timeout=120.0, wait_initial=0.2, wait_max=10.0):
        with trial:
            try:
                return attempt()
            except TransientError as error:
                traffic.failed(error.reason)
                raise
    raise AssertionError("stamina either returns or raises")


def run(url: str, attempt: Callable[[], T]) -> T:
    """The result of an attempt that was repeated while the trouble was transient."""
    try:
        return _retrying(attempt)
    except TransientError as error:
        raise StorageError(
            f"{url}: storage does not answer: {error}",
            remedy="check the endpoint and the network, then run again: finished parts are kept",
        ) from error


@contextlib.contextmanager
def errors(url: str) -> Iterator[None]:
    """Sort the clients' errors into: ours, gone, not allowed, wrong, worth another try."""
    try:
        yield
    except (PhloraError, TransientError):
        raise
    except (ClientError, BotoCoreError, OSError, ValueError) as error:  # ValueError: an endpoint that is no URL
        raise _sorted_error(url, error) from error


def _sorted_error(url: str, error: Exception) -> Exception:
    if isinstance(error, ClientError):
        return _sorted_answer(url, error)
    if isinstance(error, _NO_CREDENTIALS):
        return CredentialsError(
            f"{url}: {one_line(error)}",
            remedy="set AWS_PROFILE, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a role",
        )
    if isinstance(error, _BROKEN):
        return TransientError(f"{type(error).__name__}: {one_line(error)}")
    return RequestError(f"{url}: {one_line(error)}", remedy="check the URL and the AWS settings")


def _sorted_answer(url: str, error: ClientError) -> Exception:
    told = code(error)
    status = int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    if told == "NoSuchBucket":
        return _no_bucket(url)
    if told in _MISSING:
        return NotFoundError(f"{url} is not there", remedy="see whether it was moved or removed, and run again")
    if told in _CREDENTIALS or status in {401, 403}:
        return _denied(url, told)
    if (
        told in _CONFLICT
        or status >= 500
        or status == 429
        or told in {"SlowDown", "RequestTimeout", "Throttling", "BadDigest"}
    ):
        return TransientError(f"{told} (HTTP {status})", _reason(told, status))
    return StorageError(f"{url}: {told} (HTTP {status}): {one_line(error)}")


def _reason(told: str, status: int) -> Reason:
    if status in {429, 503} or told in {"SlowDown", "Throttling"}:
        return "throttled"
    if told in _CONFLICT:
        return "conflict"
    if told == "BadDigest":
        return "damaged"
    return "server" if status >= 500 else "connection"


def _denied(url: str, told: str) -> CredentialsError:
    skewed = told == "RequestTimeTooSkewed"
    remedy = "set this machine's clock (NTP)" if skewed else "check the credentials and the bucket's policy"
    return CredentialsError(f"{url}: access denied ({told})", remedy=remedy)


def _no_bucket(url: str) -> NotFoundError:
    return NotFoundError(
        f"there is no bucket {bucket_and_key(url)[0]!r} ({url})", remedy="check the bucket's name, region and endpoint"
    )


def code(error: Exception) -> str:
    """The service's error code."""
    return str(error.response.get("Error", {}).get("Code", "")) if isinstance(error, ClientError) else ""
