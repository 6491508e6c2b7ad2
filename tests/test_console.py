"""Progress: plain lines where nobody watches, nothing where a machine reads."""

from __future__ import annotations

import pytest

from phlora_pipeline import console
from phlora_pipeline.extract import BlockReport, TaskReport
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


def test_a_terminal_gets_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    drive(console.reporter(quiet=False))
    shown = capsys.readouterr().err
    assert "15/15 tensors" in shown
    assert "100 %" in shown
