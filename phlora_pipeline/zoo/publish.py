"""What follows a model's last task: the adapter, its place in the dataset, the pointer, and the record that it is done.

A job of its own, which runs anywhere in the cluster as soon as the last part is there. The record comes last, so that
whoever finds it finds all the rest; without it the next night comes here again, and finds what stands already.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from phlora_pipeline import pipeline, storage
from phlora_pipeline.config import RunConfig
from phlora_pipeline.pipeline import Prepared
from phlora_pipeline.storage import Traffic
from phlora_pipeline.summary import summarize
from phlora_pipeline.zoo import dataset, latest, layout, state
from phlora_pipeline.zoo.state import Outcome


@dataclass(frozen=True, slots=True)
class Published:
    """How a model ended.

    Attributes:
        model: its id.
        outcome: its record: ours, or that of a night that was faster.
        warnings: in words.
        adapter_bytes: size of the weights' file.
        moved: what became of `latest.json`.
        seconds: wall time.
        traffic: of its process with storage since it was last asked.
    """

    model: str
    outcome: Outcome
    warnings: tuple[str, ...]
    adapter_bytes: int
    moved: str
    seconds: float
    traffic: Traffic


@dataclass(frozen=True, slots=True)
class Publish:
    """The job.

    Attributes:
        model: its id in the zoo.
        base_id: of its base.
        request, asked: what was asked.
        config: with the version's folder as `out`.
        prepared: its plan.
        lost: part URL → reason, of its blocks that were given up.
        out: the zoo's output.
        run_url: of this run.
        began: when the run began, ISO 8601 in UTC.
    """

    model: str
    base_id: str
    request: str
    asked: Mapping[str, str]
    config: RunConfig
    prepared: Prepared
    lost: Mapping[str, str]
    out: str
    run_url: str
    began: str

    def run(self) -> Published:
        """Publish it.

        Raises:
            PhloraError: as `pipeline.conclude`.
        """
        began = time.monotonic()
        concluded = pipeline.conclude(self.config, self.prepared, self.lost, f"{self.run_url}/{self.model}")
        version, moved = self.prepared.plan.version, ""
        # The file's, and not what `conclude` says: who finds the adapter has the file alone, and the record must not tell.
        weights = storage.stat(storage.join(self.config.out, layout.WEIGHTS))
        size = weights.size if weights else 0
        dataset.copy_manifest(self.out, self.model, self.base_id, version)
        if concluded.outcome != "nothing_to_adapt":
            moved = latest.advance(self.out, self.model, version, self.request, self.began)
        summary: dict[str, Any] = summarize(concluded.rows).as_dict()
        record = Outcome(
            self.request,
            "nothing_to_adapt" if concluded.outcome == "nothing_to_adapt" else "committed",
            version,
            self.run_url.rpartition("/")[2],
            layout.utc_now(),
            {**summary, "adapter_bytes": size, "rank": concluded.plan.written_rank},
            self.asked,
        )
        standing = state.record_outcome(self.out, self.model, record)
        seconds = time.monotonic() - began
        return Published(self.model, standing, concluded.warnings, size, moved, seconds, storage.take_traffic())
