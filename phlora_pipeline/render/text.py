"""One line, one JSON object, one error: what every result is made of."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from phlora_pipeline.errors import PhloraError


def json_object(record: dict[str, Any]) -> None:
    """On stdout."""
    print(json.dumps(record, indent=2, default=str))


def show_error(error: PhloraError, *, as_json: bool) -> None:
    """Two lines for people; for machines one object as well."""
    if as_json:
        where = {"result": error.result} if error.result else {}
        json_object({"error": error.what, "remedy": error.remedy, "exit_code": error.exit_code, **where})
    line(f"error: {error.what}", sys.stderr)
    if error.remedy:
        line(f"  fix: {error.remedy}", sys.stderr)


def line(text: str, stream: TextIO | None = None) -> None:
    """One line; names in it come from checkpoints, and must not move the cursor or colour the terminal."""
    print(printable(text), file=stream)


def printable(text: str) -> str:
    """Without what would move the cursor or colour the terminal.

    >>> printable("one" + chr(10) + "two" + chr(27)).count(chr(92))
    2
    """
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as they must be: not cut to a width that a log has not got."""
    cells = [tuple(printable(cell) for cell in row) for row in [head, *rows]]
    if len(cells) == 1:
        return
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    for row in cells:
        line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
