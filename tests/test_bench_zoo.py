"""What planning and dispatching a zoo cost: the measures count what they say, on the real planner and the real driver."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.bench import dispatching, noop, planning, results, zoo_table
from phlora_pipeline.extract import BlockReport, TaskReport

ROOT = Path(__file__).parent.parent


def test_a_zoo_is_planned_in_chunks_and_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = planning.plan_zoo(3)
    monkeypatch.setattr(planning, "CHUNK", 1)
    chunks = planning.plan_zoo(3)
    assert (whole.models, whole.tensors) == (chunks.models, chunks.tensors) == (3, 3 * 705)
    checkpoint = 2 * planning.ARCHITECTURE.parameters
    assert 4 * checkpoint <= whole.nbytes <= chunks.nbytes == 6 * checkpoint
    assert whole.tasks <= chunks.tasks
    assert whole.seconds > 0
    assert whole.processor > 0


def test_tasks_to_dispatch_are_as_many_as_asked_for_and_all_different() -> None:
    found = dispatching.real_tasks(600)
    assert len(found) == len({task.id for task in found}) == 600
    assert {len(task.members) for task in found} == {1}


def test_an_actor_that_does_nothing_loads_no_torch() -> None:
    script = (
        "import sys; from jobs.bench.noop import NoOp, Answer; NoOp().run('t', (('m', 'p', 2),), b'');"
        "print([name for name in sys.modules if name.startswith(('torch', 'phlora', 'ray'))])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_its_answer_is_a_report_where_it_arrives() -> None:
    answer = noop.NoOp().run("t", (("m", "s3://out/p", 2),), b"unread")
    found = pickle.loads(pickle.dumps(answer))
    assert found == TaskReport("t", (BlockReport("m", "s3://out/p", 2),), nbytes=0, seconds=0.0)


@pytest.mark.slow
@pytest.mark.ray
def test_a_night_a_plan_and_the_drivers_cost_are_measured_saved_and_shown(tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    done = subprocess.run(
        [sys.executable, "-m", "jobs.bench", "--quick", "--only", "night,planning,dispatch", "--dir", str(tmp_path), "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = results.read(out)
    assert set(found) == {"night", "planning", "dispatch"}
    [(name, row)] = found["night"].items()
    assert name == "10 × 70B, auto, 8 GPUs"
    assert 1 <= row["tail"] < 2
    assert found["planning"]["10 models"]["tensors"] == 7050
    assert found["planning"]["10 models"]["peak_mib"] > 10
    [driven] = found["dispatch"].values()
    assert driven["tasks"] == 360
    assert driven["processor_ms"] > 0
    assert driven["wall_ms"] > 0
    assert 500 < driven["task_bytes"] < 5000
    assert "**Planning a zoo**" in done.stdout
    assert "Assumed, not measured" in done.stdout


def test_tables_show_what_was_measured() -> None:
    rows = {
        "2000 models": {"models": 2000, "tensors": 1_410_000, "seconds": 40.0, "processor": 39.0, "peak_mib": 512.2}
    }
    assert "| 2000 models | 705 | 40.0 s | 39.0 s | 512 MiB |" in zoo_table.planning(rows)[1]
    rows = {"9 tasks": {"processor_ms": 0.881, "wall_ms": 1.2, "grown_mib": 6.71, "task_bytes": 1265}}
    assert "| 9 tasks | 0.88 ms | 1.20 ms | 6.7 MiB | 1265 bytes |" in zoo_table.dispatch(rows)[1]
