"""Judge → publish: what becomes of a model when all its parts are there, or lost; and of one that stands already."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from phlora_pipeline import adapter, manifest, reducer, storage
from phlora_pipeline.card import model_card
from phlora_pipeline.config import RunConfig
from phlora_pipeline.errors import ConflictError, ModelFailedError, NotFoundError, RequestError, SourceChangedError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.plan import NUMERICS_REVISION, Plan
from phlora_pipeline.prepare import Prepared
from phlora_pipeline.reducer import FAR_FROM_BASE, NOT_A_FINE_TUNE, Reduction
from phlora_pipeline.summary import percent, summarize

Outcome = Literal["committed", "exists", "nothing_to_adapt"]
"""`exists`: the same adapter stood there already. `nothing_to_adapt`: the checkpoints are the same."""


@dataclass(frozen=True, slots=True)
class Concluded:
    """What has become of a model.

    Attributes:
        outcome: see `Outcome`.
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


def conclude(config: RunConfig, prepared: Prepared, lost: Mapping[str, str], run_url: str) -> Concluded:
    """All parts are there, or lost: judge them, and publish the adapter.

    Args:
        config: where to, and what is tolerated.
        prepared: the plan.
        lost: part URL → why its block was given up.
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
