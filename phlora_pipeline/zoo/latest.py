"""Which version of a model is served: `latest.json`, the one object of a zoo that changes.

It is replaced by compare-and-swap, so that of two runs that end together the later one's version stays, whoever writes
last. It never goes backwards, and never past a pin: while a model is pinned, what is published is only noted, and becomes
the served version when the pin is taken away.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from phlora_pipeline import storage
from phlora_pipeline.errors import ConflictError, NotFoundError, RequestError, SourceChangedError
from phlora_pipeline.storage import ObjectInfo
from phlora_pipeline.zoo import layout
from phlora_pipeline.zoo.state import Ledger


@dataclass(frozen=True, slots=True)
class Head:
    """A published version.

    Attributes:
        version: the adapter's identity.
        request: that it answers; empty where that is not known any more.
        began: when the run that made it began, ISO 8601 in UTC; empty where that is not known.
    """

    version: str
    request: str
    began: str


@dataclass(frozen=True, slots=True)
class Latest:
    """The pointer, as it is stored.

    Attributes:
        version, request, began: of the version that is served; see `Head`.
        pinned: whether it was chosen by `rollback`, and stays whatever is published.
        newest: the version of the run that began last; the one that is served, unless that is pinned.
    """

    version: str
    request: str
    began: str
    pinned: bool = False
    newest: Head | None = None


@dataclass(frozen=True, slots=True)
class Version:
    """A committed version.

    Attributes:
        version: the adapter's identity.
        url: its folder.
        modified: when it was committed, in seconds since the epoch by the store's clock.
        size: of its files, in bytes.
    """

    version: str
    url: str
    modified: float
    size: int


def read(out: str, model: str) -> Latest | None:
    """The pointer; None where nothing is published.

    Raises:
        ConflictError: something else lies in its place.
    """
    return _look(out, model)[1]


def newest(pointer: Latest) -> Head:
    """The version that is served, or that waits behind the pin."""
    return pointer.newest or _head(pointer)


def advance(out: str, model: str, version: str, request: str, began: str) -> Literal["moved", "kept", "pinned"]:
    """Serve a committed version, unless that of a run that began later is served already, or the model is pinned.

    Args:
        out: the zoo's output.
        model: its id.
        version, request: what was committed, and for which request.
        began: when the run that made it began, ISO 8601 in UTC.
    """
    head = Head(version, request, began)

    def moved(seen: Latest | None) -> Latest | None:
        if seen is None:
            return _at(head)
        if layout.moment(began) <= layout.moment(newest(seen).began):
            return seen
        return replace(seen, newest=head) if seen.pinned else _at(head)

    before, after = _change(out, model, moved)
    if after is not None and after.pinned:
        return "pinned"
    return "kept" if before is not None and after is not None and before.version == after.version else "moved"


def rollback(out: str, model: str, version: str) -> Latest:
    """Serve this version, and pin it: what is published from now on is not served until `unpin`.

    Raises:
        RequestError: there is no such committed version.
    """
    there = versions(out, model)
    if version not in {item.version for item in there}:
        told = ", ".join(item.version for item in there) or "none"
        raise RequestError(
            f"{model} has no published version {version!r}; there are: {told}",
            remedy="choose one of these; the last one is the newest",
        )
    named = [item for item in Ledger.read(out).outcomes(model) if item.version == version]
    request = named[-1].request if named else ""

    def pinned(seen: Latest | None) -> Latest:
        last = Head(version, request, "") if seen is None else newest(seen)
        chosen = last if last.version == version else Head(version, request, "")
        return replace(_at(chosen), pinned=True, newest=last)

    after = _change(out, model, pinned)[1]
    assert after is not None
    return after


def unpin(out: str, model: str) -> Latest | None:
    """Serve what was published last, and follow what is published from now on; None where nothing is published."""
    return _change(out, model, lambda seen: _at(newest(seen)) if seen and seen.pinned else seen)[1]


def versions(out: str, model: str) -> list[Version]:
    """The committed versions, the newest last."""
    root = storage.join(out, model)
    files: dict[str, list[ObjectInfo]] = {}
    for info in storage.list_tree(root):
        version, _, name = info.url.removeprefix(f"{root}/").partition("/")
        if layout.is_version(version) and name in layout.PUBLISHED:
            files.setdefault(version, []).append(info)
    found = []
    for version, infos in files.items():
        configs = [info for info in infos if storage.basename(info.url) == layout.CONFIG]
        if configs:
            size = sum(info.size for info in infos)
            found.append(Version(version, storage.join(root, version), configs[0].modified, size))
    return sorted(found, key=lambda item: (item.modified, item.version))


def _change(
    out: str, model: str, decide: Callable[[Latest | None], Latest | None]
) -> tuple[Latest | None, Latest | None]:
    """The pointer before and after. Where somebody else was faster, it is decided anew on what they wrote."""
    while True:
        info, before = _look(out, model)
        after = decide(before)
        if after == before or after is None:
            return before, after
        if storage.swap(_url(out, model), _json(after), info):
            return before, after


def _look(out: str, model: str) -> tuple[ObjectInfo | None, Latest | None]:
    info = storage.stat(_url(out, model))
    while info is not None:
        if info.size > layout.SMALL:
            raise _foreign(info.url)
        try:
            return info, _parsed(storage.read_object(info, limit=layout.SMALL), info.url)
        except (NotFoundError, SourceChangedError):  # swapped since it was looked at
            info = storage.stat(info.url)
    return None, None


def _parsed(data: bytes, url: str) -> Latest:
    try:
        told: dict[str, Any] = json.loads(data)
        newest = told.get("newest")
        found = replace(
            _at(_told_head(told)), pinned=told["pinned"] is True, newest=_told_head(newest) if newest else None
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(url) from error
    return found


def _told_head(told: Mapping[str, Any]) -> Head:
    head = Head(*(str(told[name]) for name in ("version", "request", "began")))
    layout.moment(head.began)
    if not layout.is_version(head.version):
        raise ValueError(head.version)
    return head


def _foreign(url: str) -> ConflictError:
    return ConflictError(
        f"{url} does not name a version: it is damaged, or of another format",
        remedy="remove it, and the model's folder in _state: the next run writes both anew; a rollback has to be made again",
    )


def _at(head: Head) -> Latest:
    return Latest(head.version, head.request, head.began)


def _head(latest: Latest) -> Head:
    return Head(latest.version, latest.request, latest.began)


def _url(out: str, model: str) -> str:
    return storage.join(out, model, layout.LATEST)


def _json(latest: Latest) -> bytes:
    told = {name: value for name, value in asdict(latest).items() if value is not None}
    return (json.dumps(told, indent=2, sort_keys=True) + "\n").encode()
