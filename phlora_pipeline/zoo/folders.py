"""Checkpoints below a prefix, known by listings, and what their own small files say of their base. No tensor, no header."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from itertools import chain
from typing import Any

from phlora_pipeline import storage, zoofile
from phlora_pipeline.errors import RequestError, quoted
from phlora_pipeline.storage import ByteRange, ObjectInfo

THREADS = 16
"""Listings and small reads at a time: a request takes tens of milliseconds, and thousands of folders must be seconds."""

_CONFIG_BYTES = 4 << 20
_CARD_BYTES = 256 << 10
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_LONGEST_NAME = 1024
_HUB_CACHE = re.compile(r"(?:.*/)?models--([^/]+?)--([^/]+)/snapshots/[^/]+")


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder below a prefix.

    Attributes:
        url: absolute.
        path: from the prefix: its own name, or `org/name` where it was found deeper.
        files: by name, as they were listed.
        problem: why it could not be listed, in words; empty where it could.
    """

    url: str
    path: str
    files: Mapping[str, ObjectInfo] = field(repr=False)
    problem: str = ""

    @property
    def name(self) -> str:
        """The last component."""
        return storage.basename(self.url)

    @property
    def is_checkpoint(self) -> bool:
        """Whether it looks like a full checkpoint: an adapter, or weights without a config.json, do not."""
        weights = any(name.endswith(_WEIGHTS) for name in self.files)
        return weights and "config.json" in self.files and "adapter_config.json" not in self.files


def checkpoints_below(
    prefix: str,
    depth: int,
    pool: ThreadPoolExecutor,
    *,
    skip: Callable[[str], bool] | None = None,
    exclude: Sequence[str] = (),
) -> list[Folder]:
    """Folders that look like checkpoints, or that could not be looked into; nothing is looked for inside a checkpoint.

    Args:
        prefix: a local path or URL.
        depth: how many folders deep.
        pool: does the listing.
        skip: places that are none of the zoo's.
        exclude: globs of folder names that are passed over, with all that is in them.

    Raises:
        RequestError: there is nothing at the prefix at all.
        CredentialsError, StorageError: no model can be blamed for these.
    """
    level = storage.list_folders(prefix)
    if not level and not storage.list_folder(prefix):
        raise RequestError(f"there is nothing at {prefix}", remedy="check the prefix: its name, bucket and spelling")
    found: list[Folder] = []
    for components in range(1, depth + 1):
        chosen = [url for url in level if not (skip and skip(url)) and not _excluded(storage.basename(url), exclude)]
        folders = list(pool.map(partial(look, components=components), chosen))
        found += [folder for folder in folders if folder.is_checkpoint or folder.problem]
        if components < depth:
            rest = [folder.url for folder in folders if not folder.is_checkpoint and not folder.problem]
            level = list(chain.from_iterable(pool.map(storage.list_folders, rest)))
    return found


def look(url: str, components: int = 1) -> Folder:
    """A folder as it is listed now; its path is so many last components."""
    path = "/".join(url.split("/")[-components:])
    try:
        return Folder(url, path, {storage.basename(info.url): info for info in storage.list_folder(url)})
    except RequestError as error:  # this folder's own fault, such as a missing permission
        return Folder(url, path, {}, str(error))


def named_bases(files: Mapping[str, ObjectInfo]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """What the files of a checkpoint call its base, file by file: each is read only when it is asked for.

    Yields:
        the file's name, and the names in it: hub ids, paths or URLs, as a stranger wrote them.

    Raises:
        RequestError, SourceChangedError: a file is not what it should be, or changes just now.
    """
    if "config.json" in files:
        yield "config.json", _of_config(files["config.json"])
    if "README.md" in files:
        yield "README.md", _of_card(files["README.md"])


def _of_config(info: ObjectInfo) -> tuple[str, ...]:
    try:
        config = json.loads(storage.read_object(info, limit=_CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{info.url} is not JSON", remedy="download or write it again") from error
    return _names(config.get("_name_or_path") if isinstance(config, dict) else None)


def _of_card(info: ObjectInfo) -> tuple[str, ...]:
    # The front matter is at its beginning; what follows may be megabytes of pictures.
    head = bytearray(min(info.size, _CARD_BYTES))
    if head:
        storage.read_ranges([ByteRange(info.url, info.etag, 0, memoryview(head))])
    return _names(zoofile.front_matter(head.decode(errors="replace")).get("base_model"))


def _names(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    texts = (name.strip().rstrip("/") for name in listed if isinstance(name, str) and len(name) <= _LONGEST_NAME)
    return tuple(dict.fromkeys(_hub_id(name) for name in texts if name))


def _hub_id(name: str) -> str:
    """The hub's name of a snapshot in a local cache; transformers writes down the path that it was given."""
    found = _HUB_CACHE.fullmatch(name)
    return f"{found[1]}/{found[2]}" if found else name


def _excluded(name: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def shown(names: Sequence[str], limit: int = 5) -> str:
    """Strangers' names in a message.

    >>> shown(["a", "b"], 1)
    "'a' and 1 more"
    """
    rest = len(names) - limit
    text = ", ".join(quoted(name) for name in names[:limit])
    return f"{text} and {rest} more" if rest > 0 else text
