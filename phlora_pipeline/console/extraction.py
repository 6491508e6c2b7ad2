"""Progress of an extraction: tensors, bytes, and when it will be over."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phlora_pipeline.console.frame import Quiet, Reporter
from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.extract import TaskReport
    from phlora_pipeline.plan import Plan, Task


class Tasks(Reporter):
    """Of whatever is done in tasks. The work is counted by cost: tasks differ a thousandfold."""

    def __init__(self, view: Quiet) -> None:
        super().__init__(view)
        self.tensors = self.all_tensors = 0
        self._costs: dict[str, float] = {}

    @property
    def done(self) -> int:
        return self.tensors

    def expect(self, tasks: Sequence[Task], now: float) -> None:
        """These will be done."""
        self.all_tensors = sum(len(member.block.pairs) for task in tasks for member in task.members)
        self._costs = {task.id: task.cost for task in tasks}
        self.pace.begin(sum(self._costs.values()), now)

    def task_done(self, report: TaskReport) -> None:
        """One is. What was planned later, for a checkpoint that had changed, adds to what there was to do."""
        self.tensors += report.tensors
        self.all_tensors = max(self.all_tensors, self.tensors)
        self.pace.advance(self._costs.pop(report.task, 0.0), report.nbytes)
        self._view.changed()


class Extraction(Tasks):
    """Of one fine-tune."""

    def __init__(self, view: Quiet) -> None:
        super().__init__(view)
        self._reused = 0

    def planned(self, plan: Plan) -> None:
        self.expect(plan.tasks, time.monotonic())
        self._view.say(f"{self.all_tensors} tensors in {len(plan.tasks)} tasks, {size(plan.nbytes)} to read")

    def task_done(self, report: TaskReport) -> None:
        self._reused += report.reused
        super().task_done(report)

    def words(self, now: float) -> str:
        if not self.all_tensors:
            return self.first
        reused = f", {self._reused} tasks reused" if self._reused else ""
        return (
            f"{self.tensors}/{self.all_tensors} tensors, {size(self.pace.moved)} read, {self.pace.words(now)}{reused}"
        )
