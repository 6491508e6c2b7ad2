"""The merged checkpoint's folder: the order in which its files are put is the commit, and what stands there is the state.

`merge.json` comes first: it says which merge this is and how large each of its files will be, so that the same command
goes on where it was interrupted. Then the index, before any shard: whoever finds it finds shards missing, and takes no
single shard for a checkpoint. Then what lies beside the weights, then the shards, and `config.json` last of all, without which
transformers and the servers open no folder, however many shards they find.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.checkpoint import INDEX
from phlora_pipeline.errors import ConflictError, PhloraError, RequestError
from phlora_pipeline.merge.source import CONFIG

RECORD = "merge.json"
_SMALL = 64 << 20


@dataclass(frozen=True, slots=True)
class File:
    """A file to be put.

    Attributes:
        name: in the folder, or below it.
        size: in bytes.
        body: produces them.
        weights: whether it is a shard.
    """

    name: str
    size: int
    body: Callable[[], Iterator[bytes]]
    weights: bool = False


def in_order(files: Iterable[File]) -> list[File]:
    """As they are put."""
    places = {RECORD: 0, INDEX: 1, CONFIG: 4}

    def order(file: File) -> tuple[int, str]:
        return places.get(file.name, 3 if file.weights else 2), file.name

    return sorted(files, key=order)


def standing(out: str, version: str, sizes: Mapping[str, int], *, overwrite: bool) -> frozenset[str]:
    """Names of the files of this very merge that stand in `out` already; none where nothing does, or all of it may go.

    Args:
        out: the output folder.
        version: of the merge.
        sizes: of its files.
        overwrite: whether another merge may be replaced.

    Raises:
        ConflictError: something else stands there.
    """
    there = {info.url.removeprefix(f"{out}/"): info for info in storage.list_tree(out)}
    if all(name.startswith(".") for name in there):  # what writers that were killed had begun
        return frozenset()
    if RECORD not in there:
        raise ConflictError(
            f"{out} is not empty, and holds no {RECORD}: what is there is not a merge's",
            remedy="choose another output folder",
        )
    other = record(out).get("version") != version
    if other and not overwrite:
        raise ConflictError(
            f"{out} holds another merge, or one of a base or an adapter that was replaced since",
            remedy="choose another output folder, or pass --overwrite to replace it",
        )
    damaged = sorted(name for name, size in sizes.items() if name in there and there[name].size != size)
    if damaged and not overwrite:
        raise ConflictError(
            f"{storage.join(out, damaged[0])} has {there[damaged[0]].size} bytes, this merge wrote {sizes[damaged[0]]}",
            remedy="see who replaced it, or pass --overwrite to merge again",
        )
    return frozenset() if other or damaged else frozenset(there.keys() & sizes.keys())


def record(out: str) -> dict[str, Any]:
    """`merge.json`; empty where there is none, or somebody else's file of that name."""
    info = storage.stat(storage.join(out, RECORD))
    if info is None:
        return {}
    try:
        found = json.loads(storage.read_object(info, limit=_SMALL))
    except ValueError:
        return {}
    ours = isinstance(found, dict) and isinstance(found.get("files"), dict)
    return found if ours else {}


def remove(out: str) -> None:
    """Take away a merge, where there is one: `config.json` first and its record last, so that what is left is never whole."""
    # Only what lies there: a record that names files elsewhere is nobody's leave to delete them.
    there = {info.url.removeprefix(f"{out}/") for info in storage.list_tree(out)}
    named = there & {CONFIG, *record(out).get("files", {})} if RECORD in there else set()
    for name in (*sorted(named, key=lambda name: (name != CONFIG, name != INDEX)), *({RECORD} & there)):
        storage.delete(storage.join(out, name))


def publish(out: str, files: Sequence[File]) -> None:
    """Put files one after another.

    Args:
        out: the output folder.
        files: those that are not there yet, in order.

    Raises:
        RequestError: a merged weight cannot be written in its dtype; what this call has put is taken away again.
        ConflictError: another run puts something else in the same place.
    """
    made: list[str] = []
    try:
        for file in files:
            _put(out, file)
            made.append(file.name)
    except ConflictError:
        raise
    except RequestError:  # the rest cannot follow, by this command or by the next
        with contextlib.suppress(PhloraError):
            for name in reversed(made):
                storage.delete(storage.join(out, name))
        raise


def _put(out: str, file: File) -> None:
    url = storage.join(out, file.name)
    if storage.put_new(url, file.body, size=file.size) == "different":
        raise ConflictError(
            f"{url} is there by now, with other content", remedy="see which other run writes to this folder"
        )


def drop_leftovers(out: str, names: Container[str]) -> None:
    """Remove what killed runs of a merge had begun, now that all of it stands."""
    with contextlib.suppress(PhloraError):
        for upload in storage.uploads(out):
            if upload.url.removeprefix(f"{out}/") in names:
                storage.abort_upload(upload)
