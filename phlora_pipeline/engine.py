"""What an engine is given and tells: tasks, jobs that follow them, and who listens. The plain loop is here.

Neither engine sees a tensor. Retries are counted by `Dispatcher`: Ray's own repeat a task that kills its worker for ever,
and fail the calls that merely queued behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.errors import PhloraError, one_line
from phlora_pipeline.extract import TaskReport, Worker
from phlora_pipeline.metrics import Sink
from phlora_pipeline.plan import Task


@dataclass(frozen=True, slots=True)
class Resources:
    """Where tasks run.

    Attributes:
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        threads: processor threads per worker, the same in both engines.
        workers: number of Ray workers; 0 for as many as fit. More than fit now are waited for: nodes may be on their way.
        gpus: per Ray worker; a fraction lets several share one.
        start_seconds: how long a run waits for its first worker.
    """

    device: str
    threads: int
    workers: int = 0
    gpus: float = 1.0
    start_seconds: float = 900.0


class Job(Protocol):
    """What follows a model's last task; it travels to any process."""

    def run(self) -> Any:
        """Do it, and tell how it went."""


class Listener(Protocol):
    """Whoever leads a run: is told what happens, and says what follows."""

    def on_report(self, report: TaskReport) -> None:
        """A task is done."""

    def retried(self, task: Task, reason: str, *, died: bool) -> None:
        """A task failed, or its worker died."""

    def jobs(self, lost: dict[str, str]) -> Iterable[Job]:
        """What can be done now, each once. `lost`: part URL → reason, of the blocks that were given up."""

    def ended(self, job: Job, outcome: Any) -> None:
        """A job's answer, or the exception that it raised."""

    def measure(self, sink: Sink) -> None:
        """Send samples there as well, from the run's beginning on: an engine may have somewhere to show them."""

    def more(self, queue: Dispatcher[Any]) -> None:
        """The place to add tasks to the queue, or to take some out."""

    def stopping(self) -> bool:
        """Whether no further task should begin."""


@dataclass(frozen=True, slots=True)
class Reports:
    """A listener that is told of tasks, and wants nothing more."""

    on_report: Callable[[TaskReport], None]

    def retried(self, task: Task, reason: str, *, died: bool) -> None:
        """It is repeated, and that is all."""

    def jobs(self, lost: dict[str, str]) -> Iterable[Job]:
        """None."""
        return ()

    def ended(self, job: Job, outcome: Any) -> None:
        """There are none."""

    def measure(self, sink: Sink) -> None:
        """Nothing."""

    def more(self, queue: Dispatcher[Any]) -> None:
        """Nothing."""

    def stopping(self) -> bool:
        """Never."""
        return False


Engine = Callable[[Iterable[Task], Resources, Listener], dict[str, str]]


def run_local(tasks: Iterable[Task], resources: Resources, listener: Listener) -> dict[str, str]:
    """Do the tasks one after another in this process.

    Returns:
        Part URL → reason, for blocks that failed twice.

    Raises:
        PhloraError: the storage or the device, not a task, is at fault.
    """
    worker = Worker(resources.device, resources.threads)
    queue: Dispatcher[str] = Dispatcher(tasks)
    while True:
        stopping = listener.stopping()
        if not stopping:
            listener.more(queue)
        if jobs := list(listener.jobs(queue.lost)):
            for job in jobs:
                listener.ended(job, outcome_of(job))
            continue  # one that failed may be wanted again, and there may be no task left that would lead back here
        if stopping or (assignment := queue.take("local")) is None:
            return queue.lost
        try:
            report = worker.run(*assignment)
        except PhloraError:
            raise
        except Exception as error:  # whatever a task does, the other tasks go on
            listener.retried(queue.failed("local", words(error), died=False), words(error), died=False)
        else:
            queue.done("local")
            listener.on_report(report)


def outcome_of(job: Job) -> Any:
    """Its answer, or the exception that it raised."""
    try:
        return job.run()
    except Exception as error:  # it is told, not swallowed
        return error


def words(error: BaseException) -> str:
    """A stranger's exception in one line."""
    text = one_line(error)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
