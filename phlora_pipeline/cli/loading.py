"""How the heavy half is imported: late, and out of the garbage collector's sight."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Around an import that brings torch, and with it a quarter of a million objects that stay as long as the process.

    The garbage collector would look through them again and again while they are made, and once more at exit: a third of
    the time of a small run. Help and refused settings do without torch, so that it is imported late.
    """
    # OpenMP's threads spin between one thin product and the next, and on a shared machine take the processor from each
    # other: with a short spin a third of the time on a busy one, with none a third more on a quiet one.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
