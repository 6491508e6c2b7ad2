"""The recipe: open → plan → run → reduce → publish. Reads as the method; the work is one layer below."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from phlora_pipeline import adapter, driver, manifest, reducer, storage
from phlora_pipeline.card import model_card
from phlora_pipeline.config import RunConfig
from phlora_pipeline.engine import Reports, Resources
from phlora_pipeline.errors import (
    ConflictError,
    ModelFailedError,
    NotFoundError,
    PhloraError,
    RequestError,
    SourceChangedError,
)
from phlora_pipeline.extract import TaskReport, checked_device
from phlora_pipeline.machine import available_memory, default_threads
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.plan import NUMERICS_REVISION, Plan, require_fits
from phlora_pipeline.prepare import Prepared, plan, prepare
from phlora_pipeline.reducer import FAR_FROM_BASE, NOT_A_FINE_TUNE, Reduction
from phlora_pipeline.runlog import Run
from phlora_pipeline.summary import Summary, percent, summarize

__all__ = [
    "Concluded", "ExtractResult", "Observer", "Outcome", "Prepared",
    "compute", "conclude", "extract", "failures_recorded", "plan", "prepare", "require_room", "resources_of", "result_of", "standing",
]  # fmt: skip

Outcome = Literal["committed", "exists", "nothing_to_adapt"]


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


@dataclass(frozen=True, slots=True)
class Concluded:
    """What has become of a model.

    Attributes:
        outcome: as of `ExtractResult`.
        plan: with the rank that the adapter has.
        rows: of the manifest.
        adapter_bytes: size of the weights' file.
        natural_bytes: the same, if each pair could be written at its own rank.
        warnings: in words.
    """

    outcome: Outcome
    plan: Plan
    rows: tuple[EnergyRow, ...]
    adapter_bytes: int
    natural_bytes: int
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


def conclude(config: RunConfig, prepared: Prepared, lost: Mapping[str, str], run_url: str) -> Concluded:
    """All parts are there, or lost: judge them, and publish the adapter.

    Args:
        config: where to, and what is tolerated.
        prepared: the plan.
        lost: part URL → why there is none.
        run_url: where the rows of a failed model go.

    Raises:
        RequestError: it is no fine-tune of this base.
        ModelFailedError: a tensor failed; nothing is published.
        SourceChangedError: another run has removed the parts, or somebody the checkpoint.
    """
    plan = prepared.plan
    try:
        reduction = reducer.reduce(plan, lost, dtype=config.dtype, base=prepared.base, tuned=prepared.tuned)
        warnings = (*_judge(reduction, config), *reduction.warnings, *_dropped(reduction))
        if reduction.failed and not (config.allow_partial and reduction.layout.slots):
            reducer.drop_failed(reduction)
            raise _failed(reduction, run_url, config)
        outcome = _publish(config, prepared, reduction)
    except NotFoundError as error:
        # Parts that vanish have been published and cleaned up by another run of the same extraction.
        if (found := standing(config, prepared)) is None:  # with other ranks, say, or it failed
            raise SourceChangedError(error.what, remedy="run again: what is not there is made anew") from error
        return found
    if not config.keep_parts:
        reducer.drop_parts(plan)
    return Concluded(outcome, reduction.plan, reduction.rows, reduction.file_bytes, reduction.natural_bytes, warnings)


def standing(config: RunConfig, prepared: Prepared) -> Concluded | None:
    """The end of an earlier run, where this very adapter stands already."""
    parts = prepared.plan.parts_folder
    files = reducer.standing(
        config.out,
        prepared.plan.version,
        interrupted=lambda: bool(storage.list_folder(parts)),
        overwrite=config.overwrite,
    )
    if files is None:
        return None
    if not config.keep_parts:
        reducer.drop_parts(prepared.plan)  # of a run that was killed after its commit
    plan, rows = prepared.plan, tuple(manifest.read(storage.join(config.out, reducer.MANIFEST)))
    if plan.policy.chooses:
        plan = plan.of_rank(max((row.rank for row in rows if row.rank is not None), default=1))
    if any(row.status == "failed" for row in rows) and not config.allow_partial:
        raise ConflictError(
            f"{config.out} holds a partial adapter: some tensors failed when it was extracted",
            remedy="pass --overwrite to extract it again, or --allow-partial to accept it",
        )
    if adapter.CONFIG not in files:
        return Concluded("nothing_to_adapt", plan, rows, 0, 0, ())
    info = storage.stat(storage.join(config.out, adapter.WEIGHTS))
    return Concluded("exists", plan, rows, info.size if info else 0, _natural_bytes(config), ())


def _natural_bytes(config: RunConfig) -> int:
    info = storage.stat(storage.join(config.out, reducer.RUN))
    written = reducer.run_record(info).get("written", {}) if info else {}
    return int(written.get("natural_bytes", 0))


def _publish(config: RunConfig, prepared: Prepared, reduction: Reduction) -> Outcome:
    plan = reduction.plan
    model = plan.tasks[0].members[0].model or storage.basename(config.tuned)
    names = {"model": model, "base": prepared.base_name or storage.basename(config.base)}
    if config.overwrite:
        reducer.unpublish(config.out)
    if not reduction.layout.slots:
        reducer.publish_manifest(config.out, reduction.rows, **names)
        return "nothing_to_adapt"
    reducer.publish(
        config.out,
        reducer.weights_of(reduction),
        reduction.rows,
        config=adapter.adapter_config(
            plan,
            reduction.layout,
            prepared.base_name,
            (prepared.tuned if prepared.tuned.config else prepared.base).architectures,
        ),
        card=model_card(
            plan,
            reduction.rows,
            base_name=prepared.base_name,
            dtype=reduction.dtype,
            sizes=(reduction.file_bytes, reduction.natural_bytes),
        ),
        run=_run_record(config, prepared, reduction),
        **names,
    )
    return "committed"


def _judge(reduction: Reduction, config: RunConfig) -> list[str]:
    """Is it a fine-tune at all? A wrong base must not publish garbage with exit 0."""
    cosine = reduction.cosine
    if cosine is None or cosine >= FAR_FROM_BASE:
        return []
    told = f"the median cosine of base and fine-tune is {cosine:.2f}"
    if cosine < NOT_A_FINE_TUNE and not config.force:
        raise RequestError(
            f"this is not a fine-tune of this base: {told}; unrelated checkpoints give about 0, fine-tunes 0.9 and more",
            remedy="give the right base, or pass --force, in a zoo.yaml run.force, if you know better",
        )
    return [f"{told}: far for a fine-tune; is it the right base?"]


def _dropped(reduction: Reduction) -> Iterator[str]:
    """What could be taken along: by name, with its share of the energy and the remedy."""
    left_out = summarize(reduction.rows).left_out
    carried = [item for item in left_out if "--for peft --carry all" in item[1]]
    adapted = [item for item in left_out if "--for peft" in item[1] and item not in carried]
    for out, who, remedy in (
        (adapted, "not every server takes", "--for peft adapts them"),
        (carried, "PEFT has no pair for", "--for peft --carry all keeps them whole"),
    ):
        names = ", ".join(name for name, *_ in out[:3]) + (f" and {len(out) - 3} more" if len(out) > 3 else "")
        if out:
            yield f"{who} {names}: {percent(sum(item[2] for item in out), 2)} of ‖ΔW‖² left out; {remedy}"


def _failed(reduction: Reduction, run_url: str, config: RunConfig) -> ModelFailedError:
    reducer.publish_manifest(
        run_url, reduction.rows, model=storage.basename(config.tuned), base=storage.basename(config.base)
    )
    first = reduction.failed[0]
    return ModelFailedError(
        f"{len(reduction.failed)} of {len(reduction.rows)} tensors failed, no adapter is published; {first.tensor}: {first.reason}",
        remedy=f"all rows are in {storage.join(run_url, reducer.MANIFEST)}; mend the checkpoint, or publish without these tensors: --allow-partial, in a zoo.yaml run.allow_partial",
    )


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


def _run_record(config: RunConfig, prepared: Prepared, reduction: Reduction) -> dict[str, Any]:
    """`run.json`: what decided the adapter's bytes, and nothing that differs between two runs that give the same."""
    deciding = (
        "rank", "energy", "budget", "max_rank", "targets", "include", "exclude", "conv_groups", "carry", "dialect", "dtype", "solver", "tolerance"
    )  # fmt: skip
    settings = config.model_dump(mode="json", include=set(deciding))
    return {
        "version": prepared.plan.version,
        "extraction_id": prepared.plan.extraction_id,
        "numerics_revision": NUMERICS_REVISION,
        "settings": settings,
        "written": {
            "rank": reduction.plan.written_rank,
            "dtype": reduction.dtype,
            "base_name": prepared.base_name,
            "natural_bytes": reduction.natural_bytes,
        },
        "sources": {
            # Not where they are: a checkpoint that is moved is the same. The run's own request.json has the places.
            "base": {"fingerprint": prepared.base.fingerprint},
            "tuned": {
                "fingerprint": prepared.tuned.fingerprint,
                **({"names": prepared.tuned.matched} if prepared.tuned.matched else {}),
            },
        },
        "summary": summarize(reduction.rows).as_dict(),
    }
