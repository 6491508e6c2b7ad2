"""How a night ended, model by model; and what a front end is told on the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from phlora_pipeline.extract import TaskReport
from phlora_pipeline.plan import Task
from phlora_pipeline.zoo.standing import Standing

STOPPED = 143
"""Exit code of a run that was told to end, and did so in order."""

FAILURES = ("failed", "changed", "blocked")
"""States that make a night end with exit code 3."""


class Observer(Protocol):
    """What a front end is told on the way."""

    def looked(self, standings: Sequence[Standing]) -> None:
        """It is known where every model stands."""

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        """The work is planned; tensors will be read now."""

    def task_done(self, report: TaskReport) -> None:
        """One task is done."""

    def model_done(self, model: str, state: str, reason: str) -> None:
        """A model is published, or will not be tonight."""

    def warn(self, text: str) -> None:
        """Something that the user should know, in one line."""


@dataclass(frozen=True, slots=True)
class ModelResult:
    """What became of a model.

    Attributes:
        id: its id.
        state: `committed`, `nothing_to_adapt`, `failed`, `changed`, `incomplete`, `quarantined`, `blocked`, `deferred`, or
            `published` and `unchanged` where there was nothing to do.
        reason, remedy: in words.
        version: of the adapter, where there is one.
    """

    id: str
    state: str
    reason: str = ""
    remedy: str = ""
    version: str = ""


@dataclass(frozen=True, slots=True)
class NightResult:
    """How a night ended.

    Attributes:
        run: its id; empty where nothing was due and nothing was written.
        exit_code: 0: all is published; 3: something failed, the rest is published; 143: stopped on request.
        models: every model of the zoo, by id.
        read_bytes: of tensors.
        seconds: wall time.
    """

    run: str
    exit_code: int
    models: tuple[ModelResult, ...]
    read_bytes: int
    seconds: float

    @property
    def counts(self) -> dict[str, int]:
        """How many models ended how."""
        return dict(sorted(Counter(model.state for model in self.models).items()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "counts": self.counts}
