"""One execution's own folder, `<out>/_runs/<id>`: what was asked, what happened, how it ended, and its metrics.

Everything that differs between two runs with the same result (times, workers, identifiers) is here and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.metrics import Sink, Totals, samples
from phlora_pipeline.storage import Traffic

RUNS = "_runs"
RESULT = "result.json"
EVENTS = "events.jsonl"
PROM = "metrics.prom"


@dataclass(slots=True)
class Run:
    """A run that has begun.

    Attributes:
        url: its folder.
        began: in UTC.
        tasks, nbytes: done so far, and the tensor bytes that they read.
    """

    url: str
    began: dt.datetime
    tasks: int = 0
    nbytes: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)
    _totals: Totals = field(default_factory=Totals)
    _sinks: list[Sink] = field(default_factory=list)

    @classmethod
    def begin(cls, out: str, request: Mapping[str, Any]) -> Run:
        """Write the resolved request; being the run's first write, it finds out whether writing is allowed."""
        began = dt.datetime.now(dt.UTC)
        run = cls(storage.join(out, RUNS, f"{began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"), began)
        run._put("request.json", request)
        run.event("began")
        return run

    @property
    def seconds(self) -> float:
        """Since it began."""
        return (dt.datetime.now(dt.UTC) - self.began).total_seconds()

    @property
    def result_url(self) -> str:
        """Where `end` writes how it ended."""
        return storage.join(self.url, RESULT)

    def event(self, kind: str, **told: Any) -> None:
        """A line of `events.jsonl`, and what it adds to the metrics."""
        at = round(self.seconds, 3)
        event = {"event": kind, "at": at, "time": round(self.began.timestamp() + at, 3), **told}
        self._events.append(event)
        for sample in samples(event):
            for sink in (self._totals.add, *self._sinks):
                sink(sample)

    def measure(self, sink: Sink) -> None:
        """Send samples there as well: those of what has happened, and all that come."""
        self._sinks.append(sink)
        for event in self._events:
            for sample in samples(event):
                sink(sample)

    def stage(self, name: str, seconds: float) -> None:
        """A stage of the run is over."""
        self.event("stage", stage=name, seconds=round(seconds, 4))

    def task(self, report: TaskReport) -> None:
        """A task is done."""
        self.tasks += 1
        self.nbytes += report.nbytes
        self.event(
            "task",
            task=report.task,
            models=[block.model for block in report.blocks if block.model],
            tensors=report.tensors,
            bytes=report.nbytes,
            seconds=round(report.seconds, 4),
            waited=round(report.waited, 4),
            worker=report.worker,
            routes=_sum(block.routes for block in report.blocks),
            second_tries=_sum(block.second_tries for block in report.blocks),
            storage=traffic_record(report.traffic),
            failed=list(report.failed),
            reused=report.reused,
        )

    def end(self, result: Mapping[str, Any]) -> None:
        """Write all events, the metrics, and how the run ended."""
        told = {"exit_code": result["exit_code"], "models": result.get("counts", {})}
        self.event("ended", **told, storage=traffic_record(storage.take_traffic()))
        lines = "".join(f"{json.dumps(event)}\n" for event in self._events)
        storage.put_new(storage.join(self.url, EVENTS), lines.encode())
        storage.put_new(storage.join(self.url, PROM), self._totals.text().encode())
        self._put(RESULT, {**result, "seconds": round(self.seconds, 3), "tasks": self.tasks, "read_bytes": self.nbytes})

    def _put(self, name: str, document: Mapping[str, Any]) -> None:
        storage.put_new(storage.join(self.url, name), (json.dumps(document, indent=2) + "\n").encode())


def traffic_record(traffic: Traffic) -> dict[str, Any]:
    """As an event has it."""
    return {"read": traffic.read, "written": traffic.written, "retries": dict(traffic.retries)}


def _sum(counts: Iterable[Iterable[tuple[str, int]]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for count in counts:
        total.update(dict(count))
    return dict(total)
