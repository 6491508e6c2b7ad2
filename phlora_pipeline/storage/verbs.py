"""The verbs: each finds the store of a URL and does one thing with it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

from phlora_pipeline.errors import NotFoundError
from phlora_pipeline.storage import traffic
from phlora_pipeline.storage.base import ByteRange, Chunks, ObjectInfo, PutOutcome, Store, Upload
from phlora_pipeline.storage.urls import scheme

READ_THREADS = 16
"""Parallel ranged reads per process. One connection to S3 gives about 60 MB/s; sixteen were fourteen times one."""


@cache
def _store(kind: str) -> Store:
    # Imported late: a run on two local folders should not pay for an S3 client.
    if kind == "file":
        from phlora_pipeline.storage.local import LocalStore

        return LocalStore()
    if kind in {"s3", "s3a"}:
        from phlora_pipeline.storage.s3 import S3Store

        return S3Store()
    from phlora_pipeline.storage.generic import FsspecStore

    return FsspecStore(kind)


@cache
def _readers(process: int) -> ThreadPoolExecutor:
    # Keyed by process: threads do not survive a fork.
    return ThreadPoolExecutor(READ_THREADS, thread_name_prefix=f"phlora-read-{process}")


def _store_of(url: str) -> Store:
    return _store(scheme(url))


def list_folder(url: str) -> list[ObjectInfo]:
    """Objects directly in a folder, by name; empty where there is no such folder."""
    return _store_of(url).list_folder(url)


def list_folders(url: str) -> list[str]:
    """URLs of the folders directly in a folder, by name; empty where there is no such folder."""
    return _store_of(url).list_folders(url)


def list_tree(url: str) -> list[ObjectInfo]:
    """Objects in a folder and in all folders below it, by URL; locally, links to folders are not followed."""
    return _store_of(url).list_tree(url)


def stat(url: str) -> ObjectInfo | None:
    """One object, or None where there is none."""
    return _store_of(url).stat(url)


def read_ranges(ranges: Sequence[ByteRange]) -> None:
    """Fill every range's memory, in parallel.

    Raises:
        SourceChangedError: an object is not the one that was planned.
        NotFoundError, CredentialsError, StorageError: as the store says.
    """
    pieces = [
        (store, piece)
        for wanted in ranges
        for store in [_store_of(wanted.url)]
        for piece in _cut(wanted, store.piece_bytes)
    ]
    if len(pieces) == 1:
        store, piece = pieces[0]
        store.read_into(piece)
        traffic.moved("read", len(piece.into))
        return
    futures = [_readers(os.getpid()).submit(store.read_into, piece) for store, piece in pieces]
    try:
        for future, (_, piece) in zip(futures, pieces, strict=True):
            future.result()
            traffic.moved("read", len(piece.into))
    finally:
        # On the first error the rest must neither start nor go on writing into memory that the caller gives up.
        for future in futures:
            if not future.cancel():
                future.exception()


def _cut(wanted: ByteRange, piece_bytes: int) -> Iterator[ByteRange]:
    for offset in range(0, len(wanted.into), piece_bytes):
        yield ByteRange(wanted.url, wanted.etag, wanted.start + offset, wanted.into[offset : offset + piece_bytes])


def read_object(info: ObjectInfo, *, limit: int) -> bytes:
    """A small object, whole.

    Raises:
        NotFoundError: it is larger than `limit` bytes, so it is not what it should be.
    """
    if info.size > limit:
        raise NotFoundError(
            f"{info.url} has {info.size} bytes; at most {limit} were expected of a file of this kind",
            remedy="see whether it is the right file, or download it again",
        )
    data = bytearray(info.size)
    if data:
        read_ranges([ByteRange(info.url, info.etag, 0, memoryview(data))])
    return bytes(data)


def sha256(info: ObjectInfo) -> str:
    """Digest (hex) of an object's bytes, read in pieces."""
    digest = hashlib.sha256()
    buffer = bytearray(min(info.size, 16 << 20))
    for start in range(0, info.size, len(buffer) or 1):
        piece = memoryview(buffer)[: min(len(buffer), info.size - start)]
        read_ranges([ByteRange(info.url, info.etag, start, piece)])
        digest.update(piece)
    return digest.hexdigest()


def put_new(url: str, body: bytes | Chunks, *, size: int | None = None, in_parts: bool = False) -> PutOutcome:
    """Create an object whole, only if there is none; the answer tells what stands there now.

    A lost response is no failure: where the object turns out to be there, it is read back and compared.

    Args:
        url: the object.
        body: its bytes, or what produces them.
        size: of what is produced.
        in_parts: as a large object is, in several requests, whatever its size: to try whether the store does that.
    """
    if isinstance(body, bytes):
        data = body
        return put_new(url, lambda: iter([data]), size=len(data), in_parts=in_parts)
    assert size is not None, "a streamed body needs its size"
    outcome = _store_of(url).put_new(url, body, size, in_parts=in_parts)
    traffic.moved("written", size if outcome == "created" else 0)
    return outcome


def swap(url: str, data: bytes, expected: ObjectInfo | None) -> bool:
    """Compare and swap: replace a small object whole, only if it still is `expected` (None: only if there is none).

    True means that this call has put `data`; somebody may have replaced it since. A lost answer is no lost race: what is
    there is read back and compared, so two callers who put equal bytes over a broken connection may both be told True.
    """
    swapped = _store_of(url).swap(url, data, expected)
    traffic.moved("written", len(data) if swapped else 0)
    return swapped


def uploads(url: str) -> list[Upload]:
    """Writes below a folder that nobody has finished: of running writers, and of those that were killed."""
    return _store_of(url).uploads(url)


def abort_upload(upload: Upload) -> None:
    """Give such a write up; no error where it is finished or gone by now."""
    _store_of(upload.url).abort_upload(upload)


def clock(url: str) -> float:
    """What time it is by the clock that dates the objects of a store: what an age is measured by."""
    return _store_of(url).clock(url)


def delete(url: str) -> None:
    """Remove an object; no error where there is none."""
    _store_of(url).delete(url)


def drop_empty_folder(url: str) -> None:
    """Remove a folder that holds nothing any more; stores without folders have nothing to do."""
    _store_of(url).drop_empty_folder(url)


def identity(url: str) -> str:
    """In whose name requests to a store are made, and how that was found out; empty where nobody is asked."""
    return _store_of(url).identity(url)


def require_writable(url: str) -> None:
    """Raise where a write under `url` is known to be impossible, as far as can be told without writing."""
    _store_of(url).require_writable(url)


def free_bytes(url: str) -> int | None:
    """Free space at `url` in bytes, or None where the store has no end."""
    return _store_of(url).free_bytes(url)
