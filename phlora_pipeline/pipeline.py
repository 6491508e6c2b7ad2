"""The recipe: open → plan → run → reduce → publish. Reads as the method; the work is one layer below."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from phlora_pipeline import driver, reducer, storage
from phlora_pipeline.concluding import Concluded, Outcome, conclude, standing
from phlora_pipeline.config import RunConfig
from phlora_pipeline.engine import Reports, Resources
from phlora_pipeline.errors import PhloraError, RequestError
from phlora_pipeline.extract import TaskReport, checked_device
from phlora_pipeline.machine import available_memory, default_threads
from phlora_pipeline.plan import Plan, require_fits
from phlora_pipeline.prepare import Prepared, plan, prepare
from phlora_pipeline.runlog import Run
from phlora_pipeline.summary import Summary, summarize

__all__ = [
    "Concluded", "ExtractResult", "Observer", "Outcome", "Prepared",
    "compute", "conclude", "extract", "failures_recorded", "plan", "prepare", "require_room", "resources_of", "result_of", "standing",
]  # fmt: skip


class Observer(Protocol):
    """What a front end is told on the way."""

    def planned(self, plan: Plan) -> None:
        """The plan is made; tensors will be read now."""

    def task_done(self, report: TaskReport) -> None:
        """One task of the plan is done."""

    def warn(self, text: str) -> None:
        """Something that the user should know, in one line."""


@dataclass(frozen=True, slots=True)
class ExtractResult:
    """How an extraction ended.

    Attributes:
        outcome: `committed`; `exists`: the same adapter stood there already; `nothing_to_adapt`: the checkpoints are the same.
        out: where it is.
        version: the adapter's identity.
        rank, written_rank: as asked for, or chosen as the largest, and as written.
        policy: how ranks were chosen.
        ranks: tensor → its own rank, before zero-padding.
        adapter_bytes: of `adapter_model.safetensors`.
        natural_bytes: of that file, if each pair could be written at its own rank.
        checkpoint_bytes: of the fine-tune's tensors.
        read_bytes: tensor bytes that this run read.
        summary: the rows, summed up.
        warnings: in words.
    """

    outcome: Outcome
    out: str
    version: str
    rank: int
    written_rank: int
    policy: str
    ranks: Mapping[str, int]
    adapter_bytes: int
    natural_bytes: int
    checkpoint_bytes: int
    read_bytes: int
    summary: Summary
    warnings: tuple[str, ...]


def extract(config: RunConfig, observer: Observer) -> ExtractResult:
    """One fine-tune → one adapter in `config.out`.

    Raises:
        RequestError: refused before anything was read, or because the pair is no fine-tune; nothing is published.
        ModelFailedError: a tensor failed; the rows are under `_runs/`, no adapter is published.
        PhloraError: storage, credentials, device, or a source that changed.
    """
    if not config.out:
        raise RequestError("there is no output folder", remedy="say where the adapter goes: out")
    prepared = plan(config)
    if (there := standing(config, prepared)) is not None:
        return result_of(config, prepared, there, 0)
    resources = resources_of(config)
    require_room(config, prepared.plan)
    run = Run.begin(config.out, config.model_dump(mode="json"))
    with failures_recorded(run, prepared.plan, keep_parts=config.keep_parts):
        lost = compute(config, prepared.plan, resources, observer, run)
        concluded = conclude(config, prepared, lost, run.url)
        for warning in concluded.warnings:
            observer.warn(warning)
        result = result_of(config, prepared, concluded, run.nbytes)
    run.end({"outcome": result.outcome, "exit_code": 0, "version": result.version, "summary": result.summary.as_dict()})
    return result


@contextlib.contextmanager
def failures_recorded(run: Run, plan: Plan, *, keep_parts: bool) -> Iterator[None]:
    """Whatever fails inside is the run's end; parts that nothing will go on from are removed."""
    try:
        yield
    except PhloraError as error:
        if isinstance(error, RequestError) and not keep_parts:
            with contextlib.suppress(PhloraError):  # refused, not interrupted: nothing will go on from these
                reducer.drop_parts(plan)
        with contextlib.suppress(PhloraError):  # where storage itself is the error, there is no place to write it down
            run.end({"outcome": "failed", "exit_code": error.exit_code, "error": error.what, "remedy": error.remedy})
        raise


def compute(config: RunConfig, plan: Plan, resources: Resources, observer: Observer, run: Run) -> Mapping[str, str]:
    """All parts of a plan, and why some are lost: part URL → reason."""
    for warning in plan.warnings:
        observer.warn(warning)
    observer.planned(plan)

    def on_report(report: TaskReport) -> None:
        run.task(report)
        observer.task_done(report)
        for block in report.blocks:
            if block.error is not None:
                raise block.error

    return driver.engine(config.engine, config.device, len(plan.tasks))(plan.tasks, resources, Reports(on_report))


def resources_of(config: RunConfig) -> Resources:
    """Where tasks run; a device that is not there is told before anything is written."""
    if config.engine != "ray" or config.device.partition(":")[0] not in {"auto", "cpu", "cuda"}:
        checked_device(config.device)
    return Resources(config.device, config.threads or default_threads(), config.workers)


def require_room(config: RunConfig, *plans: Plan) -> None:
    """Refuse what cannot fit into memory, or on the disk: the parts of the last plan, and every plan's adapter.

    Raises:
        RequestError: with both numbers.
    """
    plan = plans[-1]
    if config.engine != "ray":
        require_fits(plan, available_memory())
    storage.require_writable(config.out)
    needed = plan.part_bytes + 4 * sum(each.adapter_parameters for each in plans)
    free = storage.free_bytes(config.out)
    if free is not None and free < needed:
        raise RequestError(
            f"no room: parts and adapter need up to {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free at {config.out}",
            remedy="free some space, or choose another output folder",
        )


def result_of(config: RunConfig, prepared: Prepared, concluded: Concluded, read: int) -> ExtractResult:
    """What a caller is told."""
    return ExtractResult(
        concluded.outcome,
        config.out,
        concluded.plan.version,
        concluded.plan.rank,
        concluded.plan.written_rank,
        concluded.plan.policy.name,
        {row.tensor: row.rank for row in concluded.rows if row.rank is not None},
        concluded.adapter_bytes,
        concluded.natural_bytes,
        prepared.tuned.nbytes,
        read,
        summarize(concluded.rows),
        (*concluded.plan.warnings, *concluded.warnings),
    )
