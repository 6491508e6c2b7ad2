"""Two of the bad nights of `make chaos`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(700)
def test_two_nights_in_which_nodes_workers_and_the_driver_are_killed() -> None:
    """In a process of its own: a process can be in one Ray cluster only."""
    pytest.importorskip("ray")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, "-m", "jobs.chaos", "--seeds", "2"],
        cwd=Path(__file__).parents[2], env=clean, capture_output=True, text=True, timeout=680,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "2 of 2 nights as undisturbed" in done.stdout
