"""The manifest: a schema that explains itself, rows that come back, bytes that repeat, damage that shows."""

from __future__ import annotations

import io
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from phlora_pipeline import manifest
from phlora_pipeline.errors import CheckpointError, NotFoundError
from phlora_pipeline.manifest import EnergyRow

ADAPTED = EnergyRow(
    "v1", "a.weight", "a", "mlp", (4, 6), "BF16", "BF16", "adapted", rank=2, delta_norm=0.5, relative_change=0.01, cosine=0.999,
    preserved_energy=0.75, written_energy=0.7499, singular_values=(0.5, 0.25), energy_at={8: 1.0, 16: None}, solver="krylov 80",
    certificate=2.5e-4,
)  # fmt: skip
SKIPPED = EnergyRow("v1", "b", "b", "norm", (), "", "F32", "skipped", "not in the base")


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "energy.parquet"
    path.write_bytes(manifest.to_parquet([ADAPTED, SKIPPED], model="m", base="b"))
    assert manifest.read(str(path)) == [ADAPTED, SKIPPED]


def test_every_column_is_described_and_every_field_is_a_column() -> None:
    assert list(manifest.COLUMNS) == [item.name for item in fields(EnergyRow)]
    table = pq.read_table(io.BytesIO(manifest.to_parquet([ADAPTED])))
    assert all(field.metadata[b"description"] for field in table.schema)
    assert str(table.schema.field("shape").type) == "list<element: int64>"
    assert str(table.schema.field("rank").type) == "int32"


def test_model_and_base_are_columns_only_where_given() -> None:
    alone = pq.read_table(io.BytesIO(manifest.to_parquet([ADAPTED], model="m", base="b")))
    assert alone.column("model").to_pylist() == ["m"]
    assert alone.column("base").to_pylist() == ["b"]
    assert "model" not in pq.read_table(io.BytesIO(manifest.to_parquet([ADAPTED]))).column_names


@pytest.mark.parametrize("rows", [[ADAPTED, SKIPPED], [SKIPPED], []], ids=["two", "one", "none"])
def test_without_names_it_is_as_if_it_had_never_had_them(tmp_path: Path, rows: list[EnergyRow]) -> None:
    """A dataset has model and base in its paths: its files are those of a manifest that was written for it, to the byte."""
    path = tmp_path / "energy.parquet"
    path.write_bytes(manifest.to_parquet(rows, model="m", base="b"))
    bare = manifest.without_names(str(path))
    assert bare == manifest.to_parquet(rows)
    path.write_bytes(bare)
    assert manifest.without_names(str(path)) == bare
    assert pq.read_schema(path).equals(manifest.schema(), check_metadata=False)
    assert all(field.metadata[b"description"] for field in pq.read_schema(path))


def test_columns_of_a_later_version_are_copied_too(tmp_path: Path) -> None:
    path = tmp_path / "energy.parquet"
    table = pq.read_table(io.BytesIO(manifest.to_parquet([ADAPTED], model="m", base="b")))
    pq.write_table(table.append_column("later", [["x"]]), path)
    path.write_bytes(manifest.without_names(str(path)))
    assert pq.read_table(path).column_names == [*manifest.COLUMNS, "later"]


def test_damage_is_not_copied(tmp_path: Path) -> None:
    path = tmp_path / "energy.parquet"
    rows = [replace(ADAPTED, tensor=f"t{number}", delta_norm=number * 0.37) for number in range(500)]
    whole = manifest.to_parquet(rows, model="m", base="b")
    path.write_bytes(whole)
    copied, refused = manifest.without_names(str(path)), []
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")  # texts, which have no checksum
    for at in range(100, footer, 97):  # some bits of page headers mean nothing
        data = bytearray(whole)
        data[at] ^= 0x10
        path.write_bytes(bytes(data))
        try:
            assert manifest.without_names(str(path)) == copied, at
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 20
    assert all("not a readable manifest" in told for told in refused)
    with pytest.raises(NotFoundError):
        manifest.without_names(str(tmp_path / "none"))


def test_the_same_rows_give_the_same_bytes() -> None:
    assert manifest.to_parquet([ADAPTED, SKIPPED]) == manifest.to_parquet([ADAPTED, SKIPPED])


def test_an_empty_manifest_keeps_its_schema() -> None:
    assert pq.read_table(io.BytesIO(manifest.to_parquet([]))).column_names == list(manifest.COLUMNS)


@pytest.mark.parametrize("at", [0.3, 0.5])
def test_a_flipped_bit_is_an_error_and_no_other_number(tmp_path: Path, at: float) -> None:
    many = [
        EnergyRow("v", f"t{n}", f"t{n}", "mlp", (n, n), "F32", "F32", "adapted", delta_norm=n * 0.37)
        for n in range(500)
    ]
    data = bytearray(manifest.to_parquet(many))
    data[int(at * len(data)) // 2] ^= 0x10
    path = tmp_path / "energy.parquet"
    path.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="not a readable manifest"):
        manifest.read(str(path))


def test_a_missing_manifest_and_one_of_another_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFoundError):
        manifest.read(str(tmp_path / "none"))
    path = tmp_path / "energy.parquet"
    path.write_bytes(manifest.to_parquet([ADAPTED]))
    monkeypatch.setattr(manifest, "SCHEMA_VERSION", 2)
    with pytest.raises(CheckpointError, match="schema version 1; this version reads 2"):
        manifest.read(str(path))


def test_reading_leaves_no_threads_behind(tmp_path: Path) -> None:
    """Arrow's scanner does, and they abort a process that ends at the wrong moment: one in ten, with exit code 134."""
    path = tmp_path / "energy.parquet"
    path.write_bytes(manifest.to_parquet([ADAPTED]))
    code = """
import os, sys
import pyarrow.parquet
from phlora_pipeline import manifest

before = os.listdir("/proc/self/task")
manifest.read(sys.argv[1])
print(len(os.listdir("/proc/self/task")) - len(before))
"""
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
