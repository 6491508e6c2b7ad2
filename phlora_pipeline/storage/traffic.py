"""What this process has moved since it was last asked: bytes, and tries that did not work out, by reason."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass
from typing import Literal

Reason = Literal["throttled", "conflict", "server", "connection", "damaged"]
"""`throttled`: the store asks for patience. `conflict`: somebody writes the same object. `server`: its own trouble.
`connection`: refused, cut, or silent. `damaged`: other bytes than were sent."""


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of some time.

    Attributes:
        read, written: bytes of objects, not of listings.
        retries: reason → tries that were repeated, or were the last.
    """

    read: int = 0
    written: int = 0
    retries: tuple[tuple[str, int], ...] = ()


_lock = threading.Lock()
_bytes: Counter[str] = Counter()
_retries: Counter[str] = Counter()


def moved(way: Literal["read", "written"], nbytes: int) -> None:
    """Count bytes."""
    with _lock:
        _bytes[way] += nbytes


def failed(reason: Reason) -> None:
    """Count a try."""
    with _lock:
        _retries[reason] += 1


def take_traffic() -> Traffic:
    """What was counted since the last call: who asks takes it along, so that nothing is told twice."""
    with _lock:
        taken = Traffic(_bytes["read"], _bytes["written"], tuple(sorted(_retries.items())))
        _bytes.clear()
        _retries.clear()
    return taken
