"""What runs in an actor that does nothing. It imports nothing of ours: torch would be loaded with it, 20 000 tasks or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

Parts = tuple[tuple[str, str, int], ...]
"""Of each member of a task: its model, its part's URL, and how many tensors that holds."""


class NoOp:
    """In the place of a `Worker`."""

    def prepare(self, device: str, threads: int) -> str:
        """The node that it is on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def run(self, task: str, parts: Parts, data: bytes) -> Answer:
        """Done. `data`: the task and the forecast, which travel as they do in earnest, but stay as they are."""
        return Answer(task, parts)


@dataclass(frozen=True, slots=True)
class Answer:
    """A `TaskReport`, as soon as it is unpickled."""

    task: str
    parts: Parts

    def __reduce__(self) -> tuple[Any, tuple[str, Parts]]:
        """Where it is unpickled, `report` is called."""
        return report, (self.task, self.parts)


def report(task: str, parts: Parts) -> Any:
    """The `TaskReport` of a task that took no time."""
    from phlora_pipeline.extract import BlockReport, TaskReport

    return TaskReport(task, tuple(BlockReport(*part) for part in parts), nbytes=0, seconds=0.0)
