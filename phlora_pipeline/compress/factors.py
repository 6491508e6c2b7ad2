"""Every pair of an adapter as the singular value decomposition of its update, as far as it may be kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline import adapter, lowrank
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora import Adapter, LoraModule

BATCH_BYTES = 32 << 20
"""Of factors in float32 that are decomposed at once."""

_COPIES = 8
"""Of a batch, while it is decomposed: as read, wide, its two QR, their products and what is kept."""

_BESIDE = 320 << 20
"""Libraries that are loaded on the way, and what the allocator keeps: measured."""

Sigma = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Compact:
    """One module's update by its singular values.

    Attributes:
        module: where it comes from.
        A: (experts, q, k) float32, √ΣVᵀ; cut to what may be kept.
        B: (experts, d, q) float32, U√Σ.
        singular_values: all of them, descending; of a stack the roots of the sums of its experts' squares.
        delta_sq: ‖scale·B·A‖_F², over all experts.
    """

    module: LoraModule
    A: Tensor
    B: Tensor
    singular_values: Sigma
    delta_sq: float


def needed_bytes(lora: Adapter, rank: int | None, threads: int) -> int:
    """Memory that `decomposed` takes at most: what is kept of all pairs, in float32, and the batches at work.

    Args:
        lora: whose.
        rank: that is kept of each; None where that is not known before.
        threads: batches at a time.
    """
    pairs = [(module.numel, min(rank or module.rank, module.rank) / module.rank) for module in lora.modules.values()]
    batch = max(BATCH_BYTES, 4 * max(numel for numel, _ in pairs))
    at_work = min(threads * batch, 4 * sum(numel for numel, _ in pairs))
    return _BESIDE + _COPIES * at_work + round(4 * math.fsum(numel * share for numel, share in pairs))


def require_memory(lora: Adapter, rank: int | None, threads: int, free: int | None) -> None:
    """Refuse an adapter whose factors do not fit.

    Args:
        lora, rank, threads: as of `needed_bytes`.
        free: bytes; None where it is not known.

    Raises:
        RequestError: with both numbers.
    """
    needed = needed_bytes(lora, rank, threads)
    if free is None or needed <= free:
        return
    with_rank = "" if rank else "a --rank, which tells before how little of each pair is held; or "
    raise RequestError(
        f"it cannot fit: to compress {lora.url} takes up to {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are there",
        remedy=f"give {with_rank}a machine with more memory, or fewer threads: OMP_NUM_THREADS=1",
    )


def decomposed(lora: Adapter, most: Callable[[LoraModule, Sigma], int], device: torch.device) -> dict[str, Compact]:
    """All of an adapter's modules, those of one shape together.

    Args:
        lora: whose.
        most: rank that is kept of a module with these singular values.
        device: where.

    Raises:
        CheckpointError: an entry of a factor is NaN or infinite.
    """
    batches = list(_batches(lora.modules.values()))
    if device.type != "cpu":
        return {found.module.name: found for batch in batches for found in _compact(batch, most, device)}
    # Side by side, one thread each: a thin QR goes column by column, and two threads wait for each other at every one.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, thread_name_prefix="phlora-compress") as pool:
            done = list(pool.map(lambda batch: _compact(batch, most, device), batches))
    finally:
        torch.set_num_threads(threads)
    return {found.module.name: found for batch in done for found in batch}


def _compact(
    modules: Sequence[LoraModule], most: Callable[[LoraModule, Sigma], int], device: torch.device
) -> list[Compact]:
    """Of modules of one shape and scale."""
    factors = [module.factors() for module in modules]
    A, B = (torch.cat(sides).to(device) for sides in zip(*factors, strict=True))  # (b·experts, r, k), (…, d, r)
    whole = lowrank.compact(A, B, modules[0].scale)
    found, count = [], modules[0].experts
    for number, module in enumerate(modules):
        own = slice(number * count, (number + 1) * count)
        squares = whole.singular_values[own].square().sum(dim=0).tolist()
        sigma = tuple(math.sqrt(square) for square in squares)
        kept = most(module, sigma)
        # Copies, so that what is cut off does not stay in memory.
        cut = [side.cpu().clone() for side in (whole.A[own, :kept], whole.B[own, :, :kept])]
        found.append(Compact(module, cut[0], cut[1], sigma, math.fsum(squares)))
    return found


def written_energy(compact: Compact, rank: int, dtype: torch.dtype) -> float | None:
    """1 − ‖ΔW − B̂·Â‖²/‖ΔW‖² of the factors cut to `rank` and rounded; None of a zero pair.

    Raises:
        RequestError: they overflow the dtype.
    """
    lost = math.fsum(value * value for value in compact.singular_values[rank:])
    for A, B in zip(compact.A[:, :rank], compact.B[..., :rank], strict=True):
        A_written, B_written = adapter.round_factor(A, dtype), adapter.round_factor(B, dtype)
        if not (A_written.isfinite().all() and B_written.isfinite().all()):
            raise RequestError(
                f"the factors of {compact.module.name} overflow {str(dtype).removeprefix('torch.')}",
                remedy="use --dtype bfloat16 or --dtype float32",
            )
        lost += lowrank.rounding_error_sq(A, B, A_written, B_written)
    return 1 - lost / compact.delta_sq if compact.delta_sq else None


def _batches(modules: Iterable[LoraModule]) -> Iterator[list[LoraModule]]:
    groups: dict[tuple[object, ...], list[LoraModule]] = {}
    for module in modules:
        key = (module.experts, module.rank, module.inputs, module.outputs, module.scale)
        groups.setdefault(key, []).append(module)
    for group in groups.values():
        count = max(1, BATCH_BYTES // (4 * group[0].numel))
        yield from (group[start : start + count] for start in range(0, len(group), count))
