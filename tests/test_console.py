"""Progress: plain lines where nobody watches, nothing where a machine reads."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import replace

import pytest

from phlora_pipeline import console
from phlora_pipeline.extract import BlockReport, TaskReport
from phlora_pipeline.plan import Task
from tests.test_plan import llama, planned


def drive(reporter: console.Reporter) -> None:
    plan = planned(llama())
    with reporter:
        reporter.planned(plan)
        reporter.warn("look out")
        for task in plan.tasks:
            [member] = task.members
            block = BlockReport("", member.part_url, len(member.block.pairs))
            reporter.task_done(TaskReport(task.id, (block,), task.nbytes, 0.1))


def test_lines_tell_the_plan_each_interval_and_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    drive(console.reporter(quiet=False))
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == ""
    assert lines[0].startswith("15 tensors in 4 tasks")
    assert "warning: look out" in lines
    assert lines[-1].startswith("15/15 tensors")
    assert len(lines) == 1 + 1 + 4 + 1


def test_lines_are_few_where_the_interval_is_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "INTERVAL", 3600.0)
    drive(console.reporter(quiet=False))
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_quiet_still_warns(capsys: pytest.CaptureFixture[str]) -> None:
    drive(console.reporter(quiet=True))
    assert capsys.readouterr().err == "warning: look out\n"


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "150")


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    on_a_terminal(monkeypatch)
    drive(console.reporter(quiet=False))
    shown = capsys.readouterr().err
    assert "15/15 tensors" in shown
    assert "100 %" in shown


def elsewhere(task: Task, folder: str) -> Task:
    """The same task with its parts in a folder."""
    members = (replace(member, part_url=f"/{folder}{member.part_url}") for member in task.members)
    return replace(task, members=tuple(members))


class Night:
    """A night of real tasks, told to a reporter step by step."""

    def __init__(self, *models: str) -> None:
        self.models = models
        self.tasks = [elsewhere(task, model) for model in models for task in planned(llama()).tasks]

    def task_done(self, reporter: console.NightReporter, number: int, nbytes: int = 1000) -> None:
        task = self.tasks[number]
        blocks = tuple(BlockReport("", member.part_url, len(member.block.pairs)) for member in task.members)
        reporter.task_done(TaskReport(task.id, blocks, nbytes, 0.1))

    def drive(self, reporter: console.NightReporter) -> None:
        with reporter:
            reporter.looked([])
            reporter.planned(self.tasks, len(self.models))
            for number in range(len(self.tasks)):
                self.task_done(reporter, number)
            for model in self.models[:-1]:
                reporter.model_done(model, "committed", "")
            reporter.model_done(self.models[-1], "failed", "1 of 15 tensors\x1b[31m failed")
            reporter.warn("look out")


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
        assert re.fullmatch(r"\[[0-9.]+ s\] 0/2 models, \d+/30 tensors, [0-9.]+ \wB/s, ETA \d+ s", lines[2])
        assert lines[-1].startswith("[")
        assert "] 2/2 models, 30/30 tensors, " in lines[-1]
        assert "ETA" not in lines[-1]
        assert "warning: look out" in lines

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

    def test_the_ticker_ends_with_the_night_however_that_ends(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(console, "INTERVAL", 0.01)
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt), console.night_reporter(quiet=False):
            raise KeyboardInterrupt
        assert threading.active_count() == before

    def test_quiet_only_warns(self, capsys: pytest.CaptureFixture[str]) -> None:
        Night("a").drive(console.night_reporter(quiet=True))
        assert capsys.readouterr() == ("", "warning: look out\n")

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
        progress = console.night.Progress()
        progress.planned(night.tasks, 1, now=100.0)
        assert progress.eta(101.0) is None
        costs = [task.cost for task in night.tasks]
        first = night.tasks[0]
        progress.task_done(TaskReport(first.id, (), 5_000_000, 1.0))
        share = costs[0] / sum(costs)
        assert progress.share == pytest.approx(share)
        assert progress.eta(110.0) == pytest.approx(10 * (1 - share) / share)
        assert progress.rate(110.0) == pytest.approx(500_000)

    def test_what_is_tried_again_never_makes_more_than_all(self) -> None:
        night = Night("a")
        progress = console.night.Progress()
        progress.model_done()  # one was refused before anything was planned
        progress.planned(night.tasks, 1, now=0.0)
        for task in [*night.tasks, *(elsewhere(task, "again") for task in night.tasks)]:
            blocks = tuple(BlockReport("", member.part_url, len(member.block.pairs)) for member in task.members)
            progress.task_done(TaskReport(task.id, blocks, 1, 0.1))
        progress.model_done()
        assert (progress.models, progress.all_models) == (2, 2)
        assert (progress.tensors, progress.all_tensors) == (30, 30)
        assert progress.share == 1.0
        assert progress.eta(1.0) is None
