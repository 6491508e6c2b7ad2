"""What this machine offers to one worker: processors and memory, as its container sees them."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_threads() -> int:
    """Processor threads of one worker, unless the user says otherwise: all, at most 8."""
    return min(processors(), 8)


def available_memory() -> int | None:
    """Bytes that can be allocated without swapping or being killed; None where neither is told."""
    limits = [value for path in _CGROUP_LIMITS if (value := _number(path)) is not None]
    limits += [
        value
        for line in _lines("/proc/meminfo")
        if line.startswith("MemAvailable:")
        for value in [int(line.split()[1]) * 1024]
    ]
    return min(limits, default=None)


@functools.cache
def has_bfloat16_units() -> bool:
    """Whether the processor multiplies bfloat16 in hardware: AVX-512 BF16 or AMX, or ARM's `bf16`."""
    wanted = {"avx512_bf16", "amx_bf16", "bf16"}
    flags = (
        line.partition(":")[2].split() for line in _lines("/proc/cpuinfo") if line.startswith(("flags", "Features"))
    )
    return not wanted.isdisjoint(next(flags, []))


def _number(path: str) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: str) -> list[str]:
    with contextlib.suppress(OSError):
        return Path(path).read_text().splitlines()
    return []
