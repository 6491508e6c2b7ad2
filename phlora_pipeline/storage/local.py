"""Local files: identity by size, mtime and inode; creation by a temporary file, fsync and a hard link; swaps by a lock."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator

from phlora_pipeline.errors import NotFoundError, PhloraError, RequestError, SourceChangedError, StorageError
from phlora_pipeline.storage.base import ByteRange, Chunks, ObjectInfo, PutOutcome, Upload

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{12}\.tmp")


class LocalStore:
    """Files of this machine, or of a file system that all workers share."""

    piece_bytes = 64 << 20

    def list_folder(self, url: str) -> list[ObjectInfo]:
        with _errors(url):
            try:
                entries = sorted(os.scandir(url), key=lambda entry: entry.name)
            except (FileNotFoundError, NotADirectoryError):
                return []
            found = []
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):  # another writer's temporary file is gone by now
                    if entry.is_file():
                        found.append(_info(entry.path, entry.stat()))
            return found

    def list_folders(self, url: str) -> list[str]:
        with _errors(url):
            try:
                return sorted(entry.path for entry in os.scandir(url) if os.path.isdir(entry.path))
            except (FileNotFoundError, NotADirectoryError):
                return []

    def list_tree(self, url: str) -> list[ObjectInfo]:
        found = []
        with _errors(url):
            for folder, _, names in os.walk(url, onerror=_raise_unless_gone):
                for name in names:
                    path = os.path.join(folder, name)
                    if os.path.isfile(path):
                        with contextlib.suppress(FileNotFoundError):
                            found.append(_info(path, os.stat(path)))
        return sorted(found, key=lambda info: info.url)

    def stat(self, url: str) -> ObjectInfo | None:
        with _errors(url):
            try:
                found = os.stat(url)
            except (FileNotFoundError, NotADirectoryError):
                return None
            return _info(url, found) if os.path.isfile(url) else None

    def read_into(self, piece: ByteRange) -> None:
        with _errors(piece.url):
            descriptor = os.open(piece.url, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _read_fully(descriptor, piece)
                # After the read: whatever was written in place meanwhile has moved the mtime.
                seen = _etag(os.fstat(descriptor))
            finally:
                os.close(descriptor)
        if piece.etag and seen != piece.etag:
            raise changed(piece.url, piece.etag, seen)

    def put_new(self, url: str, chunks: Chunks, size: int, *, in_parts: bool = False) -> PutOutcome:
        folder, temporary = os.path.dirname(url), _temporary(url)
        with _errors(url):
            os.makedirs(folder, exist_ok=True)
            try:
                _write_durably(temporary, chunks)
                os.link(temporary, url)
            except FileExistsError:
                return "same" if _equal(url, chunks, size) else "different"
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(temporary)
            _sync_folder(folder)
        return "created"

    def swap(self, url: str, data: bytes, expected: ObjectInfo | None) -> bool:
        if expected is None:
            return self.put_new(url, lambda: iter([data]), len(data)) == "created"
        if (seen := self.stat(url)) is None or seen.etag != expected.etag:
            return False
        folder, name = os.path.split(url)
        with _errors(url), _locked(os.path.join(folder, f".{name}.lock")):
            return _replace(url, data, expected.etag)

    def uploads(self, url: str) -> list[Upload]:
        found = []
        for info in self.list_tree(url):
            folder, name = os.path.split(info.url)
            if target := _TEMPORARY.fullmatch(name):
                found.append(Upload(os.path.join(folder, target[1]), name, info.modified, info.size))
        return found

    def abort_upload(self, upload: Upload) -> None:
        assert _TEMPORARY.fullmatch(upload.id), f"not a temporary file's name: {upload.id!r}"
        self.delete(os.path.join(os.path.dirname(upload.url), upload.id))

    def clock(self, url: str) -> float:
        # A file server dates files by its own clock; where nothing may be written, this machine's has to do.
        try:
            with tempfile.TemporaryFile(dir=_existing_parent(url)) as probe:
                probe.write(b"?")
                probe.flush()
                return os.fstat(probe.fileno()).st_mtime
        except OSError:
            return time.time()

    def delete(self, url: str) -> None:
        with _errors(url), contextlib.suppress(FileNotFoundError):
            os.unlink(url)

    def drop_empty_folder(self, url: str) -> None:
        # Not there, or not empty: both are fine.
        with contextlib.suppress(OSError):
            os.rmdir(url)

    def identity(self, url: str) -> str:
        return ""

    def require_writable(self, url: str) -> None:
        existing = _existing_parent(url)
        if not os.path.isdir(existing):
            raise RequestError(f"{existing} is a file, not a folder", remedy="choose another output folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise RequestError(
                f"no permission to write in {existing}",
                remedy="choose another output folder, or change its owner or mode",
            )

    def free_bytes(self, url: str) -> int | None:
        return shutil.disk_usage(_existing_parent(url)).free


def changed(url: str, planned: str, seen: str) -> SourceChangedError:
    """The error of every store for an object that was replaced since it was planned."""
    return SourceChangedError(
        f"{url} is no longer what was planned: expected {planned!r}, found {seen!r}",
        remedy="run again once its upload is complete",
    )


def _etag(found: os.stat_result) -> str:
    return f"{found.st_size}-{found.st_mtime_ns}-{found.st_ino}"


def _info(path: str, found: os.stat_result) -> ObjectInfo:
    return ObjectInfo(path, found.st_size, _etag(found), found.st_mtime)


def _temporary(path: str) -> str:
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")


def _raise_unless_gone(error: OSError) -> None:
    """What vanishes during a walk is not there; what cannot be looked into must not count as empty."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


@contextlib.contextmanager
def _locked(path: str) -> Iterator[None]:
    """Hold a lock file, and leave none behind. Who gets the lock of a file that was removed meanwhile holds nothing."""
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_at(path, descriptor):
                continue
            try:
                yield
            finally:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            return
        finally:
            os.close(descriptor)


def _is_at(path: str, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _replace(url: str, data: bytes, etag: str) -> bool:
    temporary = _temporary(url)
    try:
        seen = os.stat(url)
        if _etag(seen) != etag:
            return False
        _write_durably(temporary, lambda: iter([data]))
        # File systems use inodes again and clocks tick in milliseconds: unless each version is younger than the one before
        # it, the next but one could pass for the one that somebody has seen.
        if os.stat(temporary).st_mtime_ns <= seen.st_mtime_ns:
            os.utime(temporary, ns=(seen.st_mtime_ns + 1, seen.st_mtime_ns + 1))
        os.replace(temporary, url)
    except FileNotFoundError:
        return False
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    _sync_folder(os.path.dirname(url))
    return True


def _existing_parent(path: str) -> str:
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


def _read_fully(descriptor: int, piece: ByteRange) -> None:
    done = 0
    while done < len(piece.into):
        count = os.preadv(descriptor, [piece.into[done:]], piece.start + done)
        if count == 0:
            raise changed(piece.url, f"at least {piece.start + len(piece.into)} bytes", f"{piece.start + done} bytes")
        done += count


def _write_durably(path: str, chunks: Chunks) -> None:
    with open(path, "xb") as file:
        file.writelines(chunks())
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _equal(path: str, chunks: Chunks, size: int) -> bool:
    if os.stat(path).st_size != size:
        return False
    with open(path, "rb") as file:
        return all(file.read(len(chunk)) == chunk for chunk in chunks())


@contextlib.contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turn the operating system's errors into ours, once, at the border."""
    try:
        yield
    except PhloraError:
        raise
    except FileNotFoundError as error:
        raise NotFoundError(
            f"{url} is not there", remedy="see whether it was moved or removed, and run again"
        ) from error
    except PermissionError as error:
        raise RequestError(
            f"no permission: {error.strerror}: {url}", remedy="check the owner and mode of the path"
        ) from error
    except OSError as error:
        if error.errno in {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS}:
            raise RequestError(f"{url} cannot be used: {error.strerror}", remedy="choose another path") from error
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise StorageError(
                f"no space left on the device while writing {url}",
                remedy="free some space, then run again: finished parts are kept",
            ) from error
        raise StorageError(f"{url}: {error.strerror or error}") from error
