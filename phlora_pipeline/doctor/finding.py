"""What the doctor says of one thing: it is well, or what is wrong and what helps; and which of them is the worst."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

from phlora_pipeline.errors import PhloraError

State = Literal["ok", "warning", "wrong", "skipped"]
"""`warning`: a night would run, and somebody would wonder. `wrong`: it would not, or would fail models. `skipped`: not looked at."""

WORST_FIRST = (2, 11, 12, 14, 13, 3)
"""A wrong request first: of all that can be wrong it alone is not mended by trying again."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor's.

    Attributes:
        check: what was looked at.
        state: see `State`.
        told: what was found.
        remedy: what to do about it; empty where nothing is to be done, or nothing is known.
        exit_code: that a night would end with because of it; 0 unless it is wrong.
    """

    check: str
    state: State
    told: str
    remedy: str = ""
    exit_code: int = 0


@dataclass(frozen=True, slots=True)
class Worry:
    """What a look returns that has found no error, and yet something that somebody should know."""

    told: str
    remedy: str


def examined(check: str, look: Callable[[], str | Worry]) -> Finding:
    """What comes of a look, which tells what it has found, or raises what is wrong."""
    try:
        told = look()
    except PhloraError as error:
        return Finding(check, "wrong", error.what, error.remedy, error.exit_code)
    if isinstance(told, Worry):
        return Finding(check, "warning", told.told, told.remedy)
    return Finding(check, "ok", told)


def skipped(check: str, why: str) -> Finding:
    """Not looked at, and why."""
    return Finding(check, "skipped", why)


def exit_code(findings: Iterable[Finding]) -> int:
    """Of the worst.

    >>> exit_code([Finding("a", "wrong", "", exit_code=14), Finding("b", "ok", ""), Finding("c", "wrong", "", exit_code=11)])
    11
    """
    codes = {finding.exit_code for finding in findings if finding.exit_code}
    return next((code for code in WORST_FIRST if code in codes), max(codes, default=0))
