"""Object storage as the pipeline needs it: list, ranged reads bound to what was planned, create-only writes.

An object store is not a file system, and this module does not pretend otherwise. There is no `open`: an exception
inside `open("wb")` would publish half an object, and a buffered reader would mix an object with its replacement. What
there is instead:

- `list_folder`, `stat`: what lies where, with an `etag` that names the content;
- `read_ranges`: bytes of planned objects into the caller's memory; a replaced object raises `SourceChangedError`;
- `put_new`: an object appears whole, or not at all, and never over another one.

Three stores implement this: local files, S3 (bytes by boto3, everything else by s3fs), and, for reading, whatever
fsspec knows. This package is the only home of fsspec, s3fs and boto3.
"""

from phlora_pipeline.storage.base import ByteRange, ObjectInfo, PutOutcome, Store
from phlora_pipeline.storage.urls import basename, join, normalize
from phlora_pipeline.storage.verbs import (
    delete,
    drop_empty_folder,
    free_bytes,
    list_folder,
    put_new,
    read_object,
    read_ranges,
    require_writable,
    sha256,
    stat,
)

__all__ = [
    "ByteRange",
    "ObjectInfo",
    "PutOutcome",
    "Store",
    "basename",
    "delete",
    "drop_empty_folder",
    "free_bytes",
    "join",
    "list_folder",
    "normalize",
    "put_new",
    "read_object",
    "read_ranges",
    "require_writable",
    "sha256",
    "stat",
]
