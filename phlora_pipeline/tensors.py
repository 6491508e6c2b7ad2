"""Tensors of a checkpoint: where their bytes are, and how they are read; with their scales, where they have any."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch

from phlora_pipeline import quantised, storage
from phlora_pipeline.quantised import Scaling
from phlora_pipeline.storage import ByteRange

_ALIGNMENT = 64

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scale:
    """What a weight of eight bits is to be multiplied by.

    Attributes:
        ref: all of it.
        scaling: which entries of the weight share one of its entries.
        shape: of the whole weight.
        first: number of the whole weight's entry with which the weight at hand begins.
    """

    ref: TensorRef
    scaling: Scaling
    shape: tuple[int, ...]
    first: int = 0


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A weight in a checkpoint: where its bytes are, and of which content of the shard.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: safetensors' name, such as `BF16`.
        shape: dimensions.
        url: the shard.
        start, stop: its bytes in the shard.
        etag: of the shard, when the header was read.
        scale: what its entries are multiplied by when they are read; None where they are the weight as they stand.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    url: str
    start: int
    stop: int
    etag: str
    scale: Scale | None = None

    @property
    def nbytes(self) -> int:
        """Bytes as stored, with those of its scale."""
        return self.stop - self.start + (self.scale.ref.nbytes if self.scale else 0)

    @property
    def read_bytes(self) -> int:
        """Bytes in memory, once it is read: with a scale it becomes float32."""
        return 4 * math.prod(self.shape) if self.scale else self.nbytes

    @property
    def matrix(self) -> TensorRef:
        """The same bytes as a matrix: a convolution's kernel (d, k₁, k₂ …) flattened to (d, k₁k₂…)."""
        return replace(self, shape=(self.shape[0], math.prod(self.shape[1:])))

    def rows(self, count: int) -> TensorRef:
        """Its first rows."""
        return replace(self.entries(0, count * math.prod(self.shape[1:])), shape=(count, *self.shape[1:]))

    def entries(self, start: int, stop: int) -> TensorRef:
        """Some of its entries, in row-major order, as a vector; as many as there are up to `stop`."""
        numel = math.prod(self.shape)
        each, stop = (self.stop - self.start) // max(numel, 1), min(stop, numel)
        return replace(
            self,
            shape=(stop - start,),
            start=self.start + each * start,
            stop=self.start + each * stop,
            scale=replace(self.scale, first=self.scale.first + start) if self.scale else None,
        )


def room_for(refs: Iterable[TensorRef]) -> int:
    """Bytes of memory that `read_tensors` fills for these."""
    return sum(_aligned(ref.read_bytes) + (room_for([ref.scale.ref]) if ref.scale else 0) for ref in refs)


def read_tensors(refs: Sequence[TensorRef], memory: memoryview | None = None) -> list[torch.Tensor]:
    """The tensors themselves, on the CPU, read in parallel: in their stored dtypes, or with their scales in float32.

    Args:
        refs: which.
        memory: where to, `room_for(refs)` bytes or more, for as long as the tensors are used; None for memory of their own.

    Raises:
        SourceChangedError: a shard is no longer the one whose header was read.
    """
    rooms = [room_for([ref]) for ref in refs]
    if memory is None:
        buffers = [memoryview(bytearray(room)) for room in rooms]
    else:
        starts = accumulate(rooms, initial=0)
        buffers = [memory[start : start + room] for start, room in zip(starts, rooms, strict=False)]
    wanted = [piece for ref, buffer in zip(refs, buffers, strict=True) for piece in _pieces(ref, buffer)]
    storage.read_ranges([piece for piece in wanted if piece.into])
    return [_as_tensor(ref, buffer) for ref, buffer in zip(refs, buffers, strict=True)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _pieces(ref: TensorRef, buffer: memoryview) -> list[ByteRange]:
    """What is read, and where to: what becomes float32 lies at the end of its room, and is spread out from there."""
    last = ref.read_bytes
    own = ByteRange(ref.url, ref.etag, ref.start, buffer[last - (ref.stop - ref.start) : last])
    return [own, *_pieces(ref.scale.ref, buffer[_aligned(last) :])] if ref.scale else [own]


def _as_tensor(ref: TensorRef, buffer: memoryview) -> torch.Tensor:
    dtype, stored = TORCH_DTYPES[ref.dtype], _pieces(ref, buffer)[0].into
    if not stored:
        return torch.empty(ref.shape, dtype=torch.float32 if ref.scale else dtype)
    tensor = torch.frombuffer(stored, dtype=dtype)
    if ref.scale:
        whole = torch.frombuffer(buffer[: ref.read_bytes], dtype=torch.float32)
        scale = _as_tensor(ref.scale.ref, buffer[_aligned(ref.read_bytes) :])
        quantised.dequantise(tensor, scale, ref.scale.scaling, ref.scale.shape, ref.scale.first, whole)
        tensor = whole
    return tensor.reshape(ref.shape)
