"""How well the edge of the rounding noise finds an update's rank, `python -m jobs.noise`: updates of known rank, and none at all.

W_base is of N(0, 0.02) and stored, U = B·A of Gaussian factors with k rows is put on it, and the sum is stored again. The table
has what a rank of all singular values above the edge leaves of U, over what the best of all ranks leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline.lowrank import Noise, below_precision, rounding_noise

SHAPES = ((256, 384), (512, 512))
RANKS = (4, 16, 64)
SIZES = (1e-3, 1e-4, 1e-5)
"""Root mean squares of U."""


@dataclass(frozen=True, slots=True)
class Found:
    """Of one update.

    Attributes:
        noise: as the package sees it.
        noise_sq: ‖ΔW − U‖_F².
        delta_sq: ‖ΔW‖_F².
        rank: how many singular values are above the edge.
        best: the rank whose truncation is nearest to U.
        lost: ‖U − ΔW_best‖_F / ‖U‖_F.
        ratio: what `rank` leaves over what `best` leaves.
    """

    noise: Noise
    noise_sq: float
    delta_sq: float
    rank: int
    best: int
    lost: float
    ratio: float


def gaussian(*shape: int, seed: int) -> Tensor:
    """Standard normal entries."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def update(d: int, k: int, rank: int, size: float, *, seed: int = 0) -> Tensor:
    """U (d, k) of this rank, of entries of this root mean square."""
    U = gaussian(d, rank, seed=seed) @ gaussian(rank, k, seed=seed + 1)
    return U * (size / U.square().mean().sqrt())


def weight(d: int, k: int, *, seed: int = 0) -> Tensor:
    """W_base (d, k) before it is stored."""
    return 0.02 * gaussian(d, k, seed=seed + 1000)


def judged(base: Tensor, tuned: Tensor, U: Tensor) -> Found:
    """What the edge says of a stored pair, against all ranks there are; U is what was put on the base."""
    [noise] = rounding_noise([(base, tuned)], [(base.dtype, tuned.dtype)])
    delta, U = tuned.double() - base.double(), U.double()
    left, sigma, right = torch.linalg.svd(delta, full_matrices=False)
    with_u = ((left.mT @ U) * right).sum(dim=1)
    change = torch.cumsum(sigma.square() - 2 * sigma * with_u, 0)  # of the error², triplet by triplet
    none_sq = U.square().sum()
    errors = torch.cat([none_sq.view(1), none_sq + change]).clamp_min(0).sqrt()
    rank, best = int((sigma > noise.edge).sum()), int(errors.argmin())
    lost, ratio = float(errors[best] / none_sq.sqrt()), float(errors[rank] / errors[best])
    return Found(noise, float((delta - U).square().sum()), float(delta.square().sum()), rank, best, lost, ratio)


def of_rank(d: int, k: int, rank: int, size: float, dtype: torch.dtype, *, seed: int = 0) -> Found:
    """Of one update of known rank, stored as its base is."""
    base, U = weight(d, k, seed=seed).to(dtype), update(d, k, rank, size, seed=seed)
    return judged(base, (base.float() + U).to(dtype), U)


def rank_of_rounding(d: int, k: int, before: torch.dtype, after: torch.dtype, *, seed: int) -> int:
    """Of a pair that is one weight, stored as two dtypes."""
    base, tuned = weight(d, k, seed=seed).to(before), weight(d, k, seed=seed).to(after)
    [noise] = rounding_noise([(base, tuned)], [(before, after)])
    return int((torch.linalg.svdvals(tuned.double() - base.double()) > noise.edge).sum())


def table() -> Iterator[str]:
    """Rows of Markdown."""
    yield "| stored as | d × k | rms of U | its rank | changed | noise: expected, true | best rank | it leaves | rank above the edge | leaves, over the best |"
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for dtype in (torch.bfloat16, torch.float16):
        for d, k in SHAPES:
            for size in SIZES:
                for rank in RANKS:
                    found = of_rank(d, k, rank, size, dtype)
                    masked = ", below storage precision" if below_precision(found.noise.changed) else ""
                    yield (
                        f"| {str(dtype).removeprefix('torch.')} | {d} × {k} | {size:.0e} | {rank} | {found.noise.changed:.0%}{masked} |"
                        f" {found.noise.total_sq / found.delta_sq:.2%}, {found.noise_sq / found.delta_sq:.2%} | {found.best} |"
                        f" {found.lost:.3f} | {found.rank} | {found.ratio:.3f} |"
                    )
    yield ""
    for before, after in (
        (torch.float32, torch.bfloat16),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float16),
    ):
        none = sum(not rank_of_rounding(256, 384, before, after, seed=seed) for seed in range(100))
        yield f"{before} → {after}, the same weight: rank 0 in {none} of 100"


if __name__ == "__main__":
    for line in table():
        print(line)
