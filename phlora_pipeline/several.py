"""Adapters of several ranks from one extraction: a folder for each, `OUT/r16`, and no second SVD.

Truncated decompositions are nested, so all are cut from parts of the largest rank, which lie in `OUT/_parts` until the last
adapter is committed. Each has the bytes that `--rank N --max-rank LARGEST` alone would have given.
"""

from __future__ import annotations

from collections.abc import Sequence

from phlora_pipeline import pipeline, reducer, storage
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.config import RunConfig, run_config
from phlora_pipeline.errors import RequestError
from phlora_pipeline.pipeline import ExtractResult, Observer
from phlora_pipeline.prepare import PARTS, Prepared, prepare
from phlora_pipeline.runlog import Run


def configs(config: RunConfig, ranks: Sequence[int]) -> list[RunConfig]:
    """One extraction for each rank, smallest first.

    Args:
        config: with the largest rank, and `out` as the folder of them all.
        ranks: of the adapters.
    """
    given = config.model_dump() | {"max_rank": max(config.max_rank, *ranks)}
    return [run_config(**{**given, "rank": rank, "out": folder(config.out, rank)}) for rank in sorted(set(ranks))]


def folder(out: str, rank: int) -> str:
    """Where the adapter of a rank goes."""
    return storage.join(out, f"r{rank}") if out else ""


def plan(config: RunConfig, ranks: Sequence[int]) -> list[tuple[RunConfig, Prepared]]:
    """A plan for each rank, or for the config's own; all have the same tasks and parts.

    Raises:
        RequestError: the pair, or one of the ranks, is wrong.
    """
    base, parts_url = open_checkpoint(config.base), storage.join(config.out, PARTS)
    wanted = configs(config, ranks) if ranks else [config]
    return [(one, prepare(one, base, parts_url)) for one in wanted]


def extract(config: RunConfig, ranks: Sequence[int], observer: Observer) -> list[ExtractResult]:
    """One fine-tune → an adapter of each rank. A run that was killed goes on where it stopped.

    Raises:
        PhloraError: as `pipeline.extract`; adapters that are committed stay.
    """
    if not config.out:
        raise RequestError("there is no output folder", remedy="say where the adapters go: out")
    # The parts are shared: whoever is done must leave them to the others.
    planned = [(one.model_copy(update={"keep_parts": True}), prepared) for one, prepared in plan(config, ranks)]
    there = [(one, prepared, pipeline.standing(one, prepared)) for one, prepared in planned]
    standing = [pipeline.result_of(one, prepared, found, 0) for one, prepared, found in there if found is not None]
    results = standing if len(standing) == len(planned) else _extract(config, planned, observer)
    if not config.keep_parts:
        reducer.drop_parts(planned[-1][1].plan)
    return results


def _extract(
    config: RunConfig, planned: Sequence[tuple[RunConfig, Prepared]], observer: Observer
) -> list[ExtractResult]:
    largest, plans = planned[-1][0], [prepared.plan for _, prepared in planned]
    resources = pipeline.resources_of(largest)
    pipeline.require_room(config, *plans)
    run = Run.begin(config.out, config.model_dump(mode="json") | {"ranks": [one.rank for one, _ in planned]})
    results = []
    with pipeline.failures_recorded(run, plans[-1], keep_parts=config.keep_parts):
        for warning in {text: None for plan in plans[:-1] for text in plan.warnings if text not in plans[-1].warnings}:
            observer.warn(warning)
        lost = pipeline.compute(largest, plans[-1], resources, observer, run)
        for one, prepared in planned:
            found = pipeline.standing(one, prepared) or pipeline.conclude(one, prepared, lost, run.url)
            for warning in found.warnings:
                observer.warn(f"rank {one.rank}: {warning}")
            results.append(pipeline.result_of(one, prepared, found, run.nbytes))
    run.end({"outcome": "committed", "exit_code": 0, "adapters": {one.out: one.version for one in results}})
    return results
