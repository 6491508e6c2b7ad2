"""An adapter's factors at a smaller rank: from the factors alone, beside a full SVD of B·A. One pair in memory, float32.

The pair is a truncated SVD of a power law, mixed by a random matrix, so that neither factor is orthogonal. Beside the full SVD
B·A is already formed; its forming costs little. Ours has one thread, as each of an adapter's modules has; the SVD has all. The optimum is the full SVD's own, in float64 where that takes seconds only.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from phlora_pipeline import lowrank
from phlora_pipeline.machine import processors

from . import measure
from .settings import Bench

DECAY = 0.4


def run(bench: Bench) -> None:
    """Every case, saved one by one."""
    for d, k, before, after in bench.sizes.adapters:
        bench.say(f"compress: {d}×{k}, rank {before} → {after}")
        bench.save({f"{d}x{k} {before}→{after}": measured(d, k, before, after)})


def measured(d: int, k: int, before: int, after: int) -> dict[str, Any]:
    """Both ways on one pair, and what each keeps of it."""
    A, B = factors(d, k, before)
    whole = B @ A
    torch.set_num_threads(1)
    compact = measure.timed(lambda: lowrank.compact(A[None], B[None]), at_least=5)
    found = lowrank.compact(A[None], B[None])
    torch.set_num_threads(processors())
    svd = measure.timed(lambda: torch.linalg.svd(whole, full_matrices=False))
    total = float(whole.double().square().sum())
    kept = (
        1
        - float((whole.double() - found.B[0, :, :after].double() @ found.A[0, :after].double()).square().sum()) / total
    )
    best = torch.linalg.svdvals(torch.linalg.qr(B.double())[1] @ torch.linalg.qr(A.mT.double())[1].mT).square()
    return {
        **measure.stamp(),
        "threads": torch.get_num_threads(),
        "ours": asdict(compact),
        "svd": asdict(svd),
        "faster": svd.seconds / compact.seconds,
        "captured": kept,
        "loss": float(best[:after].sum() / best.sum()) - kept,
    }


def factors(d: int, k: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, k) and B (d, rank) whose product has σ_i = i^−0.4."""
    generator = torch.Generator().manual_seed(4)
    U, V = (torch.linalg.qr(torch.randn(size, rank, generator=generator))[0] for size in (d, k))
    mix = torch.linalg.qr(torch.randn(rank, rank, generator=generator))[0]
    mix = torch.linspace(0.3, 3, rank)[:, None] * mix
    return torch.linalg.solve(mix, V.mT), (U * torch.arange(1, rank + 1).float() ** -DECAY) @ mix
