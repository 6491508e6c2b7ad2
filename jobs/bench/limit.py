"""6c: our wall time over what no implementation of the same algorithm on this machine can go below.

The limit is the larger of two times, both measured in the same minute as the run: reading the bytes that the run read, by the
faster of one and two threads into a buffer that stays in cache; and the algorithm's own products, at the rate that the
same product of the same shapes reaches here alone, in bf16 where the processor has the units. They overlap, hence the
larger one. Twice: from the page cache, and with the pair's pages dropped from it before each run and each reading.
Start-up (a run with nothing to do) is taken off and shown.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from phlora_pipeline.extract import profile_of
from phlora_pipeline.lowrank import routes
from phlora_pipeline.machine import has_bfloat16_units, processors

from . import measure, pairs
from .end_to_end import extract, scratch
from .measure import Cost
from .settings import Bench

OPTIONS = ("--targets", "linear")
_BUFFER = 1 << 22


@dataclass(frozen=True, slots=True)
class Work:
    """The products with one ΔW that the algorithm needs.

    Attributes:
        low, precise: floating-point operations, in low precision and in float32.
        low_columns, precise_columns: how many columns each of these products has.
    """

    low: float
    low_columns: int
    precise: float
    precise_columns: int


def algorithm_work(d: int, k: int, rank: int) -> Work:
    """What one (d, k) matrix needs by the route that the package plans for it on this machine, if its first round does."""
    profile = profile_of(torch.device("cpu"))
    rounds, _ = routes.planned(d, k, min(rank, d, k), "auto", profile)
    if not rounds:
        whole = routes.flops(d, k, rank, "auto", profile)
        return Work(0.0, 0, whole, min(d, k))
    low, precise = routes.krylov_work(min(d, k), max(d, k), rounds[0])
    return Work(low, rounds[0].block, precise, rounds[0].kept)


def run(bench: Bench) -> None:
    """From the page cache, and from storage."""
    base, tuned = bench.llama(bench.sizes.layers)
    for name, cold in (("from the page cache", False), ("from storage", True)):
        bench.say(f"limit: {name}")
        bench.save({name: measured(bench, base, tuned, cold=cold)})


def measured(bench: Bench, base: Path, tuned: Path, *, cold: bool) -> dict[str, Any]:
    """Our runs, and the two rates before and after them; the better rate counts."""
    files = [base / "model.safetensors", tuned / "model.safetensors"]
    rank, sizes = bench.sizes.rank, bench.sizes
    shapes = [
        shape
        for name, shape in pairs.llama_shapes(sizes.layers, sizes.hidden, sizes.inner, sizes.vocab).items()
        if "_proj" in name
    ]
    rates = [reading_rate(files, cold=cold)]
    with scratch(bench.root) as folder:
        whole, standing, said = _runs(bench, base, tuned, folder, files if cold else [])
    rates.append(reading_rate(files, cold=cold))
    reading = said["read_bytes"] / max(rates)
    products = product_seconds(shapes, rank)
    work = whole.wall - standing.wall
    return {
        **measure.stamp(),
        "rank": rank,
        "read_bytes": said["read_bytes"],
        "ours": asdict(whole),
        "start_up": asdict(standing),
        "reading_seconds": reading,
        "reading_bytes_per_second": max(rates),
        **products,
        "limit_seconds": max(reading, products["products_seconds"]),
        "ratio": work / max(reading, products["products_seconds"]),
    }


def _runs(
    bench: Bench, base: Path, tuned: Path, folder: Path, dropped: Sequence[Path]
) -> tuple[Cost, Cost, dict[str, Any]]:
    whole: list[Cost] = []
    standing: list[Cost] = []
    said: dict[str, Any] = {}
    for turn in bench.turns():
        shutil.rmtree(folder / "ours", ignore_errors=True)
        drop(dropped)
        cost, said = extract(base, tuned, folder / "ours", bench.sizes.rank, OPTIONS)
        again, _ = extract(base, tuned, folder / "ours", bench.sizes.rank, OPTIONS)
        if turn:
            whole.append(cost)
            standing.append(again)
    return measure.median_cost(whole), measure.median_cost(standing), said


def drop(files: Sequence[Path]) -> None:
    """Ask the kernel to forget these files' pages."""
    for path in files:
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def reading_rate(files: Sequence[Path], *, cold: bool) -> float:
    """Bytes per second of reading these files to the end, the best of three rounds with one and with two threads."""
    nbytes, best = sum(path.stat().st_size for path in files), 0.0
    for threads in (1, 2) * 3:
        drop(files if cold else [])
        best = max(best, nbytes / measure.seconds_of(partial(_read, files, threads)))
    return best


def _read(files: Sequence[Path], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for path in files:
            size = path.stat().st_size
            each = -(-size // threads)
            starts = range(0, size, each)
            list(pool.map(_read_range, [path] * len(starts), starts, [min(start + each, size) for start in starts]))


def _read_range(path: Path, start: int, stop: int) -> None:
    buffer = memoryview(bytearray(_BUFFER))
    with path.open("rb", buffering=0) as stream:
        stream.seek(start)
        while start < stop:
            start += stream.readinto(buffer[: min(_BUFFER, stop - start)])


def product_seconds(shapes: Sequence[tuple[int, ...]], rank: int) -> dict[str, Any]:
    """What the algorithm's products take on these matrices at the rates measured for each shape, and those rates."""
    torch.set_num_threads(processors())
    low = torch.bfloat16 if has_bfloat16_units() else torch.float32
    total, rates = 0.0, {}
    for d, k in sorted(set(shapes)):
        work = algorithm_work(d, k, rank)
        for flops, columns, dtype in (
            (work.low, work.low_columns, low),
            (work.precise, work.precise_columns, torch.float32),
        ):
            if flops:
                reached = rate(d, k, columns, dtype)
                rates[f"{d}x{k}, {columns} columns, {str(dtype).removeprefix('torch.')}"] = reached
                total += shapes.count((d, k)) * flops / reached
    return {"products_seconds": total, "flops_per_second": rates}


def rate(d: int, k: int, columns: int, dtype: torch.dtype) -> float:
    """Flops per second of products of a (d, k) matrix with so many columns, or rows: the fastest of 40, for a limit."""
    matrix = torch.randn(d, k).to(dtype)
    fastest = math.inf
    for left, right in ((matrix, torch.randn(k, columns).to(dtype)), (torch.randn(columns, d).to(dtype), matrix)):
        out = torch.empty(left.shape[0], right.shape[1], dtype=dtype)
        fastest = min(fastest, *(measure.seconds_of(partial(torch.mm, left, right, out=out)) for _ in range(20)))
    return 2.0 * d * k * columns / fastest
