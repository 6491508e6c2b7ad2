"""The model card of a compressed adapter. Pure text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from phlora_pipeline import targets
from phlora_pipeline.card import both_ends, code, front_matter, loading
from phlora_pipeline.lora import Adapter
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.summary import percent, summarize
from phlora_pipeline.targets import Dialect


def compressed_card(
    lora: Adapter,
    rows: Sequence[EnergyRow],
    ranks: Mapping[str, int],
    *,
    written: int,
    dialect: Dialect,
    base_name: str,
    dtype: str,
) -> str:
    """What it was, what is left of it, and how it is loaded."""
    summary, rules = summarize(rows), targets.server_rules("", dialect)
    smallest, largest = min(ranks.values()), max(ranks.values())
    told = f"{largest}" if smallest == largest else f"{smallest} to {largest}"
    lines = [
        *front_matter(base_name, rules),
        f"# LoRA of rank {told}, compressed from one of rank {lora.rank}",
        "",
        f"Each pair of factors of an existing adapter was replaced by the best one of its rank: the truncated singular value decomposition of B·A, by phlora-pipeline. Base: {code(base_name) if base_name else 'not named'}; written for `{dialect}` in {dtype}, rank {written}; every scale is 1 (`lora_alpha` = `r`).",
        "",
        "| what | share of the original adapter's energy ‖B·A‖² |",
        "|---|---|",
        f"| kept by the factors | {percent(summary.preserved_energy, 2)} |",
        f"| kept by the bytes as written | {percent(summary.written_energy, 2)} |",
        "",
        f"{summary.adapted} modules are compressed, {summary.zero_filled} were zero, {summary.carried} tensors are kept as they were. `energy.parquet` has a row for each.",
        "",
        "## Loading it",
        "",
        *loading(
            rules,
            written,
            base_name,
            own_ranks=rules.per_tensor_ranks and smallest != largest,
            carried=bool(summary.carried),
        ),
        *_both_ends(lora),
    ]
    return "\n".join(lines)


def _both_ends(lora: Adapter) -> list[str]:
    """What mergers do where input and output are one matrix; whether the base ties them, the adapter alone does not tell."""
    inputs = [name for name, module in lora.modules.items() if module.form == "embedding"]
    outputs = [name for name in lora.modules if targets.kind_of(f"{name}.weight", (1, 1)) == "lm_head"]
    if not inputs or not outputs:
        return []
    return both_ends(f"The base may tie {code(outputs[0])} to {code(inputs[0])}")
