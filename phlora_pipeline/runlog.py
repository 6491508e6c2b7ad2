"""One execution's own folder, `<out>/_runs/<id>`: what was asked, what happened, how it ended.

Everything that differs between two runs with the same result (times, workers, identifiers) is here and nowhere else.
"""

from __future__ import annotations

import datetime as dt
import json
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.extract import TaskReport

RUNS = "_runs"
RESULT = "result.json"


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
    _lines: list[str] = field(default_factory=list)

    @classmethod
    def begin(cls, out: str, request: Mapping[str, Any]) -> Run:
        """Write the resolved request; being the run's first write, it finds out whether writing is allowed."""
        began = dt.datetime.now(dt.UTC)
        run = cls(storage.join(out, RUNS, f"{began:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"), began)
        run._put("request.json", request)
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
        """A line of `events.jsonl`."""
        self._lines.append(json.dumps({"event": kind, "at": round(self.seconds, 3), **told}))

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
            routes=dict(sum((Counter(dict(block.routes)) for block in report.blocks), Counter())),
            failed=list(report.failed),
            reused=report.reused,
        )

    def end(self, result: Mapping[str, Any]) -> None:
        """Write all events, and how the run ended."""
        storage.put_new(storage.join(self.url, "events.jsonl"), "".join(f"{line}\n" for line in self._lines).encode())
        self._put(RESULT, {**result, "seconds": round(self.seconds, 3), "tasks": self.tasks, "read_bytes": self.nbytes})

    def _put(self, name: str, document: Mapping[str, Any]) -> None:
        storage.put_new(storage.join(self.url, name), (json.dumps(document, indent=2) + "\n").encode())
