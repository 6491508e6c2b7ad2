"""6d: how our wall time grows with rank, with layers, and with fine-tunes that share a base; whole processes, warm.

Every figure is the median of three runs of `phlora extract` on the Llama-shaped pair, start-up included and shown. Fine-tunes of one base are separate
runs today, one after another: nothing is shared between them but the page cache.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import measure
from .end_to_end import extract, scratch
from .limit import OPTIONS
from .measure import Cost
from .settings import Bench

_RUNS = 3


def run(bench: Bench) -> None:
    """Three series, saved point by point."""
    sizes = bench.sizes
    for rank in sizes.growth_ranks:
        _point(bench, "rank", rank, layers=sizes.layers, rank=rank)
    for layers in sizes.growth_layers:
        _point(bench, "layers", layers, layers=layers, rank=sizes.rank)
    for tunes in sizes.growth_tunes:
        _point(bench, "fine-tunes", tunes, layers=sizes.layers, rank=sizes.rank, tunes=tunes)


def _point(bench: Bench, series: str, value: int, *, layers: int, rank: int, tunes: int = 1) -> None:
    bench.say(f"scaling: {series} {value}")
    base, tuned = bench.llama(layers)
    bench.save({f"{series} {value}": measured(bench, base, tuned, rank, tunes) | {"series": series, "value": value}})


def measured(bench: Bench, base: Path, tuned: Path, rank: int, tunes: int) -> dict[str, Any]:
    """One point: `tunes` runs one after another, several times."""
    runs, standing = min(_RUNS, bench.sizes.runs), []
    whole: list[Cost] = []
    with scratch(bench.root) as folder:
        for _ in range(runs):
            costs = []
            for number in range(tunes):
                out = folder / f"ours-{number}"
                shutil.rmtree(out, ignore_errors=True)
                costs.append(extract(base, tuned, out, rank, OPTIONS)[0])
            whole.append(_sum(costs))
            standing.append(extract(base, tuned, folder / "ours-0", rank, OPTIONS)[0])
    return {
        **measure.stamp(),
        "ours": asdict(measure.median_cost(whole)),
        "start_up": asdict(measure.median_cost(standing)),
    }


def _sum(costs: list[Cost]) -> Cost:
    return Cost(
        sum(cost.wall for cost in costs), sum(cost.processor for cost in costs), max(cost.peak_mib for cost in costs)
    )
