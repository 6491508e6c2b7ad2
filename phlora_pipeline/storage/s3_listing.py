"""What lies in a bucket, page by page: objects, folders, and uploads that nobody has completed."""

from __future__ import annotations

import email.utils
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from botocore.exceptions import ClientError

from phlora_pipeline.errors import StorageError
from phlora_pipeline.storage.base import ObjectInfo, Upload
from phlora_pipeline.storage.s3_errors import code, errors, run
from phlora_pipeline.storage.urls import bucket_and_key

Client = Callable[[], Any]
"""Makes or finds the boto3 client: that it cannot be made, say without credentials, is an error of the request, too."""

PAGE = 1000
"""Entries that are asked for at once: as many as S3 gives."""

_OBJECTS = {"ContinuationToken": "NextContinuationToken"}
_UPLOADS = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
_PARTS = {"PartNumberMarker": "NextPartNumberMarker"}


def objects(client: Client, url: str, *, deep: bool) -> list[ObjectInfo]:
    """Objects in the folder, or in everything below it, by URL."""
    bucket, prefix = _place(url)
    delimiter = {} if deep else {"Delimiter": "/"}
    pages = _pages(client, "list_objects_v2", url, _OBJECTS, Bucket=bucket, Prefix=prefix, MaxKeys=PAGE, **delimiter)
    # A key that ends with a slash is what consoles make for an empty folder.
    entries = [entry for page in pages for entry in page.get("Contents", []) if not entry["Key"].endswith("/")]
    return sorted((_listed(bucket, entry) for entry in entries), key=lambda info: info.url)


def folders(client: Client, url: str) -> list[str]:
    """URLs of the folders directly below, by name."""
    bucket, prefix = _place(url)
    wanted = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": PAGE, "Delimiter": "/"}
    pages = _pages(client, "list_objects_v2", url, _OBJECTS, **wanted)
    return sorted(f"s3://{bucket}/{entry['Prefix'][:-1]}" for page in pages for entry in page.get("CommonPrefixes", []))


def uploads(client: Client, url: str) -> list[Upload]:
    """Multipart uploads below the folder that were neither completed nor aborted, by URL."""
    bucket, prefix = _place(url)
    pages = _pages(client, "list_multipart_uploads", url, _UPLOADS, Bucket=bucket, Prefix=prefix, MaxUploads=PAGE)
    found = []
    for entry in (entry for page in pages for entry in page.get("Uploads", [])):
        target = f"s3://{bucket}/{entry['Key']}"
        size = _uploaded_bytes(client, target, entry["UploadId"])
        found.append(Upload(target, entry["UploadId"], entry["Initiated"].timestamp(), size))
    return sorted(found, key=lambda upload: (upload.url, upload.id))


def clock(client: Client, url: str) -> float:
    """What time it is there: every answer of an HTTP server is dated."""
    bucket, prefix = _place(url)

    def attempt() -> str:
        with errors(url):
            answer = client().list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
            return str(answer["ResponseMetadata"]["HTTPHeaders"].get("date", ""))

    told = run(url, attempt)
    try:
        return email.utils.parsedate_to_datetime(told).timestamp()
    except ValueError as error:
        raise StorageError(
            f"{url}: the server does not say what time it is there: Date is {told!r}",
            remedy="reach the store directly: what is between drops its headers",
        ) from error


def _uploaded_bytes(client: Client, url: str, upload_id: str) -> int:
    bucket, key = bucket_and_key(url)
    pages = _pages(client, "list_parts", url, _PARTS, Bucket=bucket, Key=key, UploadId=upload_id)
    return sum(int(part["Size"]) for page in pages for part in page.get("Parts", []))


def _pages(client: Client, verb: str, url: str, markers: Mapping[str, str], **wanted: Any) -> Iterator[dict[str, Any]]:
    """Every page of a listing, each tried again on its own.

    Args:
        client: see `Client`.
        verb: the client's method.
        url: what is listed, for messages.
        markers: argument of the next page's request → where this page's answer has it.
        wanted: arguments of the first page's request.
    """

    def attempt() -> dict[str, Any]:
        with errors(url):
            try:
                return dict(getattr(client(), verb)(**wanted))
            except ClientError as error:
                if code(error) == "NoSuchUpload":  # completed or aborted since it was listed
                    return {}
                raise

    while True:
        page = run(url, attempt)
        yield page
        if not page.get("IsTruncated"):
            return
        # SeaweedFS gives one marker of two for uploads, and takes what it gives.
        following = {argument: page[told] for argument, told in markers.items() if page.get(told)}
        if following.items() <= wanted.items():
            raise StorageError(
                f"{url}: the server's listing does not go on: it is truncated, and after {following} comes the same again"
            )
        wanted |= following


def _place(url: str) -> tuple[str, str]:
    bucket, key = bucket_and_key(url)
    return bucket, f"{key}/" if key else ""


def _listed(bucket: str, entry: Mapping[str, Any]) -> ObjectInfo:
    return ObjectInfo(
        f"s3://{bucket}/{entry['Key']}",
        int(entry["Size"]),
        str(entry["ETag"]).strip('"'),
        entry["LastModified"].timestamp(),
    )
