"""The manifest's rows: what the parts, the policy and the layout say of each tensor of the fine-tune."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

import torch

from phlora_pipeline import adapter, convolutions, lowrank, manifest, parts, targets
from phlora_pipeline.adapter import Layout
from phlora_pipeline.checkpoint import TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.parts import Part, TensorResult
from phlora_pipeline.plan import Plan
from phlora_pipeline.policy import Chosen


def rows_of(
    plan: Plan,
    layout: Layout,
    results: Mapping[str, TensorResult],
    sources: Mapping[str, Part],
    chosen: Chosen,
    dtype: str,
    *,
    base: Mapping[str, TensorRef],
    tuned: Mapping[str, TensorRef],
) -> tuple[EnergyRow, ...]:
    """One for each tensor of the fine-tune, by name.

    Args:
        plan: with the rank that the adapter has.
        layout: of the adapter.
        results: of every tensor that was compared.
        sources: tensor → the part that holds its factors.
        chosen: the ranks.
        dtype: of the adapter.
        base, tuned: the checkpoints' tensors.

    Raises:
        RequestError: a factor overflows the adapter's dtype.
    """
    made = []
    for name, ref in sorted(tuned.items()):
        row = _blank_row(plan, ref, base.get(name))
        if name in results:
            row = _measured_row(row, results[name], plan, layout)
        if name in sources:
            row = _factored_row(row, results[name], sources[name], plan, chosen, adapter.DTYPES[dtype][1])
        made.append(row)
        made += _new_rows(row, plan, layout)
    return tuple(made)


def median_cosine(results: Iterable[TensorResult], tuned: Mapping[str, TensorRef]) -> float | None:
    """Median over the matrices, each weighted by its energy ‖W_base‖_F²: a wrong base gives about 0, a fine-tune about 1."""
    matrices = (result for result in results if len(tuned[result.name].shape) >= 2)
    weighted = sorted((cosine, result.base_sq) for result in matrices if (cosine := _cosine(result)) is not None)
    half = math.fsum(weight for _, weight in weighted) / 2
    seen = 0.0
    for cosine, weight in weighted:
        seen += weight
        if seen >= half:
            return cosine
    return None


def _blank_row(plan: Plan, ref: TensorRef, base: TensorRef | None) -> EnergyRow:
    return EnergyRow(
        plan.version, ref.name, targets.module_of(ref.name), targets.kind_of(ref.name, ref.shape), ref.shape,
        base.dtype if base else "", ref.dtype, status="skipped", reason=plan.unread.get(ref.name, ""),
    )  # fmt: skip


def _new_rows(row: EnergyRow, plan: Plan, layout: Layout) -> Iterator[EnergyRow]:
    """A row for those rows of a vocabulary that the base lacks: there is nothing to compare them with."""
    for name, reason in plan.unread.items():
        if name.startswith(f"{row.tensor}[") and name.endswith(":]"):
            place = plan.carried.get(row.tensor)
            kept = place is not None and layout.carries(place)
            yield EnergyRow(
                plan.version, name, name, row.kind, (row.shape[0] - int(name[len(row.tensor) + 1 : -2]), *row.shape[1:]), "",
                row.tuned_dtype, status="carried" if kept else "skipped", reason=place.words if place and kept else reason,
            )  # fmt: skip


def _measured_row(row: EnergyRow, result: TensorResult, plan: Plan, layout: Layout) -> EnergyRow:
    if result.status == "failed":
        excluded = plan.left_out.get(row.tensor) == targets.EXCLUDED
        told = f"{targets.EXCLUDED}; {result.reason}" if excluded else result.reason
        return replace(row, status="skipped" if excluded else "failed", reason=told)
    changed = result.delta_sq > 0
    filled = row.module in layout.zero_filled and row.tensor not in plan.carried
    kept = changed and row.tensor in plan.carried and layout.carries(plan.carried[row.tensor])
    status: manifest.Status = "zero_filled" if filled else "carried" if kept else "skipped" if changed else "unchanged"
    reason = plan.left_out.get(row.tensor, "") if changed else "no entry differs" if filled else ""
    if plan.tied and row.module == plan.tied[1] and row.module in layout.modules:
        status = "adapted"
    return replace(
        row,
        status=status,
        reason=reason,
        delta_norm=math.sqrt(result.delta_sq),
        noise_energy=min(result.noise_sq / result.delta_sq, 1.0) if changed else None,
        relative_change=math.sqrt(result.delta_sq / result.base_sq) if result.base_sq else None,
        cosine=_cosine(result),
    )


def _factored_row(
    row: EnergyRow, result: TensorResult, part: Part, plan: Plan, chosen: Chosen, dtype: torch.dtype
) -> EnergyRow:
    most = min(row.shape[0], math.prod(row.shape[1:]))
    values = result.singular_values
    asked = convolutions.rank_of_one(row.module, plan.rank)
    row = replace(
        row,
        noise_edge=result.noise_edge,
        singular_values=values,
        energy_at={
            r: lowrank.preserved_energy(values, result.delta_sq, min(convolutions.rank_of_one(row.module, r), most))
            for r in manifest.ENERGY_RANKS
        },
        solver=result.solver,
        certificate=result.certificate,
    )
    if (rank := chosen.ranks.get(row.tensor)) is None:
        return replace(row, reason=chosen.without[row.tensor])
    dropped_sq = result.residual_sq + math.fsum(value * value for value in values[rank:])
    lost_sq = dropped_sq + _rounding_sq(row.tensor, part, rank, dtype)
    return replace(
        row,
        status="adapted",
        reason="; ".join(
            [*_about_rank(result, most, plan, asked), *filter(None, [chosen.notes.get(row.tensor)]), *result.notes]
        ),
        rank=rank,
        preserved_energy=lowrank.preserved_energy(values, result.delta_sq, rank),
        written_energy=1 - lost_sq / result.delta_sq,
    )


def _about_rank(result: TensorResult, most: int, plan: Plan, asked: int) -> Iterator[str]:
    values = result.singular_values
    wanted, kept = plan.policy.energy, lowrank.preserved_energy(values, result.delta_sq, len(values))
    if not plan.policy.chooses and asked > most:
        yield f"rank {asked} clipped to {most}, all there is"
    if wanted is not None and kept is not None and kept < wanted:
        yield f"the threshold of {wanted:g} is not reached at the largest rank allowed, {len(values)}"


def _rounding_sq(name: str, part: Part, rank: int, dtype: torch.dtype) -> float:
    """What rounding the factors to the adapter's dtype adds to the squared residual.

    The exact residual is orthogonal to the factors' row and column spaces, so the two parts add up; the cross term that
    is left is of second order in the rounding. `phlora verify` measures the sum from the written bytes.
    """
    A = adapter.cut(parts.read_factor(part, "A", name), "A", rank)
    B = adapter.cut(parts.read_factor(part, "B", name), "B", rank)
    A_written, B_written = adapter.round_factor(A, dtype), adapter.round_factor(B, dtype)
    if not (torch.isfinite(A_written).all() and torch.isfinite(B_written).all()):
        raise RequestError(
            f"the factors of {name} overflow {str(dtype).removeprefix('torch.')}",
            remedy="use --dtype bfloat16 or --dtype float32",
        )
    return lowrank.rounding_error_sq(A, B, A_written, B_written)


def _cosine(result: TensorResult) -> float | None:
    scale = math.sqrt(result.base_sq) * math.sqrt(result.tuned_sq)
    if not scale:
        return None
    return max(-1.0, min(1.0, (result.base_sq + result.tuned_sq - result.delta_sq) / (2 * scale)))
