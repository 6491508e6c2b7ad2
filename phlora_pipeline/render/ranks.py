"""How ranks are, or will be, chosen, and what padding them costs: of a result, and of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from phlora_pipeline.ranks import spread_words
from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.pipeline import ExtractResult, Prepared


def of_result(result: ExtractResult) -> str:
    """For the headline: `rank 32`, or the range that a policy chose."""
    if result.policy == "fixed" or len(set(result.ranks.values())) < 2:
        return f"rank {result.rank}"
    return f"ranks {spread_words(result.ranks.values())}"


def padding(result: ExtractResult) -> str:
    """What is written beyond the tensors' own ranks; empty where nothing is."""
    if result.adapter_bytes <= result.natural_bytes or not result.natural_bytes:
        return ""
    return f"zero-padded to rank {result.written_rank}: {size(result.adapter_bytes)} instead of {size(result.natural_bytes)} with each tensor at its own rank"


def plan_record(prepared: Prepared) -> dict[str, Any]:
    """Of one adapter."""
    made, outlook = prepared.plan, prepared.outlook()
    return {
        "version": made.version,
        "policy": made.policy.name,
        "rank": made.rank,
        "written_rank": made.written_rank,
        "per_tensor_ranks": made.per_tensor_ranks,
        "file_bytes": outlook.file_bytes,
        "natural_bytes": outlook.natural_bytes,
        "least_bytes": outlook.least_bytes,
        **({"budget": made.policy.budget.amount, "budget_counts": made.policy.budget.counts} if made.policy.budget else {}),
        **({"even_rank": outlook.rank} if made.policy.budget else {}),
    }  # fmt: skip


def warnings(prepared: Sequence[Prepared]) -> list[str]:
    """Of all plans, each once."""
    return list(dict.fromkeys(warning for each in prepared for warning in each.plan.warnings))


def plan_lines(prepared: Sequence[Prepared]) -> Iterator[str]:
    """What would be written, taking every target as changed."""
    if len(prepared) > 1:
        yield f"write {len(prepared)} adapters from one extraction, all cut from rank {prepared[-1].plan.rank}:"
    for each in prepared:
        yield ("  " if len(prepared) > 1 else "") + _line(each)


def _line(prepared: Prepared) -> str:
    made, outlook = prepared.plan, prepared.outlook()
    policy = made.policy
    if policy.budget is not None:
        own = "ranks of its own for each tensor" if made.per_tensor_ranks else "one rank for all"
        return f"write an adapter within {policy.budget.words()}, {own}: rank {outlook.rank} for all would take {size(outlook.file_bytes)}, rank 1 {size(outlook.least_bytes)}"
    if policy.chooses:
        return f"write an adapter with ranks chosen {policy.words}, up to rank {made.rank}: at most {size(outlook.file_bytes)}"
    padded = f", {size(outlook.natural_bytes)} of it not padding" if outlook.natural_bytes < outlook.file_bytes else ""
    return f"write an adapter of rank {made.rank}, {made.adapter_parameters:,} parameters: {size(outlook.file_bytes)}{padded}"
