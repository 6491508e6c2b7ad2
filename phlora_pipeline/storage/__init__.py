"""Object storage as the pipeline needs it: list, ranged reads bound to what was planned, create-only writes.

An object store is not a file system, and this module does not pretend otherwise. There is no `open`: an exception
inside `open("wb")` would publish half an object, and a buffered reader would mix an object with its replacement. What
there is instead:

- `list_folder`, `list_folders`, `list_tree`, `stat`: what lies where, with an `etag` that names the content;
- `read_ranges`: bytes of planned objects into the caller's memory; a replaced object raises `SourceChangedError`;
- `put_new`: an object appears whole, or not at all, and never over another one;
- `swap`: the few pointers that change are replaced whole, and only by who has seen what stands there;
- `uploads`, `clock`: what killed writers left behind, and how old it is.

Three stores implement this: local files, S3 (by boto3, with s3fs's settings), and, for reading, whatever fsspec knows. This package is the only home of fsspec, s3fs and boto3.
"""

from phlora_pipeline.storage.base import ByteRange, ObjectInfo, PutOutcome, Store, Upload
from phlora_pipeline.storage.traffic import Traffic, take_traffic
from phlora_pipeline.storage.urls import basename, join, normalize
from phlora_pipeline.storage.verbs import (
    abort_upload,
    clock,
    delete,
    drop_empty_folder,
    free_bytes,
    identity,
    list_folder,
    list_folders,
    list_tree,
    put_new,
    read_object,
    read_ranges,
    require_writable,
    sha256,
    stat,
    swap,
    uploads,
)

__all__ = [
    "ByteRange",
    "ObjectInfo",
    "PutOutcome",
    "Store",
    "Traffic",
    "Upload",
    "abort_upload",
    "basename",
    "clock",
    "delete",
    "drop_empty_folder",
    "free_bytes",
    "identity",
    "join",
    "list_folder",
    "list_folders",
    "list_tree",
    "normalize",
    "put_new",
    "read_object",
    "read_ranges",
    "require_writable",
    "sha256",
    "stat",
    "swap",
    "take_traffic",
    "uploads",
]
