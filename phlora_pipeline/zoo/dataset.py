"""The manifest of the whole zoo: each version's table once more, where DuckDB, Polars, pandas and Spark find one dataset."""

from __future__ import annotations

from phlora_pipeline import manifest, storage
from phlora_pipeline.zoo import layout


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
