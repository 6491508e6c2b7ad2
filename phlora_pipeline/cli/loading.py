"""How the heavy half is imported: late, and out of the garbage collector's sight."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

_M_ARENA_MAX = -8
"""Of glibc's `malloc.h`."""


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around an import that brings torch, and with it a quarter of a million objects that stay as long as the process.

    The garbage collector would look through them again and again while they are made, and once more at exit: a third of
    the time of a small run. Help and refused settings do without torch, so that it is imported late.
    """
    # OpenMP's threads spin between one thin product and the next, and on a shared machine take the processor from each
    # other: with a short spin a third of the time on a busy one, with none a third more on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    # One heap for all threads: those that solve would each have their own, and keep there what they have freed.
    with contextlib.suppress(OSError, AttributeError, TypeError):  # a system without glibc
        ctypes.CDLL(None).mallopt(_M_ARENA_MAX, 1)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
