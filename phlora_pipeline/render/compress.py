"""What became of an adapter that was compressed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from phlora_pipeline.render.text import line
from phlora_pipeline.summary import percent, size

if TYPE_CHECKING:  # torch comes with it
    from phlora_pipeline.compress import CompressResult


def show_compression(result: CompressResult) -> None:
    summary, smallest = result.summary, min(result.ranks.values())
    if result.outcome == "exists":
        line("This adapter is there already:")
    told = f"{result.rank}" if smallest == result.rank else f"{smallest} to {result.rank}"
    padded = f", written as {result.written_rank}" if result.written_rank != result.rank else ""
    line(
        f"{result.out}  (rank {result.original_rank} → {told}{padded}; {size(result.original_bytes)} → {size(result.adapter_bytes)})"
    )
    kept = f", {summary.carried} tensors kept as they were" if summary.carried else ""
    line(
        f"modules: {summary.adapted} compressed"
        + (f", {summary.zero_filled} zero" if summary.zero_filled else "")
        + kept
    )
    known = ", ".join(
        f"{percent(share, 2)} at rank {rank}"
        for rank, share in summary.energy_at.items()
        if share is not None and rank < result.original_rank
    )
    line(
        f"energy of the original adapter kept: {percent(summary.preserved_energy, 2)} by the factors, {percent(summary.written_energy, 2)} as written"
        + (f" ({known})" if known else "")
    )
    for warning in result.warnings:
        line(f"warning: {warning}", sys.stderr)
