"""A process that Ray has been in tells its exit code, whatever native code does at its end."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

# What the static destructors of a library do to a process when one of its threads is still at work.
_ABORTS_AT_EXIT = (
    "import ctypes; c = ctypes.CDLL(None); c.__cxa_atexit(ctypes.cast(c.abort, ctypes.c_void_p), None, None); "
)


def _run(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--version"], 0), (["run", "no/zoo.yaml"], 2), (["run", "zoo.yaml", "--never"], 2)]
)
def test_the_exit_code_is_the_commands(arguments: list[str], code: int) -> None:
    ended = _run(f"{_ABORTS_AT_EXIT}import ray; from phlora_pipeline import cli; cli.command({arguments})")
    assert ended.returncode == code, ended.stderr
    assert ("error" in ended.stderr.lower()) == (code == 2)
    assert ("phlora-pipeline" in ended.stdout) == (code == 0)  # what was printed has been written


@pytest.mark.parametrize(("given", "code"), [("", 0), ("4", 4)])
def test_a_script_keeps_its_code(given: str, code: int) -> None:
    script = f"""
from phlora_pipeline.cli.leaving import exit_code_kept
with exit_code_kept():
    import ray, sys
    sys.exit({given})"""
    assert _run(_ABORTS_AT_EXIT + script).returncode == code


def test_handlers_registered_later_have_run() -> None:
    script = (
        "import atexit; from phlora_pipeline.cli.leaving import leave_with; leave_with(lambda: 5); import ray; "
        "atexit.register(print, 'handlers have run')"
    )
    ended = _run(_ABORTS_AT_EXIT + script)
    assert (ended.returncode, ended.stdout) == (5, "handlers have run\n")


@pytest.mark.parametrize(
    "spared",
    [
        "from phlora_pipeline import cli; cli.command(['--version'])",  # no Ray
        "from phlora_pipeline.cli.leaving import leave_with; leave_with(lambda: None); import ray",  # no exit code
    ],
)
def test_other_processes_end_as_they_always_do(spared: str) -> None:
    assert _run(_ABORTS_AT_EXIT + spared).returncode == -signal.SIGABRT


def test_a_reader_that_has_gone_is_no_error() -> None:
    script = (
        "import os, sys; from phlora_pipeline.cli.leaving import leave_with; leave_with(lambda: 0); import ray; "
        "print('x'); read, write = os.pipe(); os.dup2(write, 1); os.close(write); os.close(read)"
    )
    assert _run(_ABORTS_AT_EXIT + script).returncode == 0
