"""What is in the zoo: every model with its base and its settings, or with the reason why it cannot be tried."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial

from phlora_pipeline import storage, zoofile
from phlora_pipeline.errors import RequestError, SourceChangedError, quoted
from phlora_pipeline.zoo.folders import THREADS, Folder, checkpoints_below, look, named_bases, shown
from phlora_pipeline.zoofile import (
    Discover,
    ExtractSettings,
    Model,
    ZooConfig,
    canonical,
    folder_of,
    merge,
    settings_for,
)

_BASE_REMEDY = "give its base under models, by a rule of discover, or add the base to bases"


@dataclass(frozen=True, slots=True)
class Entry:
    """A model of the zoo.

    Attributes:
        id: what it is called in the output.
        url: the fine-tune.
        base_id: empty where none was found.
        base_url: of the base.
        base_name: for servers; empty where the zoo.yaml has none.
        settings: all of them, each resolved.
        problem: why it cannot even be tried, and what to do; empty where it can.
    """

    id: str
    url: str
    base_id: str
    base_url: str
    base_name: str
    settings: ExtractSettings
    problem: str = ""


def catalog(config: ZooConfig) -> list[Entry]:
    """All models, by id; reads listings, `config.json` and the head of `README.md`, and of these only what it needs.

    Raises:
        RequestError: a prefix does not exist.
        CredentialsError, StorageError: no model can be blamed for these.
    """
    bases = _Bases(config)
    with ThreadPoolExecutor(THREADS, thread_name_prefix="phlora-catalog") as pool:
        entries = list(pool.map(partial(_listed, config, bases), config.models))
        # Neither the bases nor the output are models, and what is listed by hand is not found once more.
        places = [config.output, *(base.url for base in config.bases.values()), *(model.url for model in config.models)]
        taken = {canonical(folder_of(url)) for url in places}
        for place in config.discover:
            skip = partial(_is_one_of, frozenset(taken))
            folders = checkpoints_below(place.prefix, place.depth, pool, skip=skip, exclude=place.exclude)
            entries += pool.map(partial(_found, config, bases, place), folders)
            taken |= {canonical(folder.url) for folder in folders}
    return _one_each(entries)


def _is_one_of(places: frozenset[str], url: str) -> bool:
    return canonical(url) in places


def _listed(config: ZooConfig, bases: _Bases, model: Model) -> Entry:
    settings = settings_for(config, model.id, model.extract)
    if model.base:
        return bases.entry(model.id, model.url, model.base, settings)
    url = folder_of(model.url)
    return _from_files(bases, model.id, model.url, look(url), settings)


def _found(config: ZooConfig, bases: _Bases, place: Discover, folder: Folder) -> Entry:
    try:
        model, problem = zoofile.model_id(folder.path), ""
    except RequestError as error:
        model = _stand_in(folder)
        problem = f"{error.what} (rename the folder, or list it under models with an id)"
    try:
        settings = settings_for(config, model)
    except RequestError as error:
        settings, problem = merge([config.extract]), problem or f"the overrides for it do not fit together: {error}"
    if problem:
        return Entry(model, folder.url, "", "", "", settings, problem)
    base = next((rule.base for rule in place.rules if fnmatchcase(folder.name, rule.match)), place.base)
    if base and not folder.problem:
        return bases.entry(model, folder.url, base, settings)
    return _from_files(bases, model, folder.url, folder, settings)


def _stand_in(folder: Folder) -> str:
    """An id for what cannot have its own: it will be in messages and links, but never converted under it."""
    readable = re.sub(r"[^A-Za-z0-9]+", "-", folder.path).strip("-")[:40] or "unnamed"
    return f"{readable}-{hashlib.sha256(folder.url.encode(errors='replace')).hexdigest()[:8]}"


def _from_files(bases: _Bases, model: str, url: str, folder: Folder, settings: ExtractSettings) -> Entry:
    problem, told = folder.problem, []
    if not problem and not folder.files:
        problem = f"there is nothing at {url} (check the place, or give its base if it is still to come)"
    try:
        for file, names in () if problem else named_bases(folder.files):
            found = bases.called(names)
            if len(found) == 1:
                return bases.entry(model, url, found[0], settings)
            if found:
                problem = f"its {file} names {shown(names)}, which may be {' or '.join(found)} ({_BASE_REMEDY})"
                break
            told.append(f"its {file} names {shown(names) if names else 'none'}")
    except (RequestError, SourceChangedError) as error:
        problem = str(error)
    if not problem:
        said = "; ".join(told) or "it has neither config.json nor README.md"
        problem = f"no base found: {said}; bases: {shown(bases.ids, 10) or 'none'} ({_BASE_REMEDY})"
    return Entry(model, url, "", "", "", settings, problem)


class _Bases:
    """The bases, by id and by what others may call them."""

    def __init__(self, config: ZooConfig) -> None:
        self._bases = config.bases
        self._whole: dict[str, set[str]] = defaultdict(set)
        self._last: dict[str, set[str]] = defaultdict(set)
        for base_id, base in config.bases.items():
            for label in filter(None, (base_id, base.name, base.url, folder_of(base.url))):
                self._whole[label.lower()].add(base_id)
                self._last[storage.basename(label).lower()].add(base_id)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(self._bases)

    def called(self, names: Iterable[str]) -> list[str]:
        """Bases that are meant by these names: whole if any is known whole, otherwise by the last components."""
        lower = [name.lower() for name in names]
        whole = {base for name in lower for base in self._whole.get(name, ())}
        return sorted(whole or {base for name in lower for base in self._last.get(storage.basename(name), ())})

    def entry(self, model: str, url: str, base_id: str, settings: ExtractSettings) -> Entry:
        """A model whose base is known."""
        base = self._bases[base_id]
        same = canonical(url) == canonical(base.url)
        problem = f"it is the base {quoted(base_id)} itself (give the fine-tune's place)" if same else ""
        return Entry(model, url, base_id, base.url, base.name, settings, problem)


def _one_each(entries: Sequence[Entry]) -> list[Entry]:
    """By id; where two checkpoints have one, neither can be meant, and one entry says so."""
    by_id: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_id[entry.id].append(entry)
    return [_only(by_id[model]) for model in sorted(by_id)]


def _only(entries: Sequence[Entry]) -> Entry:
    if len(entries) == 1:
        return entries[0]
    first, urls = entries[0], shown([entry.url for entry in entries])
    problem = f"{len(entries)} checkpoints have this id: {urls} (list them under models with ids of their own, or exclude all but one)"
    return Entry(first.id, first.url, "", "", "", first.settings, problem)
