"""The words of storage: what an object is, what a range of it is, what a store can do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, Protocol

Chunks = Callable[[], Iterator[bytes]]
"""A body that can be produced again: a retried upload, or a comparison, starts it anew."""

PutOutcome = Literal["created", "same", "different"]
"""`created`: it was not there, now it is. `same`, `different`: it was there, with these or with other bytes."""


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object as it was seen.

    Attributes:
        url: absolute, in the form that the store takes back.
        size: in bytes.
        etag: names the content, in the store's own terms: S3's ETag; for a local file size, mtime and inode.
    """

    url: str
    size: int
    etag: str


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes `[start, start + len(into))` of an object, and where they go.

    Attributes:
        url: the object.
        etag: the content that was planned; empty where any will do.
        start: first byte, from the object's beginning.
        into: writable memory of the length that is wanted.
    """

    url: str
    etag: str
    start: int
    into: memoryview = field(repr=False)


class Store(Protocol):
    """What one kind of storage must be able to do. URLs are absolute and normalised."""

    piece_bytes: int
    """Largest piece that one request should ask for: ranges are cut to it, and the pieces read in parallel."""

    def list_folder(self, url: str) -> list[ObjectInfo]:
        """Objects directly in a folder, by name; empty where there is no such folder."""

    def stat(self, url: str) -> ObjectInfo | None:
        """One object, or None where there is none."""

    def read_into(self, piece: ByteRange) -> None:
        """Fill `piece.into`, or raise: `SourceChangedError` where the content is not the planned one."""

    def put_new(self, url: str, chunks: Chunks, size: int) -> PutOutcome:
        """Create the object whole, only if there is none."""

    def delete(self, url: str) -> None:
        """Remove the object; no error where there is none."""

    def drop_empty_folder(self, url: str) -> None:
        """Remove a folder that holds nothing any more; stores without folders have nothing to do."""

    def require_writable(self, url: str) -> None:
        """Raise where a write under `url` is known to be impossible, as far as can be told without writing."""

    def free_bytes(self, url: str) -> int | None:
        """Free space at `url`, or None where the store has no end."""
