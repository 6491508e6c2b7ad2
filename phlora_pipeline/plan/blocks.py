"""Pairs of tensors, and the blocks that they are stored in: a pure function of one model's headers."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from phlora_pipeline.checkpoint import TensorRef
from phlora_pipeline.targets import Kind

BLOCK_BYTES = 96 << 20
"""Cap of one block's ΔW in float32: what a worker holds, and loses if it dies."""

Purpose = Literal["factor", "measure"]


@dataclass(frozen=True, slots=True)
class TensorPair:
    """The same weight in both checkpoints, as a matrix.

    Attributes:
        module: its module.
        kind: of layer.
        base, tuned: its two sides: a kernel flattened, a vocabulary cut to the rows that both have.
        kernel: of a convolution (channels, height …), what its inputs were before they were flattened; else empty.
        rows: of the base's matrix, which the adapter is for; more than the pair's where the fine-tune has fewer.
    """

    module: str
    kind: Kind
    base: TensorRef
    tuned: TensorRef
    kernel: tuple[int, ...] = ()
    rows: int = 0

    @property
    def name(self) -> str:
        """The tensor's name."""
        return self.tuned.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, the same on both sides."""
        return self.tuned.shape

    @property
    def numel(self) -> int:
        """Its number of entries."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes to read, both sides."""
        return self.base.nbytes + self.tuned.nbytes

    @property
    def read_bytes(self) -> int:
        """Bytes in memory, both sides, once they are read."""
        return self.base.read_bytes + self.tuned.read_bytes


@dataclass(frozen=True, slots=True)
class Block:
    """Tensors of one shape of one model: the unit that is stored.

    Attributes:
        id: names the part; a pure function of the model's headers.
        purpose: `factor` for weights that are adapted; `measure` for others, of which only ‖ΔW‖ is wanted.
        pairs: at most `BLOCK_BYTES` of float32 ΔW together, or a single larger one.
    """

    id: str
    purpose: Purpose
    pairs: tuple[TensorPair, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of every tensor in it."""
        return self.pairs[0].shape

    @property
    def delta_bytes(self) -> int:
        """All its ΔW in float32."""
        return 4 * sum(pair.numel for pair in self.pairs)

    @property
    def nbytes(self) -> int:
        """Bytes to read."""
        return sum(pair.nbytes for pair in self.pairs)

    @property
    def read_bytes(self) -> int:
        """Bytes in memory, once it is read."""
        return sum(pair.read_bytes for pair in self.pairs)


def make_blocks(purpose: Purpose, pairs: Sequence[TensorPair]) -> list[Block]:
    """Tensors of one shape together, by name, up to `BLOCK_BYTES` each."""
    by_shape: dict[tuple[int, ...], list[TensorPair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.name):
        by_shape.setdefault(pair.shape, []).append(pair)
    blocks = []
    for shape, same in sorted(by_shape.items()):
        each = max(1, BLOCK_BYTES // max(4 * math.prod(shape), 1))
        for start in range(0, len(same), each):
            chunk = tuple(same[start : start + each])
            blocks.append(Block(_id_of(purpose, shape, tuple(pair.name for pair in chunk)), purpose, chunk))
    return blocks


@lru_cache(1 << 16)  # fine-tunes of one base have the same blocks
def _id_of(purpose: Purpose, shape: tuple[int, ...], names: tuple[str, ...]) -> str:
    return f"{purpose}-{'x'.join(map(str, shape)) or 'scalar'}-{digest_of([purpose, *names])[:12]}"


def digest_of(value: object) -> str:
    """What names a value of plain types: 32 hex digits."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:32]
