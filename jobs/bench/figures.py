"""How the tables are written, and the numbers in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def seconds(value: float) -> str:
    """A duration, with three digits.

    >>> seconds(0.01234), seconds(0.5), seconds(12.345), seconds(123.4)
    ('12.3 ms', '500 ms', '12.3 s', '123 s')
    """
    shown, unit = (1000 * value, "ms") if abs(value) < 1 else (value, "s")
    digits = 0 if abs(shown) >= 100 else 1 if abs(shown) >= 10 else 2
    return f"{shown:.{digits}f} {unit}"


def factor(value: float) -> str:
    """How many times.

    >>> factor(61.83), factor(3.14), factor(0.4321)
    ('62×', '3.1×', '0.43×')
    """
    return f"{value:.0f}×" if value >= 10 else f"{value:.1f}×" if value >= 1 else f"{value:.2f}×"


def share(value: float) -> str:
    """A part of a whole.

    >>> share(0.412345)
    '41.23 %'
    """
    return f"{100 * value:.2f} %"


def of_optimal(value: float) -> str:
    """Captured over optimal energy, by what is missing: beyond 1, and nearer to it than 1e-9, it is 1.

    >>> of_optimal(0.9999871), of_optimal(1.0000001), of_optimal(0.98123)
    ('1 − 1.3e-05', '1', '0.9812')
    """
    if value > 1 - 1e-9:
        return "1"
    return f"1 − {1 - value:.1e}" if value > 0.999 else f"{value:.4f}"


def tiny(value: float) -> str:
    """A bound.

    >>> tiny(0.0000123)
    '1.2e-05'
    """
    return f"{value:.1e}"


def lines(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table.

    >>> print(lines(["a", "b"], [["1", "2"]]))
    | a | b |
    |---|---|
    | 1 | 2 |
    """
    return "\n".join(
        [
            "| " + " | ".join(headers) + " |",
            "|" + "---|" * len(headers),
            *("| " + " | ".join(row) + " |" for row in rows),
        ]
    )
