"""What became of a merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

from phlora_pipeline.render.text import line
from phlora_pipeline.summary import size

if TYPE_CHECKING:  # torch comes with it
    from phlora_pipeline.merge import MergeResult


def show_merge(result: MergeResult) -> None:
    if result.outcome == "exists":
        line("This merge is there already, no weight was read:")
    line(f"{result.out}  ({size(result.nbytes)}; {size(result.written_bytes)} written now)")
    line(f"tensors: {result.changed} changed, {result.tensors - result.changed} as in the base")
    if result.left_out:
        line(f"not copied from the base: {', '.join(result.left_out[:5])}{' …' if len(result.left_out) > 5 else ''}")
