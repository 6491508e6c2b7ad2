"""A part: what one task stores, and all that is known of its tensors. Encoding and decoding; storage stays outside.

A part is a safetensors file with, for each adapted tensor, `A:<name>` (q, k) and `B:<name>` (d, q) in float32 at the
task's max_rank, and in its metadata one `TensorResult` per tensor. It holds nothing that the rank policy, the dialect or
the adapter's dtype decide, so that an adapter of another rank or dtype can be cut from the same parts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch

from phlora_pipeline import safetensors_format, storage
from phlora_pipeline.checkpoint import TensorRef, open_file, read_tensors
from phlora_pipeline.errors import CheckpointError

Body = Callable[[], Iterator[bytes]]
"""Produces bytes, anew at every call."""

_KEY = "phlora_results"
_CHUNK = 16 << 20


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What a task found out about one tensor pair.

    Attributes:
        name: the tensor.
        status: `factored`: A and B are in the part; `unchanged`: ΔW = 0; `measured`: only its norms were wanted;
            `failed`: see reason.
        reason: in words, where it failed.
        base_sq, tuned_sq, delta_sq: squared Frobenius norms of W_base, W_tuned and ΔW; 0 where it failed.
        noise_sq: squared Frobenius norm, as expected, of what rounding the fine-tune to its stored dtype has left in ΔW.
        noise_edge: singular values below it are noise; 0 where no factors were wanted.
        changed: share of entries that differ, in the rows where any does.
        residual_sq: ‖ΔW − B·A‖_F² with all the factors that are in the part.
        singular_values: up to max_rank of them, descending.
        solver: the route that was taken.
        certificate: c with E_r(optimal) − E_r ≤ c for every r that the part holds.
        notes: what else was tried and why it did not do, in words.
    """

    name: str
    status: Literal["factored", "unchanged", "measured", "failed"]
    reason: str = ""
    base_sq: float = 0.0
    tuned_sq: float = 0.0
    delta_sq: float = 0.0
    noise_sq: float = 0.0
    noise_edge: float = 0.0
    changed: float = 0.0
    residual_sq: float = 0.0
    singular_values: tuple[float, ...] = ()
    solver: str = ""
    certificate: float = 0.0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Part:
    """A stored part, known by its header.

    Attributes:
        results: by tensor name.
        factors: `A:<name>` and `B:<name>` → where their bytes are.
    """

    results: Mapping[str, TensorResult]
    factors: Mapping[str, TensorRef]


def encode(
    results: Sequence[TensorResult], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]
) -> tuple[bytes, list[torch.Tensor]]:
    """Header and payload of a part.

    Args:
        results: one per tensor of the block.
        factors: tensor name → (A (q, k), B (d, q)), float32 on the CPU.

    Returns:
        The file's first bytes, and the tensors whose bytes follow in order.
    """
    ordered = {
        f"{side}:{name}": factors[name][index].contiguous()
        for name in sorted(factors)
        for index, side in enumerate("AB")
    }
    header = safetensors_format.build_header(
        {key: ("F32", tuple(value.shape)) for key, value in ordered.items()},
        {_KEY: json.dumps([asdict(result) for result in results], separators=(",", ":"))},
    )
    return header, list(ordered.values())


def store(url: str, results: Sequence[TensorResult], factors: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Put a part; one that another worker has put first is adopted."""
    header, tensors = encode(results, factors)

    def body() -> Iterator[bytes]:
        yield header
        for tensor in tensors:
            yield from tensor_chunks(tensor)

    storage.put_new(url, body, size=len(header) + sum(tensor.nbytes for tensor in tensors))


def load(url: str) -> Part:
    """A part's header.

    Raises:
        NotFoundError: it is not there.
        CheckpointError: it is not a part of this format.
    """
    tensors, metadata = open_file(url)
    try:
        records = json.loads(metadata[_KEY])
        results = {
            record["name"]: TensorResult(
                **{**record, "singular_values": tuple(record["singular_values"]), "notes": tuple(record["notes"])}
            )
            for record in records
        }
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{url} is not a part of this version's format: {error!r}", remedy="remove the _parts folder and run again"
        ) from error
    return Part(results, tensors)


def read_factor(part: Part, side: str, name: str) -> torch.Tensor:
    """`A` (q, k) or `B` (d, q) of one tensor, float32, on the CPU."""
    return read_tensors([part.factors[f"{side}:{name}"]])[0]


def tensor_chunks(tensor: torch.Tensor) -> Iterator[bytes]:
    """A contiguous CPU tensor's bytes, little-endian, in pieces."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    for start in range(0, len(raw), _CHUNK):
        yield raw[start : start + _CHUNK].tobytes()
