"""What the machine says of itself, from files that every kernel writes in its own way."""

from __future__ import annotations

import os

import pytest

from phlora_pipeline import machine


@pytest.mark.parametrize(
    ("text", "units"),
    [
        ("processor : 0\nflags\t\t: fpu sse2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_bf16 amx_tile\nflags\t\t: fpu\n", True),
        ("flags\t\t: fpu sse2 avx512f\n", False),
        ("Features\t: fp asimd bf16 i8mm\n", True),
        ("Features\t: fp asimd\n", False),
        ("vendor_id : bf16\n", False),
        ("", False),
    ],
)
def test_units_for_bfloat16_are_among_the_processors_flags(
    text: str, units: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_lines", lambda _: text.splitlines())
    machine.has_bfloat16_units.cache_clear()
    assert machine.has_bfloat16_units() == units
    machine.has_bfloat16_units.cache_clear()


def test_a_machine_without_such_a_file_has_none_that_we_know_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_lines", lambda _: [])
    machine.has_bfloat16_units.cache_clear()
    assert not machine.has_bfloat16_units()
    machine.has_bfloat16_units.cache_clear()
    assert machine.available_memory() is None


def test_threads_are_those_that_this_process_may_use_and_not_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    if hasattr(os, "sched_getaffinity"):
        assert machine.processors() == len(os.sched_getaffinity(0))
    monkeypatch.setattr(machine, "processors", lambda: 96)
    assert machine.default_threads() == 8
    monkeypatch.setattr(machine, "processors", lambda: 3)
    assert machine.default_threads() == 3


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"/sys/fs/cgroup/memory.max": ["max"], "/proc/meminfo": ["MemTotal: 9 kB", "MemAvailable:    2048 kB"]}
    monkeypatch.setattr(machine, "_lines", lambda path: files.get(path, []))
    assert machine.available_memory() == 2048 * 1024
    files["/sys/fs/cgroup/memory.max"] = ["1000000"]
    assert machine.available_memory() == 1_000_000
