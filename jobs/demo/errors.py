"""The demo's own error: what went wrong and what to do about it, printed as one line each."""

from __future__ import annotations


class DemoError(Exception):
    """The demo cannot go on.

    Args:
        what: one line: what was tried and what came of it.
        remedy: one line: what the user can do.
    """

    def __init__(self, what: str, *, remedy: str) -> None:
        super().__init__(what, remedy)
        self.what = what
        self.remedy = remedy
