"""URLs and local paths, in one form: pure string work."""

from __future__ import annotations

import os
import re

from phlora_pipeline.errors import RequestError

_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)")


def scheme(url: str) -> str:
    """`s3` of `s3://bucket/key`; `file` for a local path.

    >>> scheme("s3://models/base"), scheme("/models/base")
    ('s3', 'file')
    """
    head, separator, _ = url.partition("://")
    return head.lower() if separator else "file"


def normalize(url: str) -> str:
    """An absolute URL without a trailing slash: a relative path means nothing to a worker elsewhere.

    >>> normalize("s3://models/base/"), normalize("file:///models/base")
    ('s3://models/base', '/models/base')
    """
    _, separator, path = url.partition("://")
    empty = not path.strip("/") if separator else not url
    # `s3:/bucket/x`, read as a local path, would quietly write to a folder named `s3:`.
    if empty or "\0" in url or _ONE_SLASH.match(url):
        raise RequestError(
            f"not a path or URL: {url!r}", remedy="give a local path, s3://bucket/prefix, or another fsspec URL"
        )
    if scheme(url) == "file":
        return os.path.abspath(path if separator else url)
    return url.rstrip("/")


def join(folder: str, *names: str) -> str:
    """`folder/name/…`, for a local path or a URL."""
    return "/".join([folder.rstrip("/") or "", *names])


def basename(url: str) -> str:
    """The last component."""
    return url.rstrip("/").rpartition("/")[2]


def bucket_and_key(url: str) -> tuple[str, str]:
    """What S3 calls them; the key is empty for a bucket itself.

    >>> bucket_and_key("s3://models/base/config.json"), bucket_and_key("s3://models")
    (('models', 'base/config.json'), ('models', ''))
    """
    bucket, _, key = url.partition("://")[2].rstrip("/").partition("/")
    return bucket, key
