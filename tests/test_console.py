"""Progress: plain lines where nobody watches, nothing where a machine reads."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from phlora_pipeline import console
from phlora_pipeline.extract import BlockReport, TaskReport
from phlora_pipeline.plan import Task
from tests.test_plan import llama, planned


def drive(reporter: console.Extraction, *, reused: bool = False) -> None:
    plan = planned(llama())
    with reporter:
        reporter.planned(plan)
        reporter.warn("look\x1b[31m out")
        for task in plan.tasks:
            [member] = task.members
            block = BlockReport("", member.part_url, len(member.block.pairs), reused=reused)
            reporter.task_done(TaskReport(task.id, (block,), task.nbytes, 0.1))


def write(reporter: console.Writing) -> None:
    """A retried upload tells its bytes twice."""
    with reporter:
        reporter.planned(2, 3000)
        reporter.warn("look\x1b[31m out")
        for _ in range(5):
            reporter.wrote(1000)


def spend(reporter: console.Night) -> None:
    Night("a", "b").drive(reporter)


def test_lines_tell_the_plan_each_interval_and_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    drive(console.reporter(quiet=False))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0].startswith("15 tensors in 4 tasks")
    assert "warning: look\\x1b[31m out" in lines
    assert re.fullmatch(r"\[[0-9.]+ s\] 15/15 tensors, [0-9.]+ \wB read, [0-9.]+ \wB/s", lines[-1])
    assert len(lines) == 1 + 1 + 4 + 1


def test_lines_are_few_where_the_interval_is_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 3600.0)
    drive(console.reporter(quiet=False))
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_parts_that_stood_already_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    drive(console.reporter(quiet=False), reused=True)
    assert capsys.readouterr().err.endswith(", 4 tasks reused\n")


def test_what_is_written_twice_counts_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    write(console.writer(quiet=False))
    first, _, *lines = capsys.readouterr().err.splitlines()
    assert first == "2 shards, 3.0 kB to write"
    told = [re.sub(r"^\[.*\] |(?<=written).*", "", line) for line in lines]
    assert told == [f"{done}.0 kB of 3.0 kB written" for done in (1, 2, 3, 3, 3, 3)]


ALL = [(drive, console.reporter), (write, console.writer), (spend, console.night_reporter)]
"""Every kind of reporter, and what is told to it."""


@pytest.mark.parametrize(("tell", "make"), ALL)
class TestAll:
    """What holds of each."""

    def test_quiet_only_warns(self, tell: Any, make: Any, capsys: pytest.CaptureFixture[str]) -> None:
        tell(make(quiet=True))
        assert capsys.readouterr() == ("", "warning: look\\x1b[31m out\n")

    def test_nothing_that_was_done_is_nothing_to_tell(
        self, tell: Any, make: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with make(quiet=False):
            pass
        assert capsys.readouterr() == ("", "")

    def test_a_terminal_gets_a_bar_and_no_names_colour_it(
        self, tell: Any, make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_a_terminal(monkeypatch)
        tell(make(quiet=False))
        shown = capsys.readouterr().err
        assert "100 %" in shown
        assert "look\\x1b[31m out" in shown
        assert "\x1b[31m out" not in shown

    def test_time_that_passes_is_told_though_nothing_happens(
        self, tell: Any, make: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "INTERVAL", 0.02)
        with make(quiet=False) as reporter:
            time.sleep(0.2)
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) >= 2
        assert all(line.endswith(f"s] {reporter.first}") for line in lines)

    def test_the_ticker_ends_however_that_ends(self, tell: Any, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console, "INTERVAL", 0.01)
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt), make(quiet=False):
            raise KeyboardInterrupt
        assert threading.active_count() == before


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")


def elsewhere(task: Task, folder: str) -> Task:
    """The same task with its parts in a folder."""
    members = (replace(member, part_url=f"/{folder}{member.part_url}") for member in task.members)
    return replace(task, members=tuple(members))


class Night:
    """A night of real tasks, told to a reporter step by step."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.tasks = [elsewhere(task, model) for model in models for task in planned(llama()).tasks]

    def task_done(self, reporter: console.Night, number: int, nbytes: int = 1000) -> None:
        task = self.tasks[number]
        blocks = tuple(BlockReport("", member.part_url, len(member.block.pairs)) for member in task.members)
        reporter.task_done(TaskReport(task.id, blocks, nbytes, 0.1))

    def drive(self, reporter: console.Night) -> None:
        with reporter:
            reporter.looked([])
            reporter.planned(self.tasks, len(self.models))
            for number in range(len(self.tasks)):
                self.task_done(reporter, number)
            for model in self.models[:-1]:
                reporter.model_done(model, "committed", "")
            reporter.model_done(self.models[-1], "failed", "1 of 15 tensors\x1b[31m failed")
            reporter.warn("look\x1b[31m out")


class TestNight:
    """Progress of a night."""

    def test_lines_tell_models_tensors_rate_and_time_left(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "INTERVAL", 0.0)
        Night("a", "b").drive(console.night_reporter(quiet=False))
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        assert captured.out == ""
        assert lines[:2] == ["there are no models in the zoo", lines[1]]
        assert lines[1].startswith("2 models, 30 tensors in 8 tasks, ")
        assert re.fullmatch(r"\[[0-9.]+ s\] 0/2 models, \d+/30 tensors, [0-9.]+ \wB/s, ETA [0-9.]+ m?s", lines[2])
        assert lines[-1].startswith("[")
        assert "] 2/2 models, 30/30 tensors, " in lines[-1]
        assert "ETA" not in lines[-1]
        assert "warning: look\\x1b[31m out" in lines

    def test_a_failure_has_a_line_with_its_reason_and_a_success_has_none(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "INTERVAL", 3600.0)
        Night("a", "b").drive(console.night_reporter(quiet=False))
        err = capsys.readouterr().err
        assert "b: failed: 1 of 15 tensors\\x1b[31m failed\n" in err
        assert "a: " not in err
        assert "\x1b" not in err
        assert len(err.splitlines()) == 5

    def test_time_that_passes_is_told_though_nothing_happens_and_no_two_lines_are_equal(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(console, "INTERVAL", 0.15)
        night = Night("a")
        with console.night_reporter(quiet=False) as reporter:
            time.sleep(0.5)
            reporter.planned(night.tasks, 1)
            night.task_done(reporter, 0)
            time.sleep(1)
        lines = capsys.readouterr().err.splitlines()
        assert sum("looking at checkpoints" in line for line in lines) >= 2
        assert sum("0/1 models" in line for line in lines) >= 3
        assert len(set(lines)) == len(lines)

    def test_a_terminal_gets_a_bar_and_the_failures_above_it(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        on_a_terminal(monkeypatch)
        Night("a", "b").drive(console.night_reporter(quiet=False))
        shown = capsys.readouterr().err
        assert "2/2 models, 30/30 tensors" in shown
        assert "100 %" in shown
        assert "b: failed: 1 of 15 tensors\\x1b[31m failed" in shown

    def test_the_time_left_is_by_cost_not_by_count(self) -> None:
        night = Night("a")
        reporter = console.night_reporter(quiet=True)
        reporter.expect(night.tasks, now=100.0)
        assert reporter.pace.left(101.0) is None
        costs = [task.cost for task in night.tasks]
        share = costs[0] / sum(costs)
        night.task_done(reporter, 0, 5_000_000)
        assert reporter.pace.share == pytest.approx(share)
        assert reporter.pace.left(110.0) == pytest.approx(10 * (1 - share) / share)
        assert reporter.pace.rate(110.0) == pytest.approx(500_000)

    def test_what_is_tried_again_never_makes_more_than_all(self) -> None:
        night = Night("a")
        reporter = console.night_reporter(quiet=True)
        reporter.model_done("a", "committed", "")  # one was refused before anything was planned
        reporter.planned(night.tasks, 1)
        for task in [*night.tasks, *(elsewhere(task, "again") for task in night.tasks)]:
            blocks = tuple(BlockReport("", member.part_url, len(member.block.pairs)) for member in task.members)
            reporter.task_done(TaskReport(task.id, blocks, 1, 0.1))
        reporter.model_done("a", "committed", "")
        assert (reporter.models, reporter.all_models) == (2, 2)
        assert (reporter.tensors, reporter.all_tensors) == (30, 30)
        assert reporter.pace.share == 1.0
        assert reporter.pace.left(1.0) is None
