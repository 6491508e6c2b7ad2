"""6b: two checkpoints on disk → an adapter on disk, ours beside `mergekit-extract-lora`, each as a whole process.

The pair is Llama-shaped and bf16, in the page cache; its ΔW has σ_i = i^−0.4. Both tools get the same matrices and the same rank and
are called alternately: ours `runs` times, mergekit at its faster thread count (tried in the first row; three runs there,
one in the others, where it takes minutes). Start-up is each one's run with nothing to do: ours where the adapter stands
already; mergekit's on a pair of the same architecture and modules with a hidden size of 64, since it fails where
everything is excluded, and `--help` loads less than it could. Byte code is warm for both. Energies are measured in float64 from what each has
written, tensor by tensor.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from . import adapters, measure, mergekit, pairs
from .measure import BenchError, Cost
from .settings import Bench

TINY = (64, 176, 256)
"""Hidden, inner and vocabulary size of the pair on which mergekit has nothing to do."""


@dataclass(frozen=True, slots=True)
class Case:
    """One row.

    Attributes:
        name: its key in the results.
        ours, theirs: options that choose the same tensors.
        base, tuned: checkpoint folders.
        repeats: runs of mergekit.
    """

    name: str
    rank: int
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    base: Path
    tuned: Path
    repeats: int = 1


def run(bench: Bench) -> None:
    """Every row, saved one by one."""
    sizes, command = bench.sizes, None
    base, tuned = bench.llama(sizes.layers)
    if bench.peers:
        command = mergekit.install(bench.root)
    linear, no_ends = ("--targets", "linear"), ("-e", "embed_tokens", "-e", "lm_head")
    embedding = ("--targets", "all", "--exclude", "lm_head.weight")
    cases = [
        Case("matrices", sizes.rank, linear, no_ends, base, tuned, repeats=3),
        Case("with the embedding", sizes.rank, embedding, ("--embed-lora", "-e", "lm_head"), base, tuned),
        Case("matrices, large rank", sizes.large_rank, linear, no_ends, base, tuned),
    ]
    demo = sorted(Path(".demo").glob("minilm-*/base"))
    if demo:
        taken = (*linear, "--for", "peft")
        cases.append(
            Case("MiniLM", sizes.rank, taken, ("-e", "embeddings"), demo[0], demo[0].parent / "tuned", repeats=3)
        )
    else:
        bench.save(
            {"MiniLM": {**measure.stamp(), "skipped": "no .demo folder with MiniLM's pair: `make run` prepares it"}}
        )
    threads = _faster_threads(bench, command, cases[0]) if command else 0
    for case in cases:
        bench.say(f"end to end: {case.name}, rank {case.rank}")
        bench.save({case.name: measured(bench, case, command, threads)})


def measured(bench: Bench, case: Case, command: Path | None, threads: int) -> dict[str, Any]:
    """One row: ours and mergekit in turn, start-ups, and what was written."""
    with scratch(bench.root) as folder:
        runs = _run(bench, case, command, threads, folder)
        found = {
            **measure.stamp(),
            "rank": case.rank,
            "read_bytes": runs.read_bytes,
            "ours": asdict(measure.median_cost(runs.ours)),
            "ours_start_up": asdict(measure.median_cost(runs.standing)),
        }
        written = {"ours": folder / "ours"}
        if runs.refusal:
            found["mergekit"] = {"skipped": runs.refusal}
        elif command:
            mergekit.check_scale(folder / "mergekit")
            written["mergekit"] = folder / "mergekit"
            found["mergekit"] = {**asdict(measure.median_cost(runs.theirs)), "threads": threads}
            found["mergekit_start_up"] = asdict(_their_start_up(bench, case, command, threads, folder))
        return {**found, "energy": adapters.energies(case.base, case.tuned, written)}


@dataclass(slots=True)
class _Runs:
    """Costs of single runs; ours on a standing adapter as well; why mergekit refused the pair."""

    ours: list[Cost] = field(default_factory=list)
    standing: list[Cost] = field(default_factory=list)
    theirs: list[Cost] = field(default_factory=list)
    read_bytes: int = 0
    refusal: str = ""


def _run(bench: Bench, case: Case, command: Path | None, threads: int, folder: Path) -> _Runs:
    """Both tools in turn; the last adapter of each stays in its folder."""
    runs = _Runs()
    if bench.sizes.runs > 1:  # byte code and page cache
        extract(case.base, case.tuned, folder / "warm", case.rank, case.ours)
    for tool in in_turns(ours=bench.sizes.runs, mergekit=case.repeats if command else 0):
        out = folder / tool
        shutil.rmtree(out, ignore_errors=True)
        if tool == "ours":
            cost, said = extract(case.base, case.tuned, out, case.rank, case.ours)
            runs.read_bytes = said["read_bytes"]
            runs.ours.append(cost)
            runs.standing.append(extract(case.base, case.tuned, out, case.rank, case.ours)[0])
        elif command and not runs.refusal:
            bench.say(f"end to end: {case.name}: mergekit at {threads} threads")
            try:
                cost = mergekit.extract(command, case.base, case.tuned, out, case.rank, case.theirs, threads)
            except BenchError as error:
                runs.refusal = str(error)
            else:
                runs.theirs.append(cost)
    return runs


def in_turns(**runs: int) -> list[str]:
    """The names, each as often as asked for and evenly among the others, so that a busy minute meets all.

    >>> in_turns(ours=4, mergekit=2)
    ['ours', 'mergekit', 'ours', 'ours', 'mergekit', 'ours']
    """
    places = [((number + 0.5) / times, name) for name, times in runs.items() for number in range(times)]
    return [name for _, name in sorted(places, key=lambda place: place[0])]


def extract(base: Path, tuned: Path, out: Path, rank: int, options: Sequence[str]) -> tuple[Cost, dict[str, Any]]:
    """`phlora extract` as a process: its cost, and what it said."""
    command = [sys.executable, "-m", "phlora_pipeline", "extract", "--json", "--rank", str(rank), *options]
    cost, said = measure.run_command([*command, "--base", str(base), "--tuned", str(tuned), "--out", str(out)])
    return cost, json.loads(said)


def _their_start_up(bench: Bench, case: Case, command: Path, threads: int, folder: Path) -> Cost:
    small = pairs.llama_pair(bench.root, bench.sizes.layers, *TINY)
    costs = [
        mergekit.extract(command, *small, folder / f"start-{turn}", case.rank, case.theirs, threads)
        for turn in range(3)
    ]
    return measure.median_cost(costs)


def _faster_threads(bench: Bench, command: Path, case: Case) -> int:
    """OMP_NUM_THREADS with which mergekit is done sooner, of 1 and all processors: one run each."""
    tries = []
    for threads in sorted({1, measure.machine().cores}):
        bench.say(f"end to end: trying mergekit at {threads} threads")
        with scratch(bench.root) as folder:
            cost = mergekit.extract(command, case.base, case.tuned, folder / "try", case.rank, case.theirs, threads)
        tries.append((cost.wall, threads))
    return min(tries)[1]


@contextmanager
def scratch(root: Path) -> Iterator[Path]:
    """An empty folder, removed afterwards."""
    folder = root / "out"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
