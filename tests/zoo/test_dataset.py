"""The dataset over the whole zoo: each table once, without the columns that its path says, in words any reader takes."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from phlora_pipeline import manifest, storage
from phlora_pipeline.errors import NotFoundError
from phlora_pipeline.zoo import dataset
from tests.zoo import shelf


def test_a_version_is_copied_once(out: str) -> None:
    shelf.publish(out, 1)
    assert dataset.copy_manifest(out, shelf.MODEL, "llama-8b", shelf.version(1))
    assert not dataset.copy_manifest(out, shelf.MODEL, "llama-8b", shelf.version(1))
    url = f"{out}/_manifest/base=llama-8b/model={shelf.MODEL}/{shelf.version(1)}.parquet"
    assert storage.stat(url) is not None
    assert manifest.read(url) == manifest.read(f"{out}/{shelf.MODEL}/{shelf.version(1)}/energy.parquet")


def test_a_copy_that_stands_is_left_alone(out: str) -> None:
    shelf.publish(out, 1)
    url = f"{out}/_manifest/base=b/model={shelf.MODEL}/{shelf.version(1)}.parquet"
    storage.put_new(url, b"an earlier one's")
    before = storage.stat(url)
    assert not dataset.copy_manifest(out, shelf.MODEL, "b", shelf.version(1))
    assert storage.stat(url) == before


def test_a_version_without_a_table(out: str) -> None:
    with pytest.raises(NotFoundError, match=r"no manifest at .*energy\.parquet"):
        dataset.copy_manifest(out, shelf.MODEL, "b", shelf.version(1))
    assert shelf.names(out) == []


def test_readers_take_all_tables_as_one_with_ids_that_stay_text(tmp_path: Path) -> None:
    out = str(tmp_path)
    for number, (model, base) in enumerate([("0123", "007"), ("support-bot", "llama-8b"), ("org--x.y", "llama-8b")]):
        shelf.publish(out, number, model)
        dataset.copy_manifest(out, model, base, shelf.version(number))
    named = pa.schema([("base", pa.string()), ("model", pa.string())])
    table = ds.dataset(tmp_path / "_manifest", partitioning=ds.partitioning(named, flavor="hive")).to_table()
    assert table.schema.names == [*manifest.COLUMNS, "base", "model"]
    assert sorted(zip(*(table.column(name).to_pylist() for name in ("base", "model", "version")), strict=True)) == [
        ("007", "0123", shelf.version(0)),
        ("llama-8b", "org--x.y", shelf.version(2)),
        ("llama-8b", "support-bot", shelf.version(1)),
    ]
