"""Work side by side: in order, one thread each, and nothing left running."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from phlora_pipeline.lowrank.beside import side_by_side


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param


def test_results_are_in_order_and_each_has_one_thread(threads: int) -> None:
    def one(number: int) -> tuple[int, int, str]:
        time.sleep(0.02 * (5 - number))
        return number, torch.get_num_threads(), threading.current_thread().name

    found = side_by_side([partial(one, number) for number in range(5)])
    assert [number for number, _, _ in found] == list(range(5))
    assert {each for _, each, _ in found} == {1}
    assert len({name for _, _, name in found}) == threads


def test_two_at_once_are_at_once() -> None:
    torch.set_num_threads(2)
    meeting = threading.Barrier(2, timeout=10)
    assert sorted(side_by_side([meeting.wait, meeting.wait])) == [0, 1]


@pytest.mark.usefixtures("threads")
def test_an_error_is_told_once_nothing_runs_any_more() -> None:
    ended = []

    def slow() -> None:
        time.sleep(0.1)
        ended.append(True)

    with pytest.raises(ZeroDivisionError):
        side_by_side([lambda: 1 / 0, slow])
    started = len(ended)
    time.sleep(0.15)
    assert len(ended) == started


def test_nothing_to_do_is_nothing() -> None:
    assert side_by_side([]) == []
