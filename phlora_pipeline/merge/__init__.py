"""base + adapters → a checkpoint: W + Σ weight·scale·B·A in float32, rounded once; everything else is the base's, bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, Protocol

from phlora_pipeline import lora, storage
from phlora_pipeline.errors import ConflictError, RequestError
from phlora_pipeline.merge import documents, folder, shards
from phlora_pipeline.merge.fit import Fitted, Weighted, fit, require_finite
from phlora_pipeline.merge.folder import File
from phlora_pipeline.merge.shards import ShardPlan
from phlora_pipeline.merge.source import CONFIG, Source, open_source
from phlora_pipeline.quantised import FP8
from phlora_pipeline.storage.urls import scheme

REVISION = 1
"""Goes up when the same inputs would give other bytes."""

Dtype = Literal["base", "float32", "bfloat16", "float16"]
DTYPES: Mapping[Dtype, str] = {"base": "", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class Observer(Protocol):
    """What a front end is told on the way."""

    def planned(self, shards: int, nbytes: int) -> None:
        """So much will be written."""

    def wrote(self, nbytes: int) -> None:
        """So much more of it is."""

    def warn(self, text: str) -> None:
        """Something that the user should know, in one line."""


class _Silent:
    """Told, and tells nobody; what it is warned of is in the result."""

    def planned(self, shards: int, nbytes: int) -> None:
        """Nothing."""

    def wrote(self, nbytes: int) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What will be written, and what of it stands already.

    Attributes:
        out: where to.
        source: the base.
        plans: its shards as they will be.
        files: all files, in the order in which they are put.
        version: the merge's identity.
        done: names of files that are there.
        warnings: in words.
    """

    out: str
    source: Source
    plans: tuple[ShardPlan, ...]
    files: tuple[File, ...]
    version: str
    done: frozenset[str]
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class MergeResult:
    """How a merge ended.

    Attributes:
        outcome: `committed`, or `exists`: the same merge stood there already.
        out: where it is.
        version: the merge's identity.
        changed: tensors that an adapter adds to, or replaces.
        tensors: all of them.
        nbytes: of all files.
        written_bytes: of those that this call has put.
        left_out: files of the base that are not beside the merged weights, since they would not be theirs.
        warnings: in words.
    """

    outcome: Literal["committed", "exists"]
    out: str
    version: str
    changed: int
    tensors: int
    nbytes: int
    written_bytes: int
    left_out: tuple[str, ...]
    warnings: tuple[str, ...]


def merge(
    base: str,
    adapters: str | Sequence[str | tuple[str, float]],
    out: str,
    *,
    dtype: Dtype = "base",
    overwrite: bool = False,
    observer: Observer | None = None,
) -> MergeResult:
    """Add adapters to a checkpoint, and write what comes out as another one, with the base's shards and their names.

    Args:
        base: the checkpoint that they are for.
        adapters: one, or several, each alone or with its weight; 1 is as it was trained or extracted.
        out: a folder that is empty or absent, or holds this very merge, interrupted.
        dtype: of all floating-point tensors; `base`: each as it is there.
        overwrite: whether another merge may be replaced.
        observer: is told how far it is.

    Raises:
        RequestError: what is given does not fit together; nothing is written.
        SourceChangedError: the base or an adapter was replaced meanwhile; what is written so far cannot be loaded.
    """
    out = storage.normalize(out)
    observer = observer or _Silent()
    adapters = [adapters] if isinstance(adapters, str) else adapters
    weighted = [(each, 1.0) if isinstance(each, str) else each for each in adapters]
    loras = [Weighted(lora.open_adapter(url), weight) for url, weight in weighted]
    prepared = prepare(base, loras, out, dtype=dtype, overwrite=overwrite)
    todo = [file for file in prepared.files if file.name not in prepared.done]
    if todo:
        _require_room(out, sum(file.size for file in todo))
        require_finite(loras)
        for warning in prepared.warnings:
            observer.warn(warning)
        if not prepared.done:
            folder.remove(out)
        observer.planned(sum(file.weights for file in todo), sum(file.size for file in todo))
        folder.publish(out, [_watched(file, observer) for file in todo])
        folder.drop_leftovers(out, {file.name for file in prepared.files})
    targets = [target for plan in prepared.plans for target in plan.targets]
    return MergeResult(
        "committed" if todo else "exists",
        out,
        prepared.version,
        sum(target.change is not None for target in targets),
        len(targets),
        sum(file.size for file in prepared.files),
        sum(file.size for file in todo),
        prepared.source.left_out,
        prepared.warnings,
    )


def prepare(base: str, loras: Sequence[Weighted], out: str, *, dtype: Dtype, overwrite: bool) -> Prepared:
    """Open the base, find every adapter's place in it, and see what stands already: reads headers, writes nothing.

    Raises:
        RequestError: as `merge`.
    """
    for one in loras:
        if not math.isfinite(one.weight):
            raise RequestError(f"{one.weight} is no weight of {one.lora.url}", remedy="give a number, such as 0.7")
    source = open_source(base)
    _require_apart(out, source.checkpoint.url, [one.lora.url for one in loras])
    _require_plain(source, dtype)
    fitted = fit(source.checkpoint, loras)
    plans = tuple(shards.plan_shard(shard, fitted.changes, DTYPES[dtype]) for shard in source.shards)
    version = _version(source, loras, dtype)
    files = list(_files(source, plans, dtype, fitted))
    files = folder.in_order([_record(source, loras, dtype, version, files), *files])
    done = folder.standing(out, version, {file.name: file.size for file in files}, overwrite=overwrite)
    storage.require_writable(out)
    return Prepared(out, source, plans, tuple(files), version, done, tuple(_warnings(source, fitted)))


def _require_apart(out: str, base: str, adapters: Sequence[str]) -> None:
    """Raise where the merge would be written among its own sources, or around them."""
    place = _real(out)
    for url in (base, *adapters):
        if place == _real(url) or f"{place}/".startswith(f"{_real(url)}/") or _real(url).startswith(f"{place}/"):
            raise ConflictError(f"{out} and {url} lie in one another", remedy="choose another output folder")


def _real(url: str) -> str:
    return os.path.realpath(url) if scheme(url) == "file" else url


def _require_plain(source: Source, dtype: Dtype) -> None:
    """Raise where weights would have to be quantised again."""
    eight = _in_eight_bits(source)
    if eight and dtype == "base":
        raise RequestError(
            f"{source.checkpoint.url} is stored in fp8 ({len(eight)} tensors, {eight[0]} first): a sum is not rounded to that without new scales",
            remedy="write the merged checkpoint dequantised: --dtype bfloat16; or give the base in bf16 that it was made from",
        )


def _in_eight_bits(source: Source) -> list[str]:
    return [name for name, ref in source.checkpoint.tensors.items() if ref.dtype in FP8]


def _require_room(out: str, nbytes: int) -> None:
    free = storage.free_bytes(out)
    if free is not None and free < nbytes:
        raise RequestError(
            f"no room: the merged checkpoint needs {nbytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {out}",
            remedy="free some space, or choose another output folder",
        )


def _version(source: Source, loras: Sequence[Weighted], dtype: Dtype) -> str:
    """What decides the bytes; where anything lies has no part in it."""
    beside = {**source.beside, **({CONFIG: source.config} if source.config else {})}
    deciding = {
        "revision": REVISION,
        "base": source.checkpoint.fingerprint,
        "beside": {name: [info.etag, info.size] for name, info in beside.items()},
        "adapters": [[one.lora.fingerprint, one.weight] for one in loras],
        "dtype": dtype,
    }
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()[:16]


def _record(source: Source, loras: Sequence[Weighted], dtype: Dtype, version: str, files: Sequence[File]) -> File:
    document = {
        "version": version,
        "revision": REVISION,
        "base": {"fingerprint": source.checkpoint.fingerprint},
        "adapters": [{"fingerprint": one.lora.fingerprint, "weight": one.weight} for one in loras],
        "dtype": dtype,
        "files": {file.name: file.size for file in files},
    }
    return _document(folder.RECORD, documents.text(document))


def _files(source: Source, plans: Sequence[ShardPlan], dtype: Dtype, fitted: Fitted) -> Iterator[File]:
    """All of the checkpoint, its record aside."""
    for name, info in source.beside.items():
        yield File(name, info.size, partial(shards.copied, info, 0, info.size))
    if source.index is not None:
        yield _document(storage.basename(source.index.url), documents.index(source.index, plans))
    for plan in plans:
        yield File(plan.shard.name, plan.size, partial(shards.chunks, plan), weights=True)
    if source.config is not None:
        name, eight = "" if dtype == "base" else dtype, bool(_in_eight_bits(source))
        yield _document(CONFIG, documents.config(source.config, name, fitted.resized, dequantised=eight))


def _document(name: str, data: bytes) -> File:
    return File(name, len(data), lambda: iter([data]))


def _watched(file: File, observer: Observer) -> File:
    def body() -> Iterator[bytes]:
        for chunk in shards.ahead(file.body()):
            yield chunk
            observer.wrote(len(chunk))

    return replace(file, body=body)


def _warnings(source: Source, fitted: Fitted) -> Iterator[str]:
    if fitted.resized:
        before, after = fitted.resized
        yield f"the vocabulary goes from {before} rows to {after}; the tokenizer that is copied is the base's: put the fine-tune's in its place"
    weights = [name for name in source.left_out if not name.endswith((".md", ".json")) and not name.startswith(".")]
    if weights:
        yield f"left behind, since they hold the base's weights still or tell of them: {', '.join(weights[:5])}{' …' if len(weights) > 5 else ''}"
