"""Whatever else fsspec knows (gs, az, hf, http, memory …): read-only.

Reads cannot be bound to an ETag through fsspec's common interface, so the object's identity is looked up again after
each read. Creation cannot be made conditional by the common interface either; without that two runs could overwrite
each other, so writing is refused rather than hoped for.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
from collections.abc import Iterator
from typing import Any

import fsspec

from phlora_pipeline.errors import (
    CredentialsError,
    NotFoundError,
    PhloraError,
    RequestError,
    StorageError,
    UnsupportedStoreError,
    one_line,
)
from phlora_pipeline.storage.base import ByteRange, Chunks, ObjectInfo, PutOutcome, Upload
from phlora_pipeline.storage.local import changed

_IDENTITY = (
    "etag",
    "ETag",
    "generation",
    "md5Hash",
    "blob_id",
    "oid",
    "mtime",
    "LastModified",
    "last_modified",
    "Last-Modified",
    "created",
)
_MODIFIED = ("LastModified", "last_modified", "Last-Modified", "updated", "mtime", "created")
_EXTRAS = {"gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure", "hf": "hf"}


class FsspecStore:
    """A read-only view on one fsspec protocol."""

    piece_bytes = 16 << 20

    def __init__(self, protocol: str) -> None:
        self._protocol = protocol
        try:
            self._fs: Any = fsspec.filesystem(protocol, use_listings_cache=False)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            remedy = f"pip install 'phlora-pipeline[{extra}]'" if extra else str(error)
            raise RequestError(f"no client for {protocol}:// is installed", remedy=remedy) from error
        except ValueError as error:
            raise RequestError(
                f"unknown kind of URL: {protocol}://",
                remedy="use a local path, s3://, gs://, az://, hf://, or another fsspec protocol",
            ) from error

    def list_folder(self, url: str) -> list[ObjectInfo]:
        return self._infos(url, self._entries(url))

    def list_folders(self, url: str) -> list[str]:
        names = [entry["name"] for entry in self._entries(url) if entry["type"] == "directory"]
        found = {str(self._fs.unstrip_protocol(name)).rstrip("/") for name in names}
        return sorted(found - {url})

    def list_tree(self, url: str) -> list[ObjectInfo]:
        with self._errors(url):
            entries = list(self._fs.find(self._path(url), detail=True).values())
        return self._infos(url, entries)

    def stat(self, url: str) -> ObjectInfo | None:
        with self._errors(url):
            try:
                entry = self._fs.info(self._path(url))
            except FileNotFoundError:
                return None
        return self._info(entry) if entry["type"] == "file" else None

    def read_into(self, piece: ByteRange) -> None:
        stop = piece.start + len(piece.into)
        with self._errors(piece.url):
            # By name: the second positional argument of some file systems' cat_file is a version, not an offset.
            data = self._fs.cat_file(self._path(piece.url), start=piece.start, end=stop)
        if len(data) != len(piece.into):
            raise changed(piece.url, f"{len(piece.into)} bytes at {piece.start}", f"{len(data)} bytes")
        if piece.etag:
            seen = self.stat(piece.url)
            if seen is None or seen.etag != piece.etag:
                raise changed(piece.url, piece.etag, seen.etag if seen else "nothing")
        piece.into[:] = data

    def put_new(self, url: str, chunks: Chunks, size: int, *, in_parts: bool = False) -> PutOutcome:
        raise self._read_only(url)

    def swap(self, url: str, data: bytes, expected: ObjectInfo | None) -> bool:
        raise self._read_only(url)

    def uploads(self, url: str) -> list[Upload]:
        raise self._read_only(url)

    def abort_upload(self, upload: Upload) -> None:
        raise self._read_only(upload.url)

    def clock(self, url: str) -> float:
        raise self._read_only(url)

    def delete(self, url: str) -> None:
        raise self._read_only(url)

    def drop_empty_folder(self, url: str) -> None:
        raise self._read_only(url)

    def identity(self, url: str) -> str:
        return ""

    def require_writable(self, url: str) -> None:
        raise self._read_only(url)

    def free_bytes(self, url: str) -> int | None:
        return None

    def _entries(self, url: str) -> list[dict[str, Any]]:
        with self._errors(url):
            try:
                return list(self._fs.ls(self._path(url), detail=True))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def _infos(self, url: str, entries: list[dict[str, Any]]) -> list[ObjectInfo]:
        with self._errors(url):
            # A web server's listing has names only.
            files = [
                entry if entry.get("size") is not None else self._fs.info(entry["name"])
                for entry in entries
                if entry["type"] == "file"
            ]
        found = [self._info(entry) for entry in files]
        return sorted((info for info in found if info.url != url), key=lambda info: info.url)

    def _path(self, url: str) -> str:
        return str(self._fs._strip_protocol(url))  # noqa: SLF001  # fsspec's own name for its public service

    def _info(self, entry: dict[str, Any]) -> ObjectInfo:
        found = next((entry[key] for key in _IDENTITY if entry.get(key)), "")
        # The same moment is a number in one store's listing, and a datetime in its stat.
        identity = found.timestamp() if isinstance(found, dt.datetime) else found
        modified = next((entry[key] for key in _MODIFIED if entry.get(key)), None)
        return ObjectInfo(
            self._fs.unstrip_protocol(entry["name"]),
            int(entry["size"] or 0),
            f"{entry['size']}-{identity}",
            _seconds(modified),
        )

    def _read_only(self, url: str) -> PhloraError:
        return UnsupportedStoreError(
            f"{url}: {self._protocol}:// can be read but not written: create-only writes cannot be guaranteed there",
            remedy="write to a local folder or to s3://",
        )

    @contextlib.contextmanager
    def _errors(self, url: str) -> Iterator[None]:
        try:
            yield
        except PhloraError:
            raise
        except PermissionError as error:
            raise CredentialsError(
                f"{url}: access denied: {one_line(error)}", remedy="check the credentials of this store"
            ) from error
        except FileNotFoundError as error:
            raise NotFoundError(
                f"{url} is not there", remedy="see whether it was moved or removed, and run again"
            ) from error
        except Exception as error:  # every fsspec file system raises its own client's errors
            raise StorageError(f"{url}: {type(error).__name__}: {one_line(error)}") from error


def _seconds(moment: object) -> float:
    """Since the epoch, of a moment in whatever form a client tells it; 0 where it is in none that is known."""
    if isinstance(moment, dt.datetime):
        return moment.timestamp()
    if isinstance(moment, int | float):
        return float(moment)
    for parse in (dt.datetime.fromisoformat, email.utils.parsedate_to_datetime):
        with contextlib.suppress(ValueError, TypeError):
            return parse(str(moment)).timestamp()
    return 0.0
