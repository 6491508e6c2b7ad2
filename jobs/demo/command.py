"""The `phlora` command, called as a user would: another process, its stdout as JSON, its stderr let through."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import DemoError

RANK, MAX_RANK = 32, 64


@dataclass(frozen=True, slots=True)
class Done:
    """One call that has ended.

    Attributes:
        said: the JSON object it printed.
        seconds: how long it took.
    """

    exit_code: int
    said: dict[str, Any]
    seconds: float


def extract(base: Path, tuned: Path, out: Path, options: Sequence[str] = (), *, expect: int = 0) -> Done:
    """`phlora extract`, for PEFT: no server among those of the portable dialect takes these model types."""
    ranks = ["--rank", str(RANK), "--max-rank", str(MAX_RANK)]
    return phlora(
        "extract",
        "--base",
        str(base),
        "--tuned",
        str(tuned),
        "--out",
        str(out),
        *ranks,
        *options,
        "--for",
        "peft",
        "--json",
        expect=expect,
    )


def verify(base: Path, tuned: Path, adapter: Path) -> Done:
    """`phlora verify`: measures the adapter's bytes against the two checkpoints."""
    return phlora("verify", "--base", str(base), "--tuned", str(tuned), "--adapter", str(adapter), "--json")


def convert(pickle: Path, out: Path) -> Done:
    """`phlora convert`: a pickle becomes `out/model.safetensors`."""
    return phlora("convert", str(pickle), str(out), "--json")


def phlora(*arguments: str, expect: int = 0) -> Done:
    start = time.monotonic()
    # An error that is expected is nothing to alarm the reader with.
    stderr = subprocess.PIPE if expect else None
    command = [sys.executable, "-m", "phlora_pipeline", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    seconds = time.monotonic() - start
    if done.returncode != expect:
        print(done.stderr or "", end="", file=sys.stderr)
        what = f"`phlora {' '.join(arguments)}` ended with exit code {done.returncode}, expected {expect}"
        raise DemoError(
            what, remedy="its own message stands above; what another version has left can be removed by hand"
        )
    try:
        said = json.loads(done.stdout)
    except ValueError as error:
        raise DemoError(
            f"`phlora {arguments[0]} --json` printed no JSON: {done.stdout[:200]!r}",
            remedy="this is a bug; please report it",
        ) from error
    return Done(done.returncode, said, seconds)
