"""The peer of the end-to-end rows: `mergekit-extract-lora`, in an environment of its own, called as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .measure import BenchError, Cost, run_command

VERSION = "0.1.5"
_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def install(root: Path) -> Path:
    """Its command, installed under `root` unless it is there, with the torch of our own environment.

    Raises:
        BenchError: it cannot be installed.
    """
    folder = root / f"mergekit-{VERSION}"
    command = folder / "bin" / "mergekit-extract-lora"
    if command.exists():
        return command
    torch = next(line for line in _CONSTRAINTS.read_text().splitlines() if line.startswith("torch=="))
    uv = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
    environment = {
        **os.environ,
        "UV_FIND_LINKS": os.environ.get("UV_FIND_LINKS") or os.environ.get("PIP_FIND_LINKS", ""),
    }
    for step in (
        [sys.executable, "-m", "venv", str(folder)],
        [*uv, "-c", str(_CONSTRAINTS), torch, f"mergekit=={VERSION}"],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False, env=environment)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BenchError(f"mergekit {VERSION} could not be installed: {last}")
    return command


def extract(command: Path, base: Path, tuned: Path, out: Path, rank: int, options: Sequence[str], threads: int) -> Cost:
    """One run, quietly; `out` must not exist.

    Raises:
        BenchError: it failed, as it does for architectures that it does not know.
    """
    flags = ["--model", str(tuned), "--base-model", str(base), "--out-path", str(out), "--max-rank", str(rank)]
    cost, _ = run_command([str(command), *flags, "--quiet", "--skip-undecomposable", *options], threads=threads)
    return cost


def check_scale(adapter: Path) -> None:
    """Its factors are to be applied at a scale of 1, everywhere; energies are measured as if they were.

    Raises:
        BenchError: they are not.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    if config["r"] != config["lora_alpha"] or config.get("rank_pattern") != config.get("alpha_pattern"):
        raise BenchError(f"{adapter.name}: an adapter with a scale other than 1")
