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
        modified: when it was last written, in seconds since the epoch by the store's clock; 0 where it does not tell. Says
            nothing of the content, and so takes no part in comparisons.
    """

    url: str
    size: int
    etag: str
    modified: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Upload:
    """A write that was begun, and neither finished nor given up: invisible to readers, but it takes space.

    Attributes:
        url: of the object that it would have become.
        id: what the store calls it: S3's upload id; of a local file the temporary file's name.
        started: when it began, in seconds since the epoch by the store's clock (locally: when it last grew).
        size: bytes that are stored by now.
    """

    url: str
    id: str
    started: float
    size: int


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

    def list_folders(self, url: str) -> list[str]:
        """URLs of the folders directly in a folder, by name."""

    def list_tree(self, url: str) -> list[ObjectInfo]:
        """Objects in a folder and in all folders below it, by URL."""

    def stat(self, url: str) -> ObjectInfo | None:
        """One object, or None where there is none."""

    def read_into(self, piece: ByteRange) -> None:
        """Fill `piece.into`, or raise: `SourceChangedError` where the content is not the planned one."""

    def put_new(self, url: str, chunks: Chunks, size: int, *, in_parts: bool = False) -> PutOutcome:
        """Create the object whole, only if there is none; `in_parts`: as a large one is, whatever its size."""

    def swap(self, url: str, data: bytes, expected: ObjectInfo | None) -> bool:
        """Replace a small object whole, only if it still is `expected`, or create it, only if there is none."""

    def delete(self, url: str) -> None:
        """Remove the object; no error where there is none."""

    def drop_empty_folder(self, url: str) -> None:
        """Remove a folder that holds nothing any more; stores without folders have nothing to do."""

    def uploads(self, url: str) -> list[Upload]:
        """Writes below a folder that nobody has finished."""

    def abort_upload(self, upload: Upload) -> None:
        """Give such a write up; no error where it is finished or gone by now."""

    def clock(self, url: str) -> float:
        """What time it is by the clock that dates the objects, in seconds since the epoch."""

    def identity(self, url: str) -> str:
        """In whose name requests are made, and how that was found out; empty where nobody is asked."""

    def require_writable(self, url: str) -> None:
        """Raise where a write under `url` is known to be impossible, as far as can be told without writing."""

    def free_bytes(self, url: str) -> int | None:
        """Free space at `url`, or None where the store has no end."""
