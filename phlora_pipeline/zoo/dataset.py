"""The manifest of the whole zoo: each version's table once more, where DuckDB, Polars, pandas and Spark find one dataset."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from phlora_pipeline import manifest, storage
from phlora_pipeline.errors import RequestError
from phlora_pipeline.storage import ObjectInfo
from phlora_pipeline.zoo import layout

if TYPE_CHECKING:
    from phlora_pipeline.zoo.catalog import Entry
    from phlora_pipeline.zoo.standing import Standing
    from phlora_pipeline.zoo.state import Ledger, Outcome

Tables = Mapping[tuple[str, str], list[ObjectInfo]]
"""(model, version) → its copies in the dataset, of whatever base."""

_AT_ONCE = 16


def tables(out: str) -> Tables:
    """All that lie there: one listing."""
    found: dict[tuple[str, str], list[ObjectInfo]] = {}
    for info in storage.list_tree(storage.join(out, layout.DATASET)):
        folder, name = info.url.rsplit("/", 2)[1:]
        key = folder.removeprefix("model="), name.removesuffix(".parquet")
        found.setdefault(key, []).append(info)
    return found


def copy_manifest(out: str, model: str, base_id: str, version: str) -> bool:
    """Put a version's table into the dataset, unless it is there; tells whether this call has put it.

    The columns `model` and `base` are left out: readers take them from the path, and would stumble over having them twice.

    Raises:
        NotFoundError: the version has no table.
    """
    target = layout.dataset_copy(out, model, base_id, version)
    if storage.stat(target) is not None:
        return False
    table = manifest.without_names(storage.join(out, model, version, layout.MANIFEST))
    return storage.put_new(target, table) == "created"


def repair(out: str, there: Tables, found: Iterable[Standing], ledger: Ledger) -> list[str]:
    """Copy once more what an outcome names and the dataset lacks; what there is to say of it, in words.

    Of each model the versions that were made from tonight's base: under which id others belong is not known any more.

    Args:
        out: the zoo's output.
        there: listed before outcomes were read: gc removes these first, and so what it takes away meanwhile is not missed.
        found: where each model stands.
        ledger: what was settled.
    """
    named = {
        (standing.entry.id, outcome.version): (standing.entry, outcome)
        for standing in found
        for outcome in ledger.outcomes(standing.entry.id)
        if outcome.asked.get("base", "") == standing.asked.get("base")
    }
    missing = [named[key] for key in sorted(named.keys() - there.keys())]
    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="phlora-copy") as pool:
        problems = list(pool.map(lambda one: _problem(out, *one), missing))
    count = problems.count("")
    told = f"{layout.DATASET} lacked the tables of {count} version{'s' * (count != 1)}: they are copied there again"
    return [told] * (count > 0) + list(filter(None, problems))


def _problem(out: str, entry: Entry, outcome: Outcome) -> str:
    """Copy one; empty where that went well."""
    try:
        copy_manifest(out, entry.id, entry.base_id, outcome.version)
    except RequestError as error:
        record = storage.join(out, layout.STATE, entry.id, outcome.request)
        return f"{entry.id}: {error.what}; if that version is meant to be gone, remove {record}, too"
    return ""
