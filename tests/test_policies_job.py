"""The job that compares policies judges what it has measured."""

from __future__ import annotations

from dataclasses import replace

from jobs.policies.__main__ import HEADERS, Row, short

FIXED = Row("a", "rank 8", "8", 1000, 0.5, 0.1, 0.9, 0.8)
BUDGET = replace(FIXED, policy="budget, as rank 8", ranks="3 to 12, median 8", kept=0.6)


def test_a_budget_that_keeps_less_or_takes_more_than_its_fixed_rank_is_named() -> None:
    other = replace(FIXED, pair="b", kept=0.9)
    assert short([FIXED, BUDGET, other]) == []
    [told] = short([FIXED, replace(BUDGET, kept=0.4)])
    assert told.startswith("a: budget, as rank 8 keeps 0.4")
    assert len(short([FIXED, replace(BUDGET, file_bytes=1001)])) == 1


def test_a_row_has_a_cell_for_every_header() -> None:
    assert len(BUDGET.cells) == len(HEADERS)
    assert replace(BUDGET, adapted=None).cells[-1] == "–"
