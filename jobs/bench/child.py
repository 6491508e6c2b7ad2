"""Runs one command and writes what it cost, as JSON: `python child.py RESULT COMMAND …`.

A process of its own that imports nothing large: Linux counts the memory of the process that starts a command into that
command's peak, so a benchmark that holds a gigabyte would find one in every child.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path


def main(result: str, command: list[str]) -> int:
    """Run `command` with this process' own stdout and stderr; its exit code is passed on.

    Written to `result`: `wall` seconds from start to end, `processor` seconds (user and system, with those of its own
    children), and `peak_mib`, the largest resident size of it or any of its children, mapped files included.
    """
    began = time.perf_counter()
    pid = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(pid, 0)
    cost = {
        "wall": time.perf_counter() - began,
        "processor": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    Path(result).write_text(json.dumps(cost))
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code  # as a shell tells of signals


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
