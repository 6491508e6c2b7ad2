"""What a zoo does not need any more: found, told, and only on request removed.

Nothing that a commit names is ever collected: a version that is served, pinned, or waiting behind a pin; one that some
outcome settles a request with; anything newer than what is served. Age is told by the clock that dates the objects (a
file server's, S3's own `Date`), never by this machine's, and whatever is younger than `min_age_seconds` is somebody's work
in progress. Before anything goes it is looked at once more.

A superseded version goes in an order that a crash may cut anywhere: first the outcomes that name it, so that its request
is due again should it come back; then `adapter_config.json`, so that no loader opens the rest; what remains after a crash
counts as abandoned, and goes the next time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.storage import ObjectInfo, Upload
from phlora_pipeline.zoo import dataset, latest, layout, state
from phlora_pipeline.zoo.latest import Latest
from phlora_pipeline.zoo.state import Ledger

_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Garbage:
    """Something that may go.

    Attributes:
        url: a folder, or the object that an unfinished upload would have become.
        bytes: that it takes.
        reason: in words.
        age: in seconds since it was last written, by the store's clock.
    """

    url: str
    bytes: int
    reason: str
    age: float


@dataclass(frozen=True, slots=True)
class _Found:
    """Garbage, and how it goes: the function tells whether it still was garbage when it came to it."""

    garbage: Garbage
    remove: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Model:
    """What lies in one model's folder: version → its files."""

    name: str
    versions: Mapping[str, tuple[ObjectInfo, ...]]

    def committed(self, version: str) -> ObjectInfo | None:
        return next((info for info in self.versions[version] if storage.basename(info.url) == layout.CONFIG), None)


def collect(
    out: str,
    keep: int,
    *,
    keep_parts: bool = False,
    min_age_seconds: float = 2 * 86400,
    delete: bool = False,
    now: float | None = None,
) -> list[Garbage]:
    """Find what may go; with `delete`, remove it. What is returned may go, or has gone.

    Args:
        out: the zoo's output.
        keep: superseded versions that are left to each model.
        keep_parts: leave the parts that a version was made of as long as the version.
        min_age_seconds: what is younger is left alone.
        delete: remove it.
        now: by the store's clock, in seconds since the epoch; asked for where it is not given.

    Raises:
        ConflictError: a pointer or a record cannot be read, so that what it names is not known; nothing was removed.
    """
    if keep < 0:
        raise RequestError(f"keep must be 0 or more, not {keep}", remedy="set `keep` in zoo.yaml")
    oldest = (storage.clock(out) if now is None else now) - min_age_seconds
    sweep = _Sweep(out, keep, keep_parts, oldest, min_age_seconds)
    found = [*sweep.parts(), *sweep.versions(), *sweep.uploads()]
    return [item.garbage for item in found if not delete or item.remove()]


@dataclass(frozen=True, slots=True)
class _Sweep:
    """One look through an output.

    Attributes:
        out: the zoo's output.
        keep: superseded versions per model.
        keep_parts: whether versions keep the parts that they were made of.
        oldest: what was written after this moment is left alone.
        min_age: the seconds between that and now.
    """

    out: str
    keep: int
    keep_parts: bool
    oldest: float
    min_age: float

    def parts(self) -> Iterator[_Found]:
        """Of extractions that no run has gone on with."""
        root = storage.join(self.out, layout.PARTS)
        found: dict[str, list[ObjectInfo]] = {}
        for info in storage.list_tree(root):
            model, _, rest = info.url.removeprefix(f"{root}/").partition("/")
            extraction, _, part = rest.partition("/")
            if layout.is_model(model) and layout.is_version(extraction) and part and "/" not in part:
                found.setdefault(info.url.rpartition("/")[0], []).append(info)
        kept = self._made_of({url.rsplit("/", 2)[1] for url in found}) if self.keep_parts else set()
        for url, infos in sorted(found.items()):
            if self._is_old(infos) and url not in kept:
                garbage = self._garbage(url, infos, "parts that no run has gone on with")
                yield _Found(garbage, partial(self._remove_parts, url))

    def versions(self) -> Iterator[_Found]:
        """Superseded ones beyond `keep`, and those whose publication was given up."""
        models, tables = _models(self.out), dataset.tables(self.out)
        ledger = Ledger.read(self.out)
        ledger.open(model.name for model in models)
        if ledger.problems:
            raise ConflictError(
                ledger.problems[0], remedy="remove that file, which then counts as never written, and collect again"
            )
        for model in models:
            pointer = latest.read(self.out, model.name)
            named = _served(pointer) | {outcome.version for outcome in ledger.outcomes(model.name)}
            superseded = _superseded(model, pointer, self.keep)
            for version, infos in model.versions.items():
                if version in superseded:
                    reason, remove = f"superseded, and not among the {self.keep} that are kept", self._remove_superseded
                elif version not in named and model.committed(version) is None:
                    reason, remove = "given up before its commit", self._remove_abandoned
                else:
                    continue
                if self._is_old(infos):
                    table = tables.get((model.name, version), [])
                    url = storage.join(self.out, model.name, version)
                    garbage = self._garbage(url, [*infos, *table], reason)
                    yield _Found(garbage, partial(remove, model.name, version, table))

    def uploads(self) -> Iterator[_Found]:
        """Begun, never finished."""
        for upload in storage.uploads(self.out):
            if upload.started <= self.oldest:
                age = self.oldest + self.min_age - upload.started
                garbage = Garbage(upload.url, upload.size, "an upload that was never finished", age)
                yield _Found(garbage, partial(_abort, upload))

    def _made_of(self, models: Iterable[str]) -> set[str]:
        """Folders of parts that the models' committed versions were made of."""
        found = set()
        for model in models:
            for version in latest.versions(self.out, model):
                run = storage.stat(storage.join(version.url, layout.RUN))
                with contextlib.suppress(ValueError, KeyError, TypeError):  # no record of ours: it names nothing
                    told = json.loads(storage.read_object(run, limit=layout.SMALL) if run else b"{}")
                    found.add(storage.join(self.out, layout.PARTS, model, told["extraction_id"]))
        return found

    def _is_old(self, infos: Iterable[ObjectInfo]) -> bool:
        return _youngest(infos) <= self.oldest

    def _garbage(self, url: str, infos: Sequence[ObjectInfo], reason: str) -> Garbage:
        return Garbage(url, sum(info.size for info in infos), reason, self.oldest + self.min_age - _youngest(infos))

    def _remove_parts(self, url: str) -> bool:
        infos = storage.list_folder(url)
        if not self._is_old(infos):  # a run has gone on with them since
            return False
        _delete(info.url for info in infos if not storage.basename(info.url).startswith("."))
        for folder in (url, url.rpartition("/")[0], url.rsplit("/", 2)[0]):
            storage.drop_empty_folder(folder)
        return True

    def _remove_superseded(self, model: str, version: str, table: Sequence[ObjectInfo]) -> bool:
        if version in _served(latest.read(self.out, model)):  # rolled back to since
            return False
        state.forget(self.out, model, version)
        _delete_version(storage.join(self.out, model, version), table)
        return True

    def _remove_abandoned(self, model: str, version: str, table: Sequence[ObjectInfo]) -> bool:
        url = storage.join(self.out, model, version)
        infos = storage.list_folder(url)
        if not self._is_old(infos) or any(storage.basename(info.url) == layout.CONFIG for info in infos):
            return False  # a run publishes it just now, or has
        _delete_version(url, table)
        return True


def _superseded(model: _Model, pointer: Latest | None, keep: int) -> frozenset[str]:
    """Committed versions that were superseded, but for those that are kept: without a pointer there are none."""
    if pointer is None:
        return frozenset()
    dated = {version: config.modified for version in model.versions if (config := model.committed(version))}
    newest = dated.get(latest.newest(pointer).version)
    older = [version for version, at in dated.items() if newest is not None and at <= newest]
    candidates = sorted(set(older) - _served(pointer), key=lambda version: (dated[version], version), reverse=True)
    return frozenset(candidates[keep:])


def _served(pointer: Latest | None) -> set[str]:
    """Versions that a pointer names: the served one, and the one that waits behind a pin."""
    return set() if pointer is None else {pointer.version, latest.newest(pointer).version}


def _models(out: str) -> list[_Model]:
    names = [name for name in map(storage.basename, storage.list_folders(out)) if layout.is_model(name)]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        trees = pool.map(lambda name: _by_folder(storage.join(out, name)), names)
        return [_Model(name, _ours(tree)) for name, tree in zip(names, trees, strict=True)]


def _ours(tree: Mapping[str, Sequence[ObjectInfo]]) -> dict[str, tuple[ObjectInfo, ...]]:
    """Versions and their files. Folders and files of other names are somebody else's, and stay."""
    ours = {
        version: tuple(info for info in infos if storage.basename(info.url) in layout.PUBLISHED)
        for version, infos in tree.items()
        if layout.is_version(version)
    }
    return {version: infos for version, infos in sorted(ours.items()) if infos}


def _by_folder(root: str) -> dict[str, list[ObjectInfo]]:
    """Objects exactly one folder below, by that folder's name."""
    found: dict[str, list[ObjectInfo]] = {}
    for info in storage.list_tree(root):
        folder, _, name = info.url.removeprefix(f"{root}/").partition("/")
        if name and "/" not in name:
            found.setdefault(folder, []).append(info)
    return found


def _youngest(infos: Iterable[ObjectInfo]) -> float:
    return max((info.modified for info in infos), default=0.0)


def _delete_version(url: str, table: Iterable[ObjectInfo]) -> None:
    storage.delete(storage.join(url, layout.CONFIG))
    _delete(info.url for info in table)
    for name in reversed(layout.PUBLISHED[:-1]):
        storage.delete(storage.join(url, name))
    storage.drop_empty_folder(url)


def _delete(urls: Iterable[str]) -> None:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(storage.delete, urls))


def _abort(upload: Upload) -> bool:
    storage.abort_upload(upload)
    return True
