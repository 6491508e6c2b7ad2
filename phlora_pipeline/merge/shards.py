"""A merged shard's bytes, in the base's order: copied as they lie there where nothing changes, summed where something does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from phlora_pipeline import parts, safetensors_format, storage
from phlora_pipeline.checkpoint import TensorRef
from phlora_pipeline.merge.changes import FLOATS, Change, merged, stored
from phlora_pipeline.merge.source import Shard
from phlora_pipeline.quantised import FP8
from phlora_pipeline.storage import ByteRange, ObjectInfo

_CHUNK = 32 << 20


@dataclass(frozen=True, slots=True)
class Target:
    """A tensor as it will be written.

    Attributes:
        ref: the base's.
        dtype: as safetensors names it.
        shape: as written.
        change: what is done to it; None where it stays what it is, in this dtype.
    """

    ref: TensorRef
    dtype: str
    shape: tuple[int, ...]
    change: Change | None

    @property
    def copied(self) -> bool:
        """Whether its bytes are the base's."""
        return self.change is None and self.dtype == self.ref.dtype

    @property
    def nbytes(self) -> int:
        """As written."""
        return safetensors_format.tensor_bytes(self.dtype, self.shape)


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """A shard as it will be written: its first bytes, and the tensors that follow in order."""

    shard: Shard
    header: bytes
    targets: tuple[Target, ...]

    @property
    def size(self) -> int:
        """Of the file."""
        return len(self.header) + sum(target.nbytes for target in self.targets)


def plan_shard(shard: Shard, changes: Mapping[str, Change], dtype: str) -> ShardPlan:
    """How a shard will be written.

    Args:
        shard: of the base.
        changes: tensor → what is done to it.
        dtype: of all floating-point tensors, in safetensors' name; empty for those of the base.
    """
    targets = tuple(_target(ref, changes.get(ref.name), dtype) for ref in shard.refs)
    same = all((target.dtype, target.shape) == (target.ref.dtype, target.ref.shape) for target in targets)
    whole = shard.info.size == len(shard.header) + sum(ref.stop - ref.start for ref in shard.refs)
    if same and whole:
        return ShardPlan(shard, shard.header, targets)
    layout = {target.ref.name: (target.dtype, target.shape) for target in targets}
    return ShardPlan(shard, safetensors_format.build_header(layout, shard.metadata), targets)


def _target(ref: TensorRef, change: Change | None, dtype: str) -> Target:
    kind = dtype if dtype and ref.dtype in FLOATS | FP8 else ref.dtype
    return Target(ref, kind, change.shape if change else ref.shape, change)


def chunks(plan: ShardPlan) -> Iterator[bytes]:
    """The file's bytes."""
    yield plan.header
    for run in _runs(plan.targets):
        if run[0].copied:
            yield from copied(plan.shard.info, run[0].ref.start, run[-1].ref.stop)
        else:
            yield from _summed(run[0])


def ahead(body: Iterator[bytes]) -> Iterator[bytes]:
    """The same bytes; while one piece is written the next is read and summed."""
    with ThreadPoolExecutor(1, thread_name_prefix="phlora-merge") as reader:
        following = reader.submit(next, body, None)
        while (chunk := following.result()) is not None:
            following = reader.submit(next, body, None)
            yield chunk


def copied(info: ObjectInfo, start: int, stop: int) -> Iterator[bytes]:
    """Some of an object's bytes, in pieces.

    Raises:
        SourceChangedError: it is no longer the one that was seen.
    """
    for first in range(start, stop, _CHUNK):
        piece = bytearray(min(_CHUNK, stop - first))
        storage.read_ranges([ByteRange(info.url, info.etag, first, memoryview(piece))])
        yield bytes(piece)


def _summed(target: Target) -> Iterator[bytes]:
    width = target.shape[-1] if target.shape else 1
    change = target.change or Change(target.shape, width or 1)
    for rows in merged(target.ref, change, stored(target.dtype)):
        yield from parts.tensor_chunks(rows)


def _runs(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Tensors that are copied and lie side by side, together; each of the others alone."""
    run: list[Target] = []
    for target in targets:
        if run and not (target.copied and run[-1].copied and target.ref.start == run[-1].ref.stop):
            yield run
            run = []
        run.append(target)
    if run:
        yield run
