"""Metrics follow from a run's events, and from nothing else; what they count is what happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from phlora_pipeline import metrics, storage
from phlora_pipeline.lowrank import checks
from phlora_pipeline.lowrank.ritz import Triplets
from phlora_pipeline.metrics import BUCKETS, METRICS, Sample, Totals, note_kind, samples
from tests import toys
from tests.counting_proxy import Fault, Request, running_proxy
from tests.runs import extract
from tests.s3_server import S3
from tests.zoo import nights
from tests.zoo.nights import Zoo


def parsed(text: str) -> dict[tuple[str, str], float]:
    """(name, value of its label) → value."""
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of_run(out: str) -> tuple[dict[tuple[str, str], float], list[dict[str, Any]], dict[str, Any]]:
    """The metrics, the events and the result of the only run."""
    found = {storage.basename(info.url): storage.read_object(info, limit=1 << 24) for info in storage.list_tree(f"{out}/_runs")}  # fmt: skip
    events = [json.loads(line) for line in found["events.jsonl"].splitlines()]
    return parsed(found["metrics.prom"].decode()), events, json.loads(found["result.json"])


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A night's output: two models are converted, one is poisoned."""
    root = tmp_path_factory.mktemp("night")
    zoo = Zoo(root / "zoo", str(root / "out"))
    base = zoo.add_base()
    for number in range(2):
        zoo.add(f"good-{number}", toys.fine_tuned(base, seed=number))
    zoo.add("poison", nights.poisoned(base))
    assert zoo.night().exit_code == 3
    return zoo.out


def test_what_is_counted_is_what_happened(night: str) -> None:
    told, events, result = of_run(night)
    tasks = [event for event in events if event["event"] == "task"]
    assert told["phlora_models_total", "committed"] == 2
    assert told["phlora_models_total", "failed"] == 1
    assert told["phlora_zoo_models", "committed"] == 2
    assert told["phlora_run_exit_code", ""] == result["exit_code"] == 3
    assert (
        told["phlora_tasks_total", "computed"] == told["phlora_task_seconds_count", ""] == len(tasks) == result["tasks"]
    )
    assert told["phlora_tensors_total", "exact"] == 3 * 5 - 1
    assert told["phlora_tensors_total", "failed"] == 1
    stages = {label: value for (name, label), value in told.items() if name == "phlora_stage_seconds_total"}
    assert stages.keys() == set(METRICS["phlora_stage_seconds_total"].values)
    assert all(value > 0 for stage, value in stages.items() if stage != "wait")
    assert stages["wait"] + stages["compute"] == pytest.approx(told["phlora_task_seconds_sum", ""])
    assert told["phlora_run_started_timestamp_seconds", ""] <= told["phlora_last_converted_timestamp_seconds", ""]
    assert told["phlora_last_converted_timestamp_seconds", ""] <= told["phlora_run_ended_timestamp_seconds", ""]


def test_every_byte_is_counted_once(night: str) -> None:
    """What was written is what lies there, but for parts that are gone again and the run's own last files."""
    told, _, result = of_run(night)
    there = sum(info.size for info in storage.list_tree(night))
    last = ("events.jsonl", "metrics.prom", "result.json")
    late = sum(info.size for info in storage.list_tree(f"{night}/_runs") if storage.basename(info.url) in last)
    assert told["phlora_written_bytes_total", ""] >= there - late
    assert told["phlora_read_bytes_total", ""] >= result["read_bytes"]
    assert told["phlora_written_bytes_total", ""] < 3 * there


def test_the_metrics_can_be_computed_from_the_events_again(night: str) -> None:
    told, events, _ = of_run(night)
    totals = Totals()
    for event in events:
        for sample in samples(event):
            totals.add(sample)
    assert parsed(totals.text()) == told


def test_who_comes_late_is_told_all_the_same(tmp_path: Path) -> None:
    """As Ray's metrics do: they begin when the cluster has been joined."""
    from phlora_pipeline.runlog import Run

    run, late = Run.begin(str(tmp_path), {}), Totals()
    run.stage("look", 1.5)
    run.measure(late.add)
    run.event("retry", task="t", reason="r", died=True)
    run.end({"exit_code": 0})
    assert parsed(late.text()) == of_run(str(tmp_path))[0]
    assert parsed(late.text())["phlora_retries_total", "worker_died"] == 1


def test_an_extraction_has_them_too(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    extract(*pair, tmp_path / "out")
    told, _, _ = of_run(str(tmp_path / "out"))
    assert told["phlora_run_exit_code", ""] == 0
    assert sum(value for (name, _), value in told.items() if name == "phlora_tensors_total") > 0


@pytest.mark.s3
def test_throttling_is_told_from_broken_connections(s3: S3, tmp_path: Path) -> None:
    base = nights.tensors(0)
    for name, tensors in (("b", base), ("tuned/one", toys.fine_tuned(base))):
        s3.upload_folder(toys.save(tmp_path / name.replace("/", "-"), dict(tensors)), name)
    zoo = Zoo(tmp_path, s3.url("out"), {"bases": {"b": s3.url("b")}, "discover": [{"prefix": s3.url("tuned"), "base": "b"}]})  # fmt: skip
    (tmp_path / "bases").mkdir()
    with running_proxy(s3.server.endpoint) as proxy:
        s3.use(endpoint=proxy.endpoint)
        seen: dict[str, int] = {}

        def once(request: Request) -> Fault | None:
            if "/_parts/" not in request.key or request.verb != "PUT":
                return None
            seen[request.key] = seen.get(request.key, 0) + 1
            return {1: "busy", 2: "refuse"}.get(seen[request.key])  # type: ignore[return-value]

        storage.take_traffic()
        proxy.fault = once
        assert zoo.night().counts == {"committed": 1}
    told, _, _ = of_run(zoo.out)
    assert told["phlora_storage_retries_total", "throttled"] == len(seen)
    assert told["phlora_storage_retries_total", "connection"] == len(seen)
    assert len(seen) == told["phlora_tasks_total", "computed"]


def test_notes_of_failed_checks_are_known_by_their_words() -> None:
    """Whatever `checks.problems` says of factors that are wrong in one way or another counts as a failed check."""
    n, q = 12, 4
    u, v = (torch.linalg.qr(torch.randn(n, q, generator=torch.Generator().manual_seed(seed)))[0].mT for seed in (1, 2))
    energies = torch.tensor([8.0, 4.0, 2.0, 1.0], dtype=torch.float64) ** 2
    root = energies.sqrt().sqrt().float()[:, None]
    good, psi = (root * u, root * v), torch.randn(8, n, generator=torch.Generator().manual_seed(3))
    seen = psi @ good[0].mT @ good[1]

    def problem(short: torch.Tensor, long: torch.Tensor, sigmas: torch.Tensor = energies, total: float | None = None) -> str:  # fmt: skip
        norm_sq = float(energies.sum())
        found = Triplets(short[None], long[None], sigmas[None])
        [told] = checks.problems(found, [norm_sq], psi[None], seen[None], None if total is None else [total])
        return told

    assert problem(*good) == ""
    wrong = [
        problem(good[0] * float("nan"), good[1]),
        problem(good[0] + 0.1, good[1]),
        problem(good[0], good[1].flip(1)),
        problem(*good, total=2 * float(energies.sum())),
        problem(good[0] * 2**0.5, good[1] * 2**0.5, energies * 4),
    ]
    assert all(wrong)
    assert {note_kind(f"krylov 8: {told}") for told in wrong} == {"check"}
    assert note_kind("out of memory on cuda with 8 at once") == note_kind("done on the processor") == "memory"
    assert note_kind("exact gesvdj: cusolver error") == "solver_error"


def test_a_histogram_counts_each_observation_below_its_bounds() -> None:
    totals = Totals()
    for seconds in (0.05, BUCKETS[0], 5.0, 1e6):
        totals.add(Sample("phlora_task_seconds", seconds))
    told = parsed(totals.text())
    counts = [told["phlora_task_seconds_bucket", str(bound)] for bound in (*BUCKETS, "+Inf")]
    assert counts == [sum(seconds <= bound for seconds in (0.05, BUCKETS[0], 5.0, 1e6)) for bound in (*BUCKETS, float("inf"))]  # fmt: skip
    assert told["phlora_task_seconds_sum", ""] == pytest.approx(1e6 + 5.0 + 0.05 + BUCKETS[0])


def test_names_are_as_prometheus_wants_them() -> None:
    for name, metric in METRICS.items():
        assert name.startswith("phlora_")
        assert name.endswith("_total") == (metric.kind == "counter")
        assert bool(metric.values) <= bool(metric.label)
    assert set(metrics._OF_EVENTS) == {"began", "stage", "task", "published", "retry", "model", "ended"}
