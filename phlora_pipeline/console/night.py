"""Progress of a night: models, tensors, bytes per second, and when it will be over."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phlora_pipeline.console.extraction import Tasks
from phlora_pipeline.console.frame import Quiet
from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.plan import Task
    from phlora_pipeline.zoo.standing import Standing

WORTH_A_LINE = {"failed": "failed", "changed": "given up", "incomplete": "waiting"}
"""Ends of a model that are told one by one, in words; the others are counted."""


class Night(Tasks):
    """Of all models that are due."""

    first = "looking at checkpoints"

    def __init__(self, view: Quiet) -> None:
        super().__init__(view)
        self.models = self.all_models = 0

    @property
    def done(self) -> int:
        return self.models

    def looked(self, standings: Sequence[Standing]) -> None:
        counts = Counter(standing.state for standing in standings)
        told = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
        self._view.say(f"{len(standings)} models in the zoo: {told}" if standings else "there are no models in the zoo")

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        self.all_models += models
        self.expect(tasks, time.monotonic())
        read = sum(task.nbytes for task in tasks)
        self._view.say(f"{models} models, {self.all_tensors} tensors in {len(tasks)} tasks, {size(read)} to read")

    def model_done(self, model: str, state: str, reason: str) -> None:
        self.models += 1
        self.all_models = max(self.all_models, self.models)
        if state in WORTH_A_LINE:
            self._view.say(f"{model}: {WORTH_A_LINE[state]}: {reason}")
        self._view.changed()

    def words(self, now: float) -> str:
        if not self.all_models:
            return self.first
        tensors = f"{self.tensors}/{self.all_tensors} tensors"
        return f"{self.models}/{self.all_models} models, {tensors}, {self.pace.words(now)}"
