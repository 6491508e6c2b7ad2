"""Leads a night's engine: counts each model's parts, has it published when the last is there, and keeps the account."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from phlora_pipeline import reducer
from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.engine import Job, words
from phlora_pipeline.errors import CredentialsError, IncompleteError, PhloraError, SourceChangedError, StorageError
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.metrics import Sink
from phlora_pipeline.plan import Task
from phlora_pipeline.runlog import Run, traffic_record
from phlora_pipeline.zoo import state
from phlora_pipeline.zoo.prepare import Ready, plan_one
from phlora_pipeline.zoo.publish import Publish, Published
from phlora_pipeline.zoo.result import ModelResult, Observer
from phlora_pipeline.zoo.standing import Standing
from phlora_pipeline.zoofile import ZooConfig

_TRIES = 2
"""How often a model is begun in a night, where its checkpoint changes while it is read; and how often a publication is."""


class Lead:
    """The listener of a night.

    Attributes:
        results: of the models that have ended, by id.
    """

    def __init__(self, config: ZooConfig, run: Run, observer: Observer, stopping: Callable[[], bool]) -> None:
        """Of one night.

        Args:
            config: the zoo.
            run: where events are written down.
            observer: is told.
            stopping: whether to come to an end.
        """
        self.results: dict[str, ModelResult] = {}
        self._config, self._run, self._observer, self._stopping = config, run, observer, stopping
        self._models: dict[str, Ready] = {}
        self._waiting: dict[str, set[str]] = {}  # model → part URLs that are neither there nor lost
        self._begun: set[str] = set()
        self._changed: dict[str, PhloraError] = {}
        self._tries: dict[str, int] = {}
        minutes = config.limits.max_minutes
        self._deadline = time.monotonic() + 60 * minutes if minutes else None

    def expect(self, models: Sequence[Ready]) -> None:
        """These will be converted, or stand already and only want their records."""
        for model in models:
            self._models[model.id] = model
            members = (member for task in model.prepared.plan.tasks for member in task.members)
            self._waiting[model.id] = set() if model.stands else {member.part_url for member in members}
            for warning in model.prepared.plan.warnings:
                self._observer.warn(f"{model.id}: {warning}")

    def on_report(self, report: TaskReport) -> None:
        """A task is done."""
        self._run.task(report)
        self._observer.task_done(report)
        for block in report.blocks:
            self._begun.add(block.model)
            waiting = self._waiting.get(block.model, set())
            if block.part_url not in waiting:
                continue  # of a plan that was given up
            if block.error is not None:
                self._changed.setdefault(block.model, block.error)
            else:
                waiting.discard(block.part_url)

    def retried(self, task: Task, reason: str, *, died: bool) -> None:
        """A task failed, or its worker died."""
        self._run.event("retry", task=task.id, reason=reason, died=died)

    def jobs(self, lost: dict[str, str]) -> Iterator[Job]:
        """A job for each model whose last part is there."""
        for model, waiting in list(self._waiting.items()):
            if model not in self._changed and waiting <= lost.keys():
                del self._waiting[model]
                yield self._publication(self._models[model], {url: lost[url] for url in waiting})

    def ended(self, job: Job, outcome: Any) -> None:
        """A model is published, or could not be."""
        assert isinstance(job, Publish)
        model = self._models[job.model]
        if isinstance(outcome, Published):
            self._run.event(
                "published",
                model=job.model,
                latest=outcome.moved,
                seconds=round(outcome.seconds, 4),
                storage=traffic_record(outcome.traffic),
            )
            for warning in outcome.warnings:
                self._observer.warn(f"{job.model}: {warning}")
            self.end(job.model, outcome.outcome.outcome, version=outcome.outcome.version)
        elif isinstance(outcome, PhloraError):
            self.refuse(model.standing, outcome)
        elif self._again(f"publish {job.model}"):
            self._run.event("retry", model=job.model, reason=words(outcome), died=True)
            self._waiting[job.model] = set(job.lost)
        else:
            self._attempt(
                model.standing,
                "failed",
                f"its publication failed: {words(outcome)}",
                "look at the log, then phlora retry",
            )

    def more(self, queue: Dispatcher[Any]) -> None:
        """Take out of the queue what nobody wants any more, and put in what is tried once more."""
        if self._changed:
            changed, self._changed = self._changed, {}
            queue.drop(lambda member: member.model in changed)
            for model, error in changed.items():
                self._begin_again(model, error, queue)
        if self._deadline is not None and time.monotonic() > self._deadline:
            self._deadline = None
            # What waits for no part stands already, and only wants its record.
            late = {model for model, waiting in self._waiting.items() if waiting and model not in self._begun}
            queue.drop(lambda member: member.model in late)
            for model in sorted(late):
                del self._waiting[model]
                self.end(model, "deferred", "limits.max_minutes were over before it began; it will be due again")

    def measure(self, sink: Sink) -> None:
        """Send the run's samples there, too."""
        self._run.measure(sink)

    def stopping(self) -> bool:
        """Whether the night was told to end."""
        return self._stopping()

    def refuse(self, standing: Standing, error: PhloraError) -> None:
        """A model cannot be converted; who is to blame, and what it counts for.

        Raises:
            PhloraError: credentials, storage or a device, which no model can be blamed for.
        """
        if isinstance(error, IncompleteError):
            self.end(standing.entry.id, "incomplete", error.what, error.remedy)
        elif isinstance(error, SourceChangedError):
            self._attempt(standing, "changed", error.what, error.remedy)
        elif isinstance(error, CredentialsError | StorageError) or error.exit_code not in {2, 3}:
            raise error
        else:
            self._attempt(standing, "failed", error.what, error.remedy)
            if (model := self._models.get(standing.entry.id)) is not None and error.exit_code == 2:
                reducer.drop_parts(model.prepared.plan)  # refused, not interrupted: nobody will go on from these

    def end(self, model: str, ended: str, reason: str = "", remedy: str = "", version: str = "") -> None:
        """A model has ended."""
        self.results[model] = ModelResult(model, ended, reason, remedy, version)
        self._run.event("model", model=model, state=ended, reason=reason, version=version)
        self._observer.model_done(model, ended, reason)

    def defer_the_rest(self) -> None:
        """The run stops: what has not ended is due again, and goes on from its parts."""
        for model in sorted(self._waiting):
            self.end(model, "deferred", "the run was stopped; it goes on from the parts that are there")

    def _publication(self, model: Ready, lost: dict[str, str]) -> Publish:
        began = self._run.began.isoformat(timespec="microseconds")
        entry = model.standing.entry
        return Publish(
            model.id, entry.base_id, model.standing.request, model.standing.asked, model.config, model.prepared, lost, self._config.output, self._run.url, began
        )  # fmt: skip

    def _begin_again(self, model: str, error: PhloraError, queue: Dispatcher[Any]) -> None:
        """Its checkpoint was replaced while it was read: once more, as it is now; then it is left for the next night."""
        self._waiting.pop(model, None)
        old = self._models[model]
        reducer.drop_parts(old.prepared.plan)
        made: Ready | PhloraError = error
        if self._again(f"read {model}"):
            made = plan_one(self._config, old.standing)
        if isinstance(made, Ready):
            self._run.event("retry", model=model, reason=error.what, died=False)
            self.expect([made])
            if not made.stands:
                queue.add(made.prepared.plan.tasks)
        else:
            self.refuse(old.standing, made if isinstance(made, IncompleteError) else _changed(made))

    def _attempt(self, standing: Standing, kind: Any, reason: str, remedy: str) -> None:
        run = self._run.url.rpartition("/")[2]
        model = standing.entry.id
        state.record_attempt(
            self._config.output, model, standing.request, kind=kind, reason=reason, remedy=remedy, run=run
        )
        self._waiting.pop(model, None)
        self.end(model, kind, reason, remedy)

    def _again(self, what: str) -> bool:
        self._tries[what] = self._tries.get(what, 1) + 1
        return self._tries[what] <= _TRIES


def _changed(error: PhloraError) -> PhloraError:
    gone = error.exit_code == 2  # removed, or another kind of file by now
    return SourceChangedError(error.what, remedy=error.remedy) if gone else error
