"""One execution's own folder, `<out>/_runs/<id>`: what was asked, what happened, how it ended.

Everything that differs between two runs with the same result (times, workers, identifiers) is here and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.extract import TaskReport

RUNS = "_runs"


@dataclass(slots=True)
class Run:
    """A run that has begun.

    Attributes:
        url: its folder.
        reports: of the tasks that are done.
        began: in UTC.
    """

    url: str
    reports: list[TaskReport]
    began: dt.datetime

    @classmethod
    def begin(cls, out: str, request: Mapping[str, Any]) -> Run:
        """Write the resolved request; being the run's first write, it finds out whether writing is allowed."""
        began = dt.datetime.now(dt.UTC)
        run = cls(storage.join(out, RUNS, f"{began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"), [], began)
        run._put("request.json", request)
        return run

    def end(self, result: Mapping[str, Any]) -> None:
        """Write one line per task, and how the run ended."""
        seconds = (dt.datetime.now(dt.UTC) - self.began).total_seconds()
        lines = [json.dumps({"event": "task", **as_json(report)}) for report in self.reports]
        storage.put_new(storage.join(self.url, "events.jsonl"), "".join(f"{line}\n" for line in lines).encode())
        self._put("result.json", {**result, "seconds": round(seconds, 3), "tasks": len(self.reports)})

    def _put(self, name: str, document: Mapping[str, Any]) -> None:
        storage.put_new(storage.join(self.url, name), (json.dumps(document, indent=2) + "\n").encode())


def as_json(report: TaskReport) -> dict[str, Any]:
    """A task's line of `events.jsonl`."""
    return {
        "task": report.task,
        "models": [block.model for block in report.blocks if block.model],
        "tensors": report.tensors,
        "bytes": report.nbytes,
        "seconds": round(report.seconds, 4),
        "waited": round(report.waited, 4),
        "worker": report.worker,
        "failed": list(report.failed),
        "reused": report.reused,
    }
