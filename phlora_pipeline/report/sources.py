"""From what a user names to manifests: a Parquet file, an adapter's folder, a folder of adapters, or a whole zoo's output."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from phlora_pipeline import manifest, storage
from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.report.facts import Run, Source
from phlora_pipeline.storage import ObjectInfo
from phlora_pipeline.zoo import latest, layout

_RUNS = "_runs"
_LARGEST = 256 << 20
_IN_DATASET = re.compile(r"(?:^|/)base=([^/]+)/model=([^/]+)/([^/]+)\.parquet$")
_SLOWEST = 5


def find(urls: Sequence[str]) -> list[Source]:
    """The manifests that are meant, in the order in which they are named; a zoo's by the models' names.

    Raises:
        NotFoundError: there is none at one of the URLs.
    """
    return [source for url in urls for source in _at(storage.normalize(url))]


def read(source: Source) -> tuple[Source, list[EnergyRow]]:
    """A manifest's rows, and its source with the names that it tells itself.

    Raises:
        CheckpointError: it is damaged, no manifest, or of another schema.
    """
    model, base, rows = manifest.read_named(source.url)
    folder, _, name = source.url.rpartition("/")
    place = storage.basename(folder) if name == layout.MANIFEST else name.removesuffix(".parquet")
    return replace(source, model=source.model or model or place, base=source.base or base), rows


def with_records(source: Source) -> Source:
    """The same with `run.json` and the run's own records, where they lie beside."""
    folder = source.url.rpartition("/")[0]
    place = _IN_DATASET.search(source.url)
    if place:
        folder = storage.join(source.url[: place.start()].rpartition("/")[0], place[2], place[3])
    record = _json(storage.stat(storage.join(folder, layout.RUN)))
    if not all(isinstance(record.get(part, {}), dict) for part in ("weights", "written", "settings", "sources")):
        record = {}
    run = None if place else _run(folder, str(record.get("version", "")))
    return replace(source, record=record, run=run)


def _at(url: str) -> list[Source]:
    if storage.stat(url) is not None:
        return [_named(url)]
    if storage.stat(inside := storage.join(url, layout.MANIFEST)) is not None:
        return [_named(inside)]
    dataset = url if storage.basename(url) == layout.DATASET else storage.join(url, layout.DATASET)
    tables = [info for info in storage.list_tree(dataset) if _IN_DATASET.search(info.url)]
    if not tables and (adapters := _side_by_side(url)):
        return adapters
    if not tables:
        raise NotFoundError(
            f"there is no manifest at {url}",
            remedy="give an energy.parquet, an adapter's folder, a folder of adapters, or the output of a zoo",
        )
    return _served(dataset.rpartition("/")[0], tables)


def _side_by_side(url: str) -> list[Source]:
    """Adapters in a folder, as `--rank 16,32,64` writes them: r16 before r128."""
    inside = (storage.join(folder, layout.MANIFEST) for folder in sorted(storage.list_folders(url), key=_by_number))
    return [Source(manifest) for manifest in inside if storage.stat(manifest) is not None]


def _by_number(url: str) -> list[tuple[str, int]]:
    return [(text, int(part or 0)) for text, part in re.findall(r"(\D*)(\d*)", storage.basename(url))]


def _named(url: str) -> Source:
    place = _IN_DATASET.search(url)
    return Source(url, place[2], place[1]) if place else Source(url)


def _served(out: str, tables: Iterable[ObjectInfo]) -> list[Source]:
    """Of each model the version that is served; the newest where that is not known."""
    found: dict[str, list[ObjectInfo]] = {}
    for info in tables:
        found.setdefault(_named(info.url).model, []).append(info)
    sources = []
    for model, infos in sorted(found.items()):
        newest = max(infos, key=lambda info: (info.modified, info.url))
        pointer = latest.read(out, model) if len(infos) > 1 and layout.is_model(model) else None
        served = [info for info in infos if pointer and info.url.endswith(f"/{pointer.version}.parquet")]
        sources.append(_named((served or [newest])[0].url))
    return sources


def _run(folder: str, version: str) -> Run | None:
    """Of the newest run under an adapter's folder that published this version."""
    if not version:
        return None
    for url in reversed(storage.list_folders(storage.join(folder, _RUNS))):
        result = _json(storage.stat(storage.join(url, "result.json")))
        if result.get("version") == version and result.get("outcome") == "committed":
            return _told(result, _events(storage.stat(storage.join(url, "events.jsonl"))))
    return None


def _told(result: Mapping[str, Any], events: Sequence[Mapping[str, Any]]) -> Run:
    tasks = [event for event in events if event.get("event") == "task"]
    routes: Counter[str] = Counter()
    for event in tasks:
        routes.update(event.get("routes", {}))
    slowest = sorted(tasks, key=lambda event: -float(event.get("seconds", 0)))[:_SLOWEST]
    return Run(
        seconds=float(result.get("seconds", 0.0)),
        tasks=int(result.get("tasks", 0)),
        read_bytes=int(result.get("read_bytes", 0)),
        busy=sum(float(event.get("seconds", 0)) for event in tasks),
        waited=sum(float(event.get("waited", 0)) for event in tasks),
        workers=len({event.get("worker") for event in tasks}),
        routes=dict(sorted(routes.items())),
        slowest=tuple(
            (str(event.get("task")), float(event.get("seconds", 0)), int(event.get("bytes", 0))) for event in slowest
        ),
    )


def _json(info: ObjectInfo | None) -> dict[str, Any]:
    """Somebody else's file of that name is no record of ours."""
    if info is None:
        return {}
    try:
        found = json.loads(storage.read_object(info, limit=_LARGEST))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _events(info: ObjectInfo | None) -> list[dict[str, Any]]:
    if info is None:
        return []
    try:
        lines = [json.loads(line) for line in storage.read_object(info, limit=_LARGEST).splitlines()]
    except ValueError:
        return []
    return [line for line in lines if isinstance(line, dict)]


def rows_of(url: str) -> list[EnergyRow]:
    """The rows of one model's manifest.

    Raises:
        NotFoundError: there is none.
        RequestError: there are several.
    """
    found = find([url])
    if len(found) > 1:
        raise RequestError(f"{url} is a zoo of {len(found)} models", remedy="give one model's energy.parquet or folder")
    return read(found[0])[1]
