"""6d: how our wall time grows with rank, with layers, and with fine-tunes that share a base; whole processes, warm.

Every figure is the median of three runs on the Llama-shaped pair, start-up included and shown: of `phlora extract`, and where fine-tunes share
a base, of one night of `phlora run` over a zoo of so many models.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
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
        _point(bench, "rank", rank, bench.llama(sizes.layers), partial(_one, rank=rank))
    for layers in sizes.growth_layers:
        _point(bench, "layers", layers, bench.llama(layers), partial(_one, rank=sizes.rank))
    for tunes in sizes.growth_tunes:
        _point(bench, "fine-tunes", tunes, bench.llama(sizes.layers), partial(_zoo, rank=sizes.rank, tunes=tunes))


Extraction = Callable[[Path, Path, Path], Cost]
"""Base, fine-tune and output folder → the cost of a run; of one that finds its work done, where the output is that of another."""


def _point(bench: Bench, series: str, value: int, pair: tuple[Path, Path], extraction: Extraction) -> None:
    bench.say(f"scaling: {series} {value}")
    runs = min(_RUNS, bench.sizes.runs)
    bench.save({f"{series} {value}": measured(bench.root, pair, extraction, runs) | {"series": series, "value": value}})


def measured(root: Path, pair: tuple[Path, Path], extraction: Extraction, runs: int) -> dict[str, Any]:
    """One point."""
    whole, standing = [], []
    for _ in range(runs):
        with scratch(root) as folder:
            whole.append(extraction(*pair, folder))
            standing.append(extraction(*pair, folder))
    return {
        **measure.stamp(),
        "ours": asdict(measure.median_cost(whole)),
        "start_up": asdict(measure.median_cost(standing)),
    }


def _one(base: Path, tuned: Path, folder: Path, *, rank: int) -> Cost:
    return extract(base, tuned, folder / "ours", rank, OPTIONS)[0]


def _zoo(base: Path, tuned: Path, folder: Path, *, rank: int, tunes: int) -> Cost:
    """A night over so many models; all have the same bytes, of which nothing takes advantage."""
    zoo = folder / "zoo.yaml"
    models = [{"id": f"tune-{number}", "url": str(tuned), "base": "base"} for number in range(tunes)]
    settings = {"rank": rank, "targets": OPTIONS[1]}
    zoo.write_text(
        json.dumps({"output": str(folder / "out"), "bases": {"base": str(base)}, "models": models, "extract": settings})
    )
    return measure.run_command([sys.executable, "-m", "phlora_pipeline", "run", "--json", str(zoo)])[0]
