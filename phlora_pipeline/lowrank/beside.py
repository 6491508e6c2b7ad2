"""Work side by side on a processor, each piece on one thread: what is small gains less from two threads than two such do.

One thread each, always: results are the same however many there are. None of the calls may ask for this again: there might
be no thread left.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

import torch

Found = TypeVar("Found")


def side_by_side(calls: Sequence[Callable[[], Found]]) -> list[Found]:
    """What each call returns, in order; none of them runs any more afterwards.

    Raises:
        Exception: what the first of them has raised.
    """
    with _threads() as pool:
        running = [pool.submit(call) for call in calls]
        try:
            return [each.result() for each in running]
        finally:
            for each in running:
                if not each.cancel():
                    each.exception()


@contextmanager
def _threads() -> Iterator[ThreadPoolExecutor]:
    """As many as torch has, while torch itself has one: a thread that starts meanwhile keeps to that."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield _pool(os.getpid(), threads)
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    # For good: every new thread would get a heap of its own, and leave what it has freed there behind. Keyed by process:
    # threads do not survive a fork.
    # Each begins with as many threads for LAPACK as there are processors, and would keep them up to its first large matrix.
    return ThreadPoolExecutor(threads, f"phlora-solve-{process}", torch.set_num_threads, (1,))
