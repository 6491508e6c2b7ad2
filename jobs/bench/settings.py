"""What one call of the benchmark is given, and how large its cases are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phlora_pipeline.lowrank import Solver

from . import pairs


@dataclass(frozen=True, slots=True)
class Sizes:
    """The cases.

    Attributes:
        shapes, ranks, spectra: of the kernels: every combination.
        hidden, inner, vocab, layers: of the Llama-shaped pair.
        rank: of the end-to-end rows, the distance to the limit, and the growth with layers and fine-tunes.
        large_rank: of the third end-to-end row.
        growth_ranks, growth_layers, growth_tunes: how cost grows.
        runs: how often our own command is run; the median counts. Where it is once, it is not warmed up either.
        nights, solvers, gpus: of the simulation: every combination.
        zoo: models that are planned.
        calls: tasks that do nothing, which are dispatched.
        ranges: of 8 MiB, which are read from a paced server.
        adapters: that are compressed: d, k, rank before and after.
    """

    shapes: tuple[tuple[int, int], ...]
    ranks: tuple[int, ...]
    spectra: tuple[str, ...]
    hidden: int
    inner: int
    vocab: int
    layers: int
    rank: int
    large_rank: int
    growth_ranks: tuple[int, ...]
    growth_layers: tuple[int, ...]
    growth_tunes: tuple[int, ...]
    runs: int
    nights: tuple[str, ...]
    solvers: tuple[Solver, ...]
    gpus: tuple[int, ...]
    zoo: int
    calls: int
    ranges: int
    adapters: tuple[tuple[int, int, int, int], ...]


FULL = Sizes(
    shapes=((576, 576), (1024, 1024), (2048, 2048), (512, 4096), (2048, 8192), (4096, 4096)),
    ranks=(16, 32, 64, 512),
    spectra=pairs.SPECTRA,
    hidden=2048, inner=5632, vocab=32000, layers=4, rank=32, large_rank=512,
    growth_ranks=(8, 16, 32, 64, 128), growth_layers=(1, 2, 4, 8), growth_tunes=(1, 2, 4), runs=5,
    nights=("40 × 8B", "10 × 70B", "4 × 235B", "all 54"), solvers=("auto", "exact"), gpus=(8, 64, 512), zoo=2000, calls=20_000, ranges=64,
    adapters=((4096, 4096, 128, 32), (1024, 4096, 64, 16)),
)  # fmt: skip
QUICK = Sizes(
    shapes=((96, 96), (48, 128)),
    ranks=(16, 32),
    spectra=("power-0.4", "rank-16"),
    hidden=64, inner=176, vocab=256, layers=2, rank=16, large_rank=32,
    growth_ranks=(8,), growth_layers=(1,), growth_tunes=(2,), runs=1,
    nights=("10 × 70B",), solvers=("auto",), gpus=(8,), zoo=10, calls=400, ranges=4, adapters=((96, 64, 16, 4),),
)  # fmt: skip
"""Shows in a minute that everything runs; its figures mean nothing."""


@dataclass(frozen=True, slots=True)
class Bench:
    """One call of the benchmark.

    Attributes:
        root: scratch folder: pairs, environments, truths; kept between calls.
        sizes: how large the cases are.
        peers: whether mergekit is called.
        others: whether the kernels are timed beside other libraries, and by routes that `auto` does not take.
        say: told what takes time before it is done.
        save: merges what is found into the results, at once: `save({row: {…}})`.
        device: of the kernels, `cpu` or `cuda`.
    """

    root: Path
    sizes: Sizes
    peers: bool
    others: bool
    say: Callable[[str], None]
    save: Callable[[dict[str, Any]], None]
    device: str = "cpu"

    def llama(self, layers: int) -> tuple[Path, Path]:
        """The Llama-shaped pair with so many layers: folders of base and fine-tune."""
        sizes = self.sizes
        return pairs.llama_pair(self.root, layers, sizes.hidden, sizes.inner, sizes.vocab)

    def turns(self) -> range:
        """Of our own command; the one numbered 0 warms byte code and page cache, and does not count."""
        return range(0 if self.sizes.runs > 1 else 1, self.sizes.runs + 1)
