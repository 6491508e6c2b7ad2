"""The energy manifest: one row per tensor of the fine-tune, as Parquet; nothing is left out silently.

The only home of pyarrow, which is imported when a manifest is written or read and not before. Files are made in memory
and put by `storage`: pyarrow's own writer leaves a valid file behind when it is interrupted, and its own S3 client can
hang at exit.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal

from phlora_pipeline import storage
from phlora_pipeline.errors import CheckpointError, NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 1
ENERGY_RANKS = (8, 16, 32, 64, 128, 256, 512)
OF_FACTORS = "factors"
"""The solver of a row that tells of an adapter's factors, compressed: no checkpoint was read, and ΔW is what the adapter was."""

_LARGEST = 1 << 30

Status = Literal["adapted", "unchanged", "zero_filled", "carried", "skipped", "failed"]


@dataclass(frozen=True, slots=True)
class EnergyRow:
    """What became of one tensor. The columns' descriptions are in `COLUMNS`, and in every file."""

    version: str
    tensor: str
    module: str
    kind: str
    shape: tuple[int, ...]
    base_dtype: str
    tuned_dtype: str
    status: Status
    reason: str = ""
    rank: int | None = None
    delta_norm: float | None = None
    relative_change: float | None = None
    cosine: float | None = None
    preserved_energy: float | None = None
    written_energy: float | None = None
    noise_energy: float | None = None
    noise_edge: float | None = None
    singular_values: tuple[float, ...] | None = None
    energy_at: Mapping[int, float | None] = field(default_factory=dict)
    solver: str = ""
    certificate: float | None = None
    schema_version: int = SCHEMA_VERSION


COLUMNS: dict[str, tuple[str, str]] = {
    "version": ("string", "the adapter's identity: a digest of what decides its bytes"),
    "tensor": (
        "string",
        "name of the weight in the fine-tuned checkpoint; the base's where the two differ by a known prefix",
    ),
    "module": ("string", "the tensor's name without .weight, as PEFT names modules"),
    "kind": ("string", "attention, mlp, expert, router, embedding, lm_head, linear, conv, norm, bias or other"),
    "shape": ("list<int64>", "dimensions; of a matrix (d outputs, k inputs)"),
    "base_dtype": (
        "string",
        "dtype in the base checkpoint, as safetensors names it; empty where the base has no such tensor",
    ),
    "tuned_dtype": ("string", "dtype in the fine-tuned checkpoint"),
    "status": (
        "string",
        "adapted, unchanged (no entry differs), zero_filled (a zero pair, for its family), carried (kept whole), skipped or failed",
    ),
    "reason": (
        "string",
        "why it is not adapted, in words; of an adapted one what else should be known, such as a route that did not do",
    ),
    "rank": ("int32", "rank of the tensor's own factors, before zero-padding"),
    "delta_norm": ("double", "Frobenius norm of W_tuned - W_base, summed in float64"),
    "relative_change": ("double", "delta_norm over the Frobenius norm of W_base"),
    "cosine": ("double", "cosine between W_base and W_tuned as vectors"),
    "preserved_energy": (
        "double",
        "E_r of eq. 5: share of the squared norm of the update that the exact rank-r factors keep",
    ),
    "written_energy": (
        "double",
        "1 - |W_tuned - W_base - BA|^2 / |W_tuned - W_base|^2 with B and A as stored, after rounding; may be negative",
    ),
    "noise_energy": (
        "double",
        "share of the squared norm of the update that is the fine-tune's own rounding to its stored dtype, as expected",
    ),
    "noise_edge": (
        "double",
        "singular values up to it are that rounding, by which --rank auto goes",
    ),
    "singular_values": ("list<float>", "of the update, descending, up to max_rank of them"),
    "energy_at": ("map<int32, double>", "E_r at ranks 8 to 512; null above max_rank"),
    "solver": ("string", "the route by which the factors were computed; a number is the width of its basis"),
    "certificate": (
        "double",
        "probabilistic upper bound of E_r(optimal) - E_r(these factors), at this rank and every smaller one; it fails with a probability of 1e-9",
    ),
    "schema_version": ("int32", "of this table; columns are only ever added"),
}


def schema() -> pa.Schema:
    """The Arrow schema, with each column's description in its field's metadata."""
    import pyarrow as pa

    types = {
        "string": pa.string(), "int32": pa.int32(), "double": pa.float64(), "list<int64>": pa.list_(pa.int64()),
        "list<float>": pa.list_(pa.float32()), "map<int32, double>": pa.map_(pa.int32(), pa.float64()),
    }  # fmt: skip
    return pa.schema(
        [pa.field(name, types[kind], metadata={"description": text}) for name, (kind, text) in COLUMNS.items()]
    )


def to_parquet(rows: Sequence[EnergyRow], *, model: str = "", base: str = "") -> bytes:
    """The file's bytes: the same rows give the same bytes.

    Args:
        rows: in the order in which they are written.
        model, base: written as columns where given; a dataset over a zoo has them in its paths instead.
    """
    import pyarrow as pa

    table = pa.Table.from_pylist([_plain(row) for row in rows], schema=schema())
    for name, value, text in (("base", base, "the base checkpoint"), ("model", model, "the fine-tuned checkpoint")):
        if value:
            column = pa.array([value] * len(rows), pa.string())
            table = table.add_column(0, pa.field(name, pa.string(), metadata={"description": text}), column)
    return _written(
        table.replace_schema_metadata(
            {"phlora.schema_version": str(SCHEMA_VERSION), "phlora.version": rows[0].version if rows else ""}
        )
    )


def without_names(url: str) -> bytes:
    """A stored manifest's bytes without the columns `model` and `base`, for a dataset that has these two in its paths.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is damaged.
    """
    import pyarrow as pa

    with _readable(url):
        table = _stored(url)
    table = table.drop_columns([name for name in ("base", "model") if name in table.column_names])
    # What Parquet calls a list's element is not what Arrow calls it; by our own names the bytes are those of `to_parquet`.
    ours = {field.name: field for field in schema()}
    fields = [ours.get(field.name, field) for field in table.schema]
    return _written(table.cast(pa.schema(fields, table.schema.metadata)))


def read(url: str) -> list[EnergyRow]:
    """The rows of a manifest.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is damaged, or of another schema.
    """
    return read_named(url)[2]


def read_named(url: str) -> tuple[str, str, list[EnergyRow]]:
    """The fine-tune's name, the base's, and the rows of a manifest; the names are empty where it does not tell them.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is damaged, or of another schema.
    """
    with _readable(url):
        table = _stored(url)
    _require_schema(table, url)
    records = table.to_pylist(maps_as_pydicts="strict")
    model, base = (str(records[0].get(name) or "") if records else "" for name in ("model", "base"))
    return model, base, [_row(record, url) for record in records]


def _require_schema(table: pa.Table, url: str) -> None:
    """Of the whole table, since one without rows has no version of its own to look at. Columns are only ever added."""
    told = (table.schema.metadata or {}).get(b"phlora.schema_version", b"").decode(errors="replace")
    if not told and "schema_version" not in table.column_names:
        raise CheckpointError(f"{url} is a Parquet file, but not a manifest", remedy="give an adapter's energy.parquet")
    if told not in {"", str(SCHEMA_VERSION)}:
        raise _of_another_schema(url, told)


def _of_another_schema(url: str, told: object) -> CheckpointError:
    return CheckpointError(
        f"{url} has schema version {told}; this version reads {SCHEMA_VERSION}", remedy="upgrade, or extract again"
    )


def _stored(url: str) -> pa.Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    info = storage.stat(url)
    if info is None:
        raise NotFoundError(f"there is no manifest at {url}")
    # Not `read_table`, whose scanner has threads whatever `use_threads` says: where the process ends just then, they abort it
    # ("terminate called without an active exception").
    stored = pa.BufferReader(storage.read_object(info, limit=_LARGEST))
    return pq.ParquetFile(stored, page_checksum_verification=True, pre_buffer=False).read(use_threads=False)


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError) as error:
        raise CheckpointError(
            f"{url} is not a readable manifest: {error}", remedy="extract again with --overwrite"
        ) from error


def _written(table: pa.Table) -> bytes:
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    # Page checksums: without them one flipped bit reads back as other floats, and nobody is told.
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    return sink.getvalue()


def _plain(row: EnergyRow) -> dict[str, Any]:
    return {**asdict(row), "energy_at": list(row.energy_at.items())}


def _row(record: dict[str, Any], url: str) -> EnergyRow:
    if record.get("schema_version") != SCHEMA_VERSION:
        raise _of_another_schema(url, record.get("schema_version"))
    known = {item.name for item in fields(EnergyRow)}
    record = {name: value for name, value in record.items() if name in known}
    values = record["singular_values"]
    return EnergyRow(
        **{**record, "shape": tuple(record["shape"]), "singular_values": None if values is None else tuple(values)}
    )
