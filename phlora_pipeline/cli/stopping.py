"""What SIGTERM means to a night: the first one asks it to end in order, the second one ends it."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Self

_TOLD = b"stopping: what is in flight is finished, nothing more is begun; a second signal ends it at once\n"


class Stop:
    """While it is entered, SIGTERM is heard here; called, it tells whether one has come."""

    def __init__(self) -> None:
        self._asked = False
        self._here = threading.current_thread() is threading.main_thread()  # no other may have handlers
        self._before: object = None

    def __enter__(self) -> Self:
        if self._here:
            self._before = signal.signal(signal.SIGTERM, self._heard)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._here:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]  # what signal() itself has returned

    def __call__(self) -> bool:
        """Whether to come to an end."""
        # ray.init puts a handler of its own, which exits at once, in the place of ours.
        if self._here and signal.getsignal(signal.SIGTERM) != self._heard:
            signal.signal(signal.SIGTERM, self._heard)
        return self._asked

    def _heard(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        os.write(2, _TOLD)  # print would fail where the signal has interrupted a print
