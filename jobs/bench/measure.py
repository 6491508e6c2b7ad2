"""What something costs: a call in this process, or a command as a process of its own; and the machine it ran on."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import child

SHORT, LONG, VERY_LONG = 0.05, 2.0, 10.0
"""Seconds: a call is timed up to 25 times below the first, 5 times below the second, 3 times below the third, once above."""

_NOT_INHERITED = (
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS",
    "PYTHONDONTWRITEBYTECODE",  # a start-up without byte code is four times as long, for all alike
)  # fmt: skip
_PATH = re.compile(r"(?:/[\w.+@-]+){2,}")


class BenchError(Exception):
    """Something that is to be measured does not run; one line that says what."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Several calls of the same.

    Attributes:
        seconds: their median.
        fastest: their minimum.
        runs: how many.
    """

    seconds: float
    fastest: float
    runs: int


def timing(seconds: Sequence[float]) -> Timing:
    """A Timing out of the single calls' seconds.

    >>> timing([3.0, 1.0, 2.0])
    Timing(seconds=2.0, fastest=1.0, runs=3)
    """
    return Timing(statistics.median(seconds), min(seconds), len(seconds))


def timed(call: Callable[[], Any], *, at_least: int = 1, first: float | None = None) -> Timing:
    """Call it as often as its length allows, after one call that warms up and, where it is long, counts as well.

    Args:
        at_least: calls, however long they take.
        first: seconds of that first call, where it has been made.
    """
    first = seconds_of(call) if first is None else first
    runs = max(at_least, repeats(first))
    found = [first] if first >= LONG else []
    found += [seconds_of(call) for _ in range(runs - len(found))]
    return timing(found)


def repeats(seconds: float) -> int:
    """How often a call of this length is timed.

    >>> [repeats(seconds) for seconds in (0.001, 0.04, 1, 5, 60)]
    [25, 7, 5, 3, 1]
    """
    if seconds < SHORT:
        return min(25, 5 + int(SHORT / max(seconds, 0.002)) * 2)
    return 5 if seconds < LONG else 3 if seconds < VERY_LONG else 1


def in_turn(first: Callable[[], Any], second: Callable[[], Any], runs: int) -> tuple[Timing, Timing]:
    """Two calls timed alternately, so that a busy minute meets both."""
    pairs = [(seconds_of(first), seconds_of(second)) for _ in range(runs)]
    return timing([pair[0] for pair in pairs]), timing([pair[1] for pair in pairs])


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of one call, per matrix where it does several at once."""
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) / getattr(call, "matrices", 1)


@dataclass(frozen=True, slots=True)
class Cost:
    """One run of a command, or the median of several.

    Attributes:
        wall: seconds from start to end.
        processor: seconds of all its threads, user and system.
        peak_mib: largest resident size, mapped files included.
        runs: how many it is the median of.
    """

    wall: float
    processor: float
    peak_mib: float
    runs: int = 1


def median_cost(costs: Sequence[Cost]) -> Cost:
    """Wall, processor time and memory, each for itself."""
    return Cost(
        wall=statistics.median(cost.wall for cost in costs),
        processor=statistics.median(cost.processor for cost in costs),
        peak_mib=statistics.median(cost.peak_mib for cost in costs),
        runs=len(costs),
    )


def run_command(command: Sequence[str], *, threads: int | None = None) -> tuple[Cost, str]:
    """Run a command to its end; returns its cost and its stdout.

    Args:
        threads: OMP_NUM_THREADS for it; None: as it comes, not as this process was told.

    Raises:
        BenchError: its exit code is not 0; with the last lines that it said.
    """
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "cost.json"
        done = subprocess.run(
            [sys.executable, "-I", child.__file__, str(result), *command],
            capture_output=True, text=True, check=False, env=environment(threads),
        )  # fmt: skip
        if done.returncode != 0:
            said = " / ".join((done.stderr or done.stdout).strip().splitlines()[-3:])
            told = _PATH.sub("…", said)  # it may be saved, and no machine's paths are
            raise BenchError(f"{Path(command[0]).name} ended with exit code {done.returncode}: {told}")
        return Cost(**json.loads(result.read_text())), done.stdout


def environment(threads: int | None) -> dict[str, str]:
    """The environment of this process without settings of threads and byte code."""
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_INHERITED}
    kept |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return kept | ({"OMP_NUM_THREADS": str(threads)} if threads else {})


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it ran; two machines' figures do not compare, nor do two days'.

    Attributes:
        bf16: the processor's units for bf16 products; empty where it has none.
    """

    processor: str
    cores: int
    memory_gib: int
    bf16: str
    torch: str

    def sentence(self) -> str:
        """In words, for the table."""
        units = f"bf16 products by {self.bf16}" if self.bf16 else "no bf16 units: all products in float32"
        return f"{self.processor}, {self.cores} cores, {self.memory_gib} GiB, {units}; torch {self.torch}"


def machine() -> Machine:
    """The machine this runs on."""
    import torch

    known = dict(line.split(":", 1) for line in _lines("/proc/cpuinfo") if ":" in line)
    told = {key.strip(): value.strip() for key, value in known.items()}
    flags = told.get("flags", "").split()
    units = [label for flag, label in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 BF16")) if flag in flags]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Machine(
        told.get("model name", "unknown"), cores, round(memory / 2**30), " and ".join(units), torch.__version__
    )


def stamp(device: str = "cpu") -> dict[str, Any]:
    """What every saved entry carries: when, on what, and how busy that was; and the GPU, where it was one."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    told = {"when": now, "machine": asdict(machine()), "load": round(os.getloadavg()[0], 1)}
    if device == "cpu":
        return told
    import torch

    return {**told, "gpu": torch.cuda.get_device_name(device)}


def _lines(path: str) -> list[str]:
    with suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
