"""What the demo shows: one row per pair, and under it why an adapter falls short and where it lies. Pure but for `show`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from phlora_pipeline.summary import Summary, percent, reasons, size

from .pairs import Pair, Scores

RANKS = (8, 16, 32, 64)
HEADERS = (
    "model", "adapted", "unchanged", "carried", "left out", *(f"E_{rank}" for rank in RANKS),
    "adapter", "checkpoint", "base", "fine-tuned", "base + r32",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Result:
    """All that is told about one pair.

    Attributes:
        adapter_bytes, checkpoint_bytes: sizes of the weight files.
    """

    pair: Pair
    summary: Summary
    scores: Scores
    adapter_bytes: int
    checkpoint_bytes: int

    @property
    def lost_points(self) -> float:
        """How far base and adapter lie below the fine-tune."""
        return 100 * (self.scores.tuned - self.scores.adapted)


def cells(result: Result) -> list[str]:
    """The row under `HEADERS`."""
    summary, scores = result.summary, result.scores
    left_out = summary.skipped + summary.failed
    return [
        result.pair.name,
        *(str(number) for number in (summary.adapted, summary.unchanged, summary.carried, left_out)),
        *(percent(summary.energy_at.get(rank)) for rank in RANKS),
        size(result.adapter_bytes),
        size(result.checkpoint_bytes),
        *(percent(score) for score in (scores.base, scores.tuned, scores.adapted)),
    ]


def notes(result: Result) -> list[str]:
    """What the row does not say: the metric, what is left out and what that costs, where the adapter is."""
    scores = result.scores
    lines = [f"metric: {result.pair.metric}; base + r32 is {result.lost_points:.1f} points below the fine-tune"]
    lines += [
        f"left out: {number} × {reason}: {percent(share)} of ‖ΔW‖²" for reason, number, share in reasons(result.summary)
    ]
    if scores.matrices is not None and scores.matrices < scores.tuned:
        lines.append(
            f"the fine-tune's own matrices, whole, score {percent(scores.matrices)} in the base: the rest is what --carry all keeps beside the factors"
        )
    lines.append(f"adapter: {_shown(result.pair.adapter)}")
    return lines


def show(results: Sequence[Result]) -> None:
    """Print the table to stdout: drawn on a terminal, plain columns elsewhere."""
    rows = [cells(result) for result in results]
    if sys.stdout.isatty():
        _draw(rows)
    else:
        print("\n".join(plain([list(HEADERS), *rows])))
    for result in results:
        print(f"\n{result.pair.name}")
        print("\n".join(f"  {line}" for line in notes(result)))


def plain(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns two blanks apart, the first to the left and numbers to the right.

    >>> plain([["model", "E_8"], ["a", "40.0 %"]])
    ['model     E_8', 'a      40.0 %']
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _draw(rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, lines = Console(), [list(HEADERS), *(list(row) for row in rows)]
    borders = 3 * len(HEADERS) + 1
    if len(plain(lines)[0]) - 2 * (len(HEADERS) - 1) + borders > console.width:
        lines = [list(column) for column in zip(*lines, strict=True)]  # a narrow terminal gets a column per model
    table = Table(title="Base + LoRA against the full fine-tune")
    for number, header in enumerate(lines[0]):
        table.add_column(header, justify="right" if number else "left")
    for line in lines[1:]:
        table.add_row(*line)
    console.print(table)


def _shown(path: Path) -> str:
    """Relative to where the command was started, when it is below."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
