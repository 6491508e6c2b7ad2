"""What became, or would become, of one pair of checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phlora_pipeline.render import ranks
from phlora_pipeline.render.text import line, table
from phlora_pipeline.summary import percent, reasons, size

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.logits import Agreement
    from phlora_pipeline.pipeline import ExtractResult, Prepared
    from phlora_pipeline.verify import Verification

MOST_NAMES = 10


def show_result(result: ExtractResult) -> None:
    summary = result.summary
    if result.outcome == "nothing_to_adapt":
        drowned = any("below storage precision" in reason for _, reason, *_ in summary.left_out)
        why = (
            "no update stands above the rounding of its checkpoint"
            if drowned
            else "no target tensor differs between the two checkpoints"
        )
        line(f"Nothing to adapt: {why}. The manifest is at {result.out}/energy.parquet")
        return
    if result.outcome == "exists":
        line("This adapter is there already, nothing was read:")
    line(
        f"{result.out}  ({ranks.of_result(result)}, {size(result.adapter_bytes)}, {percent(result.adapter_bytes / result.checkpoint_bytes)} of the checkpoint)"
    )
    if padded := ranks.padding(result):
        line(padded)
    counts = {
        "adapted": summary.adapted,
        "unchanged": summary.unchanged,
        "zero-filled": summary.zero_filled,
        "kept whole": summary.carried,
        "left out": summary.skipped,
        "failed": summary.failed,
    }
    line("tensors: " + ", ".join(f"{number} {name}" for name, number in counts.items() if number))
    known = ", ".join(
        f"{percent(share)} at rank {rank}" for rank, share in summary.energy_at.items() if share is not None
    )
    if known and result.policy != "fixed":
        known = f"one rank for all would keep {known}"
    line(
        f"energy of the update kept: {percent(summary.preserved_energy)} by the factors, {percent(summary.written_energy)} as written"
        + (f" ({known})" if known else "")
    )
    kept = f", {percent(summary.carried_energy, 2)} in tensors that are kept whole" if summary.carried else ""
    line(f"coverage: {percent(summary.coverage)} of ‖ΔW‖² lies in adapted tensors{kept}")
    for reason, number, share in reasons(summary):
        line(f"  left out: {number} tensors, {percent(share, 2)} of ‖ΔW‖²: {reason} ({_some(result, reason)})")
    for name, reason in summary.uncompared[:MOST_NAMES]:
        line(f"  not compared: {name}: {reason}")
    if len(summary.uncompared) > MOST_NAMES:
        line(f"  not compared: {len(summary.uncompared) - MOST_NAMES} more, in the manifest")


def _some(result: ExtractResult, reason: str, most: int = 3) -> str:
    """The tensors with the largest change among those left out for a reason, with ‖ΔW‖/‖W‖."""
    told = [(name, relative) for name, why, _, relative in result.summary.left_out if why == reason]
    names = [f"{name} changed by {percent(relative, 2)}" for name, relative in told[:most]]
    return ", ".join(names) + (" … all of them: in the manifest" if len(told) > most else "")


def plan_record(prepared: Sequence[Prepared]) -> dict[str, Any]:
    """Of the adapters that one extraction gives; of several each has its own record beside what they share."""
    made = prepared[-1].plan
    own = [ranks.plan_record(each) for each in prepared]
    return {
        **own[-1],
        **({"adapters": own} if len(own) > 1 else {}),
        "extraction_id": made.extraction_id,
        "adapted": [{"tensor": pair.name, "kind": pair.kind, "shape": pair.shape} for pair in made.adapted],
        "carried": {name: place.words for name, place in made.carried.items()},
        "left_out": {name: reason for name, reason in made.left_out.items() if name not in made.carried},
        "unread": dict(made.unread),
        "base_only": made.base_only,
        "tasks": len(made.tasks),
        "read_bytes": made.nbytes,
        "flops": made.flops,
        "worker_bytes": made.worker_bytes,
        "adapter_parameters": made.adapter_parameters,
        "warnings": ranks.warnings(prepared),
    }


def show_plan(prepared: Sequence[Prepared]) -> None:
    from rich.console import Console
    from rich.table import Table

    made = prepared[-1].plan
    table = Table("kind", "tensors", "entries", box=None)
    kinds = sorted({pair.kind for pair in made.adapted})
    for kind in kinds:
        pairs = [pair for pair in made.adapted if pair.kind == kind]
        table.add_row(kind, str(len(pairs)), f"{sum(pair.numel for pair in pairs):,}")
    line(
        f"adapt {len(made.adapted)} tensors in {sum(task.block.purpose == 'factor' for task in made.tasks)} blocks, {'up to ' if made.policy.chooses else ''}rank {made.written_rank}:"
    )
    Console().print(table)
    grouped: dict[str, list[str]] = {}
    for name, reason in {**made.left_out, **made.unread}.items():
        if name not in made.carried:
            grouped.setdefault(reason, []).append(name)
    if made.carried:
        line(f"keep {len(made.carried)} tensors whole, where they changed: norms, biases, and what goes with them")
    for reason, names in sorted(grouped.items(), key=lambda item: -len(item[1])):
        line(
            f"leave out {len(names)}: {reason} ({', '.join(names[:3])}{' … all of them: --json' if len(names) > 3 else ''})"
        )
    line(
        f"read {size(made.nbytes)}, compute {made.flops / 1e12:.2f} TFLOP, {size(made.worker_bytes)} of memory per worker"
    )
    for text in ranks.plan_lines(prepared):
        line(text)
    for warning in ranks.warnings(prepared):
        line(f"warning: {warning}")


def show_profile(rates: dict[str, Any], out: str) -> None:
    for key, value in rates.items():
        unit = {"stream_rate": "GB/s", "call": "µs"}.get(key, "Gflop/s")
        scale = 1e6 if key == "call" else 1e-9
        line(f"{key:15} {value * scale:.1f} {unit}" if key == "call" or key.endswith("_rate") else f"{key:15} {value}")
    line(f"written to {out}; use it by: phlora extract --profile {out}")


def show_verification(found: Verification, agreement: Agreement | None = None) -> None:
    for problem in found.problems:
        line(f"problem: {problem}")
    bad = (check for check in found.modules if check.problem)
    table(
        ("module", "energy", "promised", "problem"),
        ((check.module, percent(check.written_energy, 2), percent(check.promised, 2), check.problem) for check in bad),
    )
    if agreement:
        line(
            f"against the fine-tune at {agreement.positions} positions: base with adapter KL {agreement.kl:.3g}, first choice equal {percent(agreement.top1)}; base alone KL {agreement.base_kl:.3g}, {percent(agreement.base_top1)}"
        )
    state = "passed" if found.passed else "FAILED"
    line(
        f"{state}: {len(found.modules)} modules, {percent(found.written_energy, 2)} of their update's energy is in the written bytes"
    )
