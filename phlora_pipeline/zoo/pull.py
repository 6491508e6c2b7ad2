"""Published adapters onto a disk, one folder each, as servers' resolvers want them.

`<to>/<model>` is a link to `<to>/.versions/<model>/<version>`. A version is fetched aside, compared with the digest that
its `run.json` promises, renamed into place whole, and only then linked, by a rename: a server sees the old adapter or the
new one. The version that was served before stays until the next one comes, for whoever has just opened it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

from phlora_pipeline import storage
from phlora_pipeline.errors import (
    ConflictError,
    CredentialsError,
    NotFoundError,
    PhloraError,
    RequestError,
    SourceChangedError,
    StorageError,
    VerificationError,
)
from phlora_pipeline.storage import ByteRange, ObjectInfo
from phlora_pipeline.zoo import latest, layout

_VERSIONS = ".versions"
_PIECE = 16 << 20
_AT_ONCE = 8
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{12}\.tmp")


@dataclass(frozen=True, slots=True)
class Pulled:
    """What became of one model.

    Attributes:
        model: its id.
        version: that is there now; of a failure, the one that should be.
        path: where a server finds it.
        outcome: `pulled`; `unchanged`: it was there; `gone`: the zoo does not publish it any more, the folder is left alone;
            `failed`: what was there before still is.
        fetched: bytes.
        reason: of a failure, in words.
    """

    model: str
    version: str
    path: str
    outcome: Literal["pulled", "unchanged", "gone", "failed"]
    fetched: int = 0
    reason: str = ""


def pull(out: str, to: str, models: Sequence[str] = (), *, version: Mapping[str, str] | None = None) -> list[Pulled]:
    """Bring a folder up to date with what a zoo publishes; tells of each model, by name.

    Args:
        out: the zoo's output.
        to: a local folder.
        models: ids of those that are wanted; none: all that are published.
        version: model → version, where it is not the latest that is wanted.

    Raises:
        RequestError: `to` is no local folder, or a model or version that was asked for by name is not published.
        CredentialsError, StorageError: nothing more can be fetched; what is linked by then is whole.
    """
    folder = storage.normalize(to)
    if "://" in folder:
        raise RequestError(f"adapters are pulled into a local folder, not to {to}", remedy="give a local path")
    wanted = _wanted(out, models, version or {})
    storage.require_writable(folder)
    with _local_errors(folder), _alone(folder), ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(_pull, out, folder, model, chosen) for model, chosen in sorted(wanted.items())]
        try:
            pulled = [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()
    gone = [] if models else [_gone(folder, model) for model in _linked(folder) if model not in wanted]
    return sorted([*pulled, *gone], key=lambda item: item.model)


def _wanted(out: str, models: Sequence[str], version: Mapping[str, str]) -> dict[str, str | PhloraError]:
    """Model → version, or why that cannot be told."""
    there = [name for name in map(storage.basename, storage.list_folders(out)) if layout.is_model(name)]
    named = sorted({*models, *version})
    asked = [name for name in there if name in named] if models else there
    with ThreadPoolExecutor(2 * _AT_ONCE) as pool:
        served = dict(zip(asked, pool.map(lambda model: _served(out, model), asked), strict=True))
    wanted = {model: chosen for model, chosen in served.items() if chosen is not None}
    for model, chosen in version.items():
        committed = [item.version for item in latest.versions(out, model)] if model in there else []
        if chosen not in committed:
            raise RequestError(
                f"{model} has no published version {chosen!r}; there are: {', '.join(committed) or 'none'}",
                remedy="choose one of these",
            )
        wanted[model] = chosen
    if unknown := [model for model in named if model not in wanted]:
        raise RequestError(
            f"{out} publishes no adapter of {', '.join(unknown)}",
            remedy=f"choose among: {', '.join(sorted(set(there) - set(unknown))[:20]) or 'none is published yet'}",
        )
    return wanted


def _served(out: str, model: str) -> str | PhloraError | None:
    try:
        pointer = latest.read(out, model)
    except ConflictError as error:  # one damaged pointer must not keep the others' adapters away
        return error
    return pointer.version if pointer else None


def _pull(out: str, to: str, model: str, chosen: str | PhloraError) -> Pulled:
    path = os.path.join(to, model)
    if isinstance(chosen, PhloraError):
        return Pulled(model, "", path, "failed", reason=str(chosen))
    version = chosen
    while True:
        try:
            return _pull_version(out, to, model, version)
        except (CredentialsError, StorageError):
            raise
        except (NotFoundError, SourceChangedError) as error:
            # Superseded and collected while it was fetched? Then there is another one to fetch.
            pointed = _served(out, model)
            if not isinstance(pointed, str) or pointed == version:
                return Pulled(model, version, path, "failed", reason=str(error))
            version = pointed
        except PhloraError as error:
            return Pulled(model, version, path, "failed", reason=str(error))


def _pull_version(out: str, to: str, model: str, version: str) -> Pulled:
    path, folder = os.path.join(to, model), os.path.join(to, _VERSIONS, model)
    if os.path.lexists(path) and not os.path.islink(path):
        raise ConflictError(f"{path} is there, and was not pulled", remedy="move it away, or pull into another folder")
    source = storage.join(out, model, version)
    files = {storage.basename(info.url): info for info in storage.list_folder(source)}
    missing = [name for name in layout.PUBLISHED if name not in files]
    if missing:
        raise NotFoundError(f"{source} is not whole: there is no {missing[0]}", remedy="see `phlora status`")
    run = storage.read_object(files[layout.RUN], limit=layout.SMALL)
    before = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    if before.partition(".")[0] == version and _whole(os.path.join(folder, before), files, run):
        _clean(folder, before, "")
        return Pulled(model, version, path, "unchanged")
    name, fetched = version, 0
    if not _whole(os.path.join(folder, name), files, run):
        if os.path.lexists(os.path.join(folder, name)):
            name = f"{version}.{secrets.token_hex(4)}"  # a damaged one may be what is linked: it goes last
        fetched = _fetch(files, run, os.path.join(folder, name))
    _link(os.path.join(_VERSIONS, model, name), path)
    _clean(folder, name, before)
    return Pulled(model, version, path, "pulled", fetched)


def _whole(folder: str, files: Mapping[str, ObjectInfo], run: bytes) -> bool:
    """Every file with its size, and the same `run.json`, which names the weights by their digest."""
    there = {storage.basename(info.url): info for info in storage.list_folder(folder)}
    sizes = all(name in there and there[name].size == files[name].size for name in layout.PUBLISHED)
    return sizes and storage.read_object(there[layout.RUN], limit=len(run)) == run


def _fetch(files: Mapping[str, ObjectInfo], run: bytes, target: str) -> int:
    """Fetch a version aside, check its weights, and put it into place whole."""
    aside = os.path.join(os.path.dirname(target), f".{secrets.token_hex(6)}.tmp")
    try:
        for name in layout.PUBLISHED:
            digest = hashlib.sha256()
            body = partial(_chunks, files[name], digest)
            storage.put_new(os.path.join(aside, name), body, size=files[name].size)
            if name == layout.WEIGHTS and (told := _promised(run)) != digest.hexdigest():
                raise VerificationError(
                    f"{files[name].url} has sha256 {digest.hexdigest()}; its {layout.RUN} promises {told}",
                    remedy="the published file is damaged: have the model extracted again",
                )
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    _sync(os.path.dirname(target))
    return sum(files[name].size for name in layout.PUBLISHED)


def _chunks(info: ObjectInfo, digest: hashlib._Hash) -> Iterator[bytes]:
    for start in range(0, info.size, _PIECE):
        piece = bytearray(min(_PIECE, info.size - start))
        storage.read_ranges([ByteRange(info.url, info.etag, start, memoryview(piece))])
        digest.update(piece)
        yield bytes(piece)


def _promised(run: bytes) -> str:
    try:
        return str(json.loads(run)["weights"]["sha256"])
    except (ValueError, KeyError, TypeError):
        return "nothing"


def _link(target: str, path: str) -> None:
    folder, name = os.path.split(path)
    aside = os.path.join(folder, f".{name}.{secrets.token_hex(6)}.tmp")
    os.symlink(target, aside)  # relative: the whole folder may be mounted elsewhere
    os.replace(aside, path)
    _sync(folder)


def _clean(folder: str, linked: str, before: str) -> None:
    """Leave what is linked and what was before it, or, where that is not known, the youngest; the rest is of killed pulls."""
    others = {entry.name: entry.stat().st_mtime for entry in os.scandir(folder) if entry.name != linked}
    whole = [name for name in others if not name.startswith(".")]
    previous = before if before in whole else max(whole, key=lambda name: others[name], default="")
    for name in others.keys() - {previous}:
        aside = os.path.join(folder, f".{secrets.token_hex(6)}.tmp")  # half a version must not pass for one
        os.rename(os.path.join(folder, name), aside)
        shutil.rmtree(aside, ignore_errors=True)


def _linked(to: str) -> list[str]:
    """Models that have been pulled into the folder."""
    return [
        entry.name
        for entry in os.scandir(to)
        if entry.is_symlink() and os.readlink(entry.path).startswith(f"{_VERSIONS}/{entry.name}/")
    ]


def _gone(to: str, model: str) -> Pulled:
    path = os.path.join(to, model)
    return Pulled(model, os.path.basename(os.readlink(path)).partition(".")[0], path, "gone")


@contextlib.contextmanager
def _alone(to: str) -> Iterator[None]:
    """One pull at a time into one folder: the kernel gives the lock back, however a pull ends."""
    os.makedirs(os.path.join(to, _VERSIONS), exist_ok=True)
    with open(os.path.join(to, _VERSIONS, ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for entry in os.scandir(to):
            if entry.is_symlink() and _LEFT_OVER.fullmatch(entry.name):
                os.unlink(entry.path)
        yield


@contextlib.contextmanager
def _local_errors(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"cannot pull into {folder}: {error.strerror or error}: {error.filename or ''}",
            remedy="see to the disk's space and the folder's owner and mode, then pull again",
        ) from error


def _sync(folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
