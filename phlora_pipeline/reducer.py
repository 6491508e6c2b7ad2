"""Parts → rows, adapter and manifest; the order in which they are published is the commit.

Weights, then the manifest, the card and `run.json`, then `adapter_config.json`: no loader opens a folder without the last
one, so what can be opened is whole. Nothing is overwritten; a file that is there with the same bytes counts as written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from phlora_pipeline import adapter, manifest, parts, policy, storage
from phlora_pipeline.adapter import Kept, Layout, Slot
from phlora_pipeline.checkpoint import Checkpoint
from phlora_pipeline.errors import ConflictError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.parts import Part, TensorResult
from phlora_pipeline.plan import Plan
from phlora_pipeline.rows import median_cosine, rows_of
from phlora_pipeline.storage import ObjectInfo

MANIFEST = "energy.parquet"
CARD = "README.md"
RUN = "run.json"
PUBLISHED = (adapter.WEIGHTS, MANIFEST, CARD, RUN, adapter.CONFIG)
"""In the order of publication."""

_SMALL = 16 << 20
_WEIGHT_FILES = (".safetensors", ".safetensors.index.json", ".bin")
_OF_AN_ADAPTER = {adapter.WEIGHTS, adapter.CONFIG, MANIFEST}

NOT_A_FINE_TUNE = 0.3
FAR_FROM_BASE = 0.8


@dataclass(frozen=True, slots=True)
class Reduction:
    """What the parts add up to.

    Attributes:
        plan: with the rank that the adapter has.
        rows: one per tensor of the fine-tune, by name.
        layout: of the adapter; without slots where nothing changed.
        dtype: of the adapter: `float32`, `bfloat16` or `float16`.
        cosine: energy-weighted median over the matrices of the cosine of W_base and W_tuned; None without matrices.
        sources: tensor → the part that holds its factors.
        ranks: tensor → how many of them are written.
        natural_bytes: of the weights' file, if each pair could be written at its own rank.
        warnings: about the ranks, in words.
    """

    plan: Plan
    rows: tuple[EnergyRow, ...]
    layout: Layout
    dtype: str
    cosine: float | None
    sources: Mapping[str, Part]
    ranks: Mapping[str, int]
    natural_bytes: int
    warnings: tuple[str, ...]

    @property
    def failed(self) -> tuple[EnergyRow, ...]:
        """Rows of tensors that could not be done."""
        return tuple(row for row in self.rows if row.status == "failed")

    @property
    def file_bytes(self) -> int:
        """Size of the weights' file."""
        return adapter.file_bytes(self.layout, self.dtype)


@dataclass(frozen=True, slots=True)
class Weights:
    """`adapter_model.safetensors`, as it will be.

    Attributes:
        header: its first bytes.
        tensors: a producer of the rest that holds one tensor at a time.
        size: of both, in bytes.
    """

    header: bytes
    tensors: parts.Body
    size: int


def reduce(plan: Plan, lost: Mapping[str, str], *, dtype: str, base: Checkpoint, tuned: Checkpoint) -> Reduction:
    """Read the parts' headers and factors, and work out every row.

    Args:
        plan: whose parts.
        lost: part URL → reason, for blocks that were given up. A worker may have died after it had stored its part: that counts.
        dtype: of the adapter, or `auto`.
        base, tuned: the checkpoints' headers.

    Raises:
        RequestError: a factor overflows the adapter's dtype.
    """
    results: dict[str, TensorResult] = {}
    sources: dict[str, Part] = {}
    for member in (member for task in plan.tasks for member in task.members):
        reason = lost.get(member.part_url)
        if reason is not None and storage.stat(member.part_url) is None:
            results |= {pair.name: TensorResult(pair.name, "failed", reason=reason) for pair in member.block.pairs}
            continue
        part = parts.load(member.part_url)
        results |= part.results
        sources |= {name: part for name, result in part.results.items() if result.status == "factored"}
    changed = plan.grown | {name for name, result in results.items() if result.delta_sq > 0}
    picked = adapter.pick_dtype(dtype, plan.adapted)
    draft = adapter.drafting(changed, base.tensors, tuned.tensors)
    chosen = policy.choose(plan, {name: results[name] for name in sources}, draft, picked)
    plan, layout = chosen.plan, draft(chosen.plan, chosen.ranks)
    made = rows_of(plan, layout, results, sources, chosen, picked, base=base.tensors, tuned=tuned.tensors)
    cosine = median_cosine(results.values(), tuned.tensors)
    return Reduction(plan, made, layout, picked, cosine, sources, chosen.ranks, chosen.natural_bytes, chosen.warnings)


def standing(
    out: str, version: str, *, interrupted: Callable[[], bool], overwrite: bool = False
) -> frozenset[str] | None:
    """Names of the files of this very adapter that stand in `out` already, whole; None where there is none yet.

    Args:
        out: the output folder.
        version: of the adapter.
        interrupted: whether files without a config may be of this very adapter, whose publication was interrupted.
        overwrite: whether an adapter, this or another, is to be replaced.

    Raises:
        ConflictError: another adapter, or somebody's files, stand there.
    """
    there = {storage.basename(info.url): info for info in storage.list_folder(out)}
    ours = frozenset(there.keys() & set(PUBLISHED))
    foreign = sorted(
        name for name in there if name == "config.json" or (name.endswith(_WEIGHT_FILES) and name not in PUBLISHED)
    )
    if foreign:
        raise ConflictError(
            f"{out} is a checkpoint's folder: it holds {foreign[0]}", remedy="choose another output folder"
        )
    if not ours or (overwrite and ours & _OF_AN_ADAPTER):
        return None
    if adapter.CONFIG in ours:
        run = run_record(there[RUN]) if RUN in ours else {}
        whole = ours == set(PUBLISHED) and there[adapter.WEIGHTS].size == run.get("weights", {}).get("bytes")
        if run.get("version") == version and whole:
            return ours
    elif ours == {MANIFEST}:
        rows = manifest.read(there[MANIFEST].url)
        if rows and rows[0].version == version:
            return ours
    elif interrupted():
        return None  # the files will turn out the same
    raise ConflictError(
        f"{out} already holds another adapter, a damaged one, or files of the same names: {', '.join(sorted(ours))}",
        remedy="choose another output folder, or pass --overwrite to replace an adapter",
    )


def run_record(info: ObjectInfo) -> dict[str, Any]:
    """A `run.json` that names its weights by `bytes` and `sha256`; empty where it is somebody else's file of that name."""
    try:
        run = json.loads(storage.read_object(info, limit=_SMALL))
    except ValueError:
        return {}
    ours = isinstance(run, dict) and isinstance(run.get("weights"), dict)
    return run if ours else {}


def publish(
    out: str,
    weights: Weights,
    rows: Sequence[EnergyRow],
    *,
    config: dict[str, object],
    card: str,
    run: dict[str, object],
    model: str,
    base: str,
) -> None:
    """Put an adapter's files, `adapter_config.json` last.

    Raises:
        ConflictError: another file stands where one of these should go.
    """
    digest = hashlib.sha256()

    def body() -> Iterator[bytes]:
        nonlocal digest
        digest = hashlib.sha256()
        for chunk in itertools.chain((weights.header,), weights.tensors()):
            digest.update(chunk)
            yield chunk

    _put(out, adapter.WEIGHTS, storage.put_new(storage.join(out, adapter.WEIGHTS), body, size=weights.size))
    put = storage.stat(storage.join(out, adapter.WEIGHTS))
    publish_manifest(out, rows, model=model, base=base)
    run = {**run, "weights": {"bytes": weights.size, "sha256": digest.hexdigest()}}
    for name, text in ((CARD, card), (RUN, _json(run))):
        _put(out, name, storage.put_new(storage.join(out, name), text.encode()))
    # The commit names these weights. With --overwrite another run may have taken them away meanwhile.
    if put is None or storage.stat(put.url) != put:
        raise ConflictError(
            f"{put.url if put else out} was replaced by another run while this one published",
            remedy="see what the other run has published, then run again",
        )
    _put(out, adapter.CONFIG, storage.put_new(storage.join(out, adapter.CONFIG), _json(config).encode()))


def publish_manifest(out: str, rows: Sequence[EnergyRow], *, model: str, base: str) -> None:
    """Put the manifest alone: all there is to say where nothing changed, or where something failed."""
    _put(out, MANIFEST, storage.put_new(storage.join(out, MANIFEST), manifest.to_parquet(rows, model=model, base=base)))


def unpublish(out: str) -> None:
    """Remove an adapter, its config first, so that no loader ever sees half of it."""
    for name in reversed(PUBLISHED):
        storage.delete(storage.join(out, name))


def drop_parts(plan: Plan) -> None:
    """Remove the parts of a plan whose adapter stands, where there are any."""
    for part in storage.list_folder(plan.parts_folder):
        storage.delete(part.url)
    storage.drop_empty_folder(plan.parts_folder)
    storage.drop_empty_folder(plan.parts_folder.rpartition("/")[0])


def drop_failed(reduction: Reduction) -> None:
    """Remove the parts in which a tensor failed: whoever runs again means to try it again, on another device perhaps."""
    failed = {row.tensor for row in reduction.failed}
    for member in (member for task in reduction.plan.tasks for member in task.members):
        if any(pair.name in failed for pair in member.block.pairs):
            storage.delete(member.part_url)


def weights_of(reduction: Reduction) -> Weights:
    """The parts' factors, cut and filled as the adapter's layout says."""
    items = reduction.layout.in_file_order(reduction.dtype)

    def tensors() -> Iterator[bytes]:
        for item in items:
            if isinstance(item, Kept):
                yield from parts.tensor_chunks(adapter.keep(item))
            else:
                yield from parts.tensor_chunks(_filled(item, reduction, adapter.stored_dtype(item, reduction.dtype)[1]))

    return Weights(adapter.file_header(reduction.layout, reduction.dtype), tensors, reduction.file_bytes)


def _filled(slot: Slot, reduction: Reduction, dtype: torch.dtype) -> torch.Tensor:
    def factor(tensor: str | None) -> torch.Tensor | None:
        if tensor is None:
            return None
        read = parts.read_factor(reduction.sources[tensor], slot.side, tensor)
        return adapter.cut(read, slot.side, reduction.ranks[tensor])

    if slot.stack:
        return adapter.fill_stack(slot, map(factor, slot.stack), reduction.plan.rank, dtype)
    return adapter.fill(slot, factor(slot.tensor), reduction.plan.rank, dtype)


def _put(out: str, name: str, outcome: storage.PutOutcome) -> None:
    if outcome == "different":
        raise ConflictError(
            f"{storage.join(out, name)} is there already, with other content",
            remedy="choose another output folder, or pass --overwrite",
        )


def _json(document: dict[str, object]) -> str:
    return json.dumps(document, indent=2, sort_keys=True) + "\n"
