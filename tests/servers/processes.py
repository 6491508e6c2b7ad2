"""Processes that serve: on loopback, without the network, gone when we are, with a log that is shown when they fail."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

OFFLINE = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def free_port() -> int:
    """A port that nobody listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command until the block ends; then it and its children are ended."""
    # A folder of its own: python -m puts the current one before the libraries.
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*_dies_with_us(), *command], env={**os.environ, **OFFLINE, **environment},
            stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=log.parent, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def done(command: Sequence[str], *, stdin: str = "", check: bool = True) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself; unless its failure is wanted, that is an error with what it said."""
    ended = subprocess.run(
        [*_dies_with_us(), *command], env={**os.environ, **OFFLINE}, input=stdin, capture_output=True, text=True
    )
    if check and ended.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    return ended


def tail(log: Path) -> str:
    """The end of a log, for a message."""
    return f"{log}:\n{log.read_text(errors='replace')[-4000:]}"


def _dies_with_us() -> list[str]:
    # A test run that is killed cannot clean up; the kernel can.
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []
