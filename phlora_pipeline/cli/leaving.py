"""The end of a process that Ray has been in: before its native threads can spoil it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def exit_code_kept() -> Iterator[None]:
    """Around all that a process does: the code that `sys.exit` gets in it is what the process tells."""
    ended: list[int] = []
    leave_with(lambda: ended[0] if ended else None)
    try:
        yield
    except SystemExit as told:
        if told.code is None or isinstance(told.code, int):
            ended.append(told.code or 0)
        raise


def leave_with(code: Callable[[], int | None]) -> None:
    """Let this process, where it has loaded Ray, end after Python's exit handlers and before those of native libraries.

    Threads of Ray's client outlive `ray.shutdown()`. One that has something to log while static destructors run finds its logger
    gone, and the process, whose work is done, dies of a segmentation fault and tells 139 (Ray 2.60, in `spdlog::logger::flush_`).

    Args:
        code: asked at the end: the exit code, or None to end as Python would. Handlers that were registered before this call
            are left out, and those registered afterwards have run by then.
    """
    atexit.register(_leave, code)


def _leave(code: Callable[[], int | None]) -> None:
    if "ray._raylet" not in sys.modules or (told := code()) is None:
        return
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(told)
