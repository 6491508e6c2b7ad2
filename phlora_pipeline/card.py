"""The adapter's README.md: a model card that says where the adapter comes from and what it keeps. Pure text."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from phlora_pipeline import ranks, targets
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.plan import Plan
from phlora_pipeline.policy import BELOW_PRECISION
from phlora_pipeline.summary import Summary, percent, reasons, size, summarize
from phlora_pipeline.targets import ServerRules

MOST_NAMES = 40


def model_card(
    plan: Plan, rows: Sequence[EnergyRow], *, base_name: str, dtype: str, sizes: tuple[int, int] = (0, 0)
) -> str:
    """The card, with the front matter that hubs read.

    Args:
        plan: for rank and dialect.
        rows: of the manifest.
        base_name: hub id or served name of the base; empty where it is not known. Never a path.
        dtype: of the adapter.
        sizes: bytes of the weights' file, as it is, and if each pair could be written at its own rank.
    """
    summary, rules = summarize(rows), targets.server_rules(plan.model_type, plan.dialect)
    own = [row.rank for row in rows if row.rank is not None] if plan.policy.chooses else []
    factors = f"ranks {ranks.spread_words(own)}" if len(set(own)) > 1 else f"rank {plan.rank}"
    lines = [
        *front_matter(base_name, rules),
        f"# LoRA of {factors}, extracted from a full fine-tune",
        "",
        f"Extracted, not trained: the truncated singular value decomposition of W_tuned − W_base, weight by weight (PHLoRA, Vasani et al., 2025), by phlora-pipeline. Base: {code(base_name) if base_name else 'not named'}; model type {code(plan.model_type or 'unknown')}; written for `{plan.dialect}` in {dtype}, rank {plan.written_rank}.",
        "",
        *_chosen(plan, rows, sizes),
        "| what | share of the update's energy ‖ΔW‖² |",
        "|---|---|",
        f"| kept by the factors of the adapted tensors, {factors} | {percent(summary.preserved_energy)} |",
        *_by_rank(plan, summary),
        f"| kept by the bytes as written | {percent(summary.written_energy)} |",
        f"| lying in adapted tensors at all | {percent(summary.coverage)} |",
        *(
            [f"| lying in tensors that are kept whole | {percent(summary.carried_energy, 2)} |"]
            if summary.carried
            else []
        ),
        "",
        f"{summary.adapted} tensors are adapted, {summary.unchanged} unchanged, {summary.zero_filled} zero-filled to complete a family, {summary.carried} kept whole, {summary.skipped} left out, {summary.failed} failed. `energy.parquet` has a row for each; `phlora report THIS_FOLDER --out page.html` draws what it tells.",
        "",
    ]
    lines += _left_out(rows, summary)
    lines += [
        "## Loading it",
        "",
        *loading(rules, plan.written_rank, base_name, own_ranks=plan.per_tensor_ranks, carried=bool(summary.carried)),
        *_other_rows(plan, rows),
    ]
    if plan.tied:
        lines += both_ends(f"The base ties {code(plan.tied[1])} to {code(plan.tied[0])}")
    return "\n".join(lines)


def _by_rank(plan: Plan, summary: Summary) -> list[str]:
    """What other ranks keep: smaller ones are slices of these factors, unless each tensor has a rank of its own."""
    known = {rank: share for rank, share in summary.energy_at.items() if share is not None}
    if plan.policy.chooses:
        return [f"| rank {rank} for each of them would keep | {percent(share)} |" for rank, share in known.items()]
    known = {rank: share for rank, share in known.items() if rank < plan.rank}
    return [f"| … by the first {rank} of them | {percent(share)} |" for rank, share in known.items()]


def _chosen(plan: Plan, rows: Sequence[EnergyRow], sizes: tuple[int, int]) -> list[str]:
    """How ranks came about, where a policy chose them."""
    own = [row.rank for row in rows if row.rank is not None]
    if not plan.policy.chooses or not own:
        return []
    told = f"Ranks were chosen {plan.policy.words}: {ranks.spread_words(own)}; `energy.parquet` has each tensor's."
    padded, natural = sizes
    if padded > natural:
        told += f" All are zero-padded to {plan.written_rank}: {size(padded)}, of which {size(natural)} would do if each were written at its own rank (`--for peft` or `vllm`)."
    masked = sum(row.rank is not None and row.reason.startswith(BELOW_PRECISION) for row in rows)
    if masked:
        told += f" {masked} of them are of an {BELOW_PRECISION}: fewer than half of their entries differ at all, and what rounding has left of it is what is kept here."
    return [told, ""]


def front_matter(base_name: str, rules: ServerRules) -> list[str]:
    """What hubs read."""
    front = {
        "library_name": "diffusers" if rules.unets_only else "peft",
        "tags": ["lora", "phlora", "post-hoc"],
        **({"base_model": base_name, "base_model_relation": "adapter"} if base_name else {}),
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in front.items()), "---", ""]


def loading(rules: ServerRules, rank: int, base_name: str, *, own_ranks: bool, carried: bool) -> list[str]:
    """For the servers that the dialect is for, and no others.

    Args:
        rules: of the dialect.
        rank: as written.
        base_name: hub id or served name of the base, or empty.
        own_ranks: whether each module has one of its own.
        carried: whether anything is kept whole.
    """
    base = _cell(shlex.quote(base_name)) if base_name else "BASE"
    limit = targets.written_rank(rank, targets.server_rules(rules.model_type, "vllm").rank_grid)
    told = {
        "PEFT": [
            "```python",
            "from peft import PeftModel",
            f"base_model = ...  # {json.dumps(base_name) if base_name else 'the base'}, loaded by transformers or by your own code",
            'model = PeftModel.from_pretrained(base_model, "THIS_FOLDER")',
            "```",
        ],
        "vLLM": [f"vLLM: `vllm serve {base} --enable-lora --max-lora-rank {limit} --lora-modules NAME=THIS_FOLDER`."],
        "SGLang": [f"SGLang: `python -m sglang.launch_server --model-path {base} --lora-paths NAME=THIS_FOLDER`."],
        "diffusion UIs": [
            "Diffusion UIs: copy `adapter_model.safetensors` under a name of its own into the folder of LoRAs; its keys are kohya's (`lora_unet_…`), with each pair's alpha beside it."
        ],
        "llama.cpp": [
            "llama.cpp: `convert_lora_to_gguf.py --base BASE_FOLDER --outfile adapter.gguf THIS_FOLDER`, then `llama-server -m BASE.gguf --lora adapter.gguf`."
        ],
    }
    lines = [line for server in rules.takes for line in ["", *told[server]]][1:]
    if own_ranks and not rules.unets_only:
        lines += [
            "",
            "Each module has a rank of its own (`rank_pattern`): of the servers, only vLLM from 0.32 on reads that.",
        ]
    if carried:
        lines += ["", "PEFT only: vLLM and llama.cpp refuse, and SGLang drops, what is kept whole beside the factors."]
    return [*lines, ""]


def both_ends(tied: str) -> list[str]:
    """What mergers make of a delta that is on both ends of a tie. `tied`: which are, in words."""
    return [
        f"{tied}; both carry the delta here, which is right while the adapter is *not* merged: a merger that keeps the tie, as PEFT's, adds it twice. `phlora merge` adds it once.",
        "",
    ]


def _other_rows(plan: Plan, rows: Sequence[EnergyRow]) -> list[str]:
    """Who can load a vocabulary that the fine-tune has grown or shrunk."""
    pairs = ((row, plan.matrices.get(row.module)) for row in rows if row.status == "carried")
    kept = [row.shape[0] for row, pair in pairs if pair and row.tensor == pair.name and row.shape[0] != pair.rows]
    if kept:
        return [
            f"The fine-tune has not as many tokens as the base: resize the base before loading, `base_model.resize_token_embeddings({max(kept)})`. Without that PEFT refuses the adapter; no server can load it.",
            "",
        ]
    grown = [row.shape[0] for row in rows if row.tensor in plan.grown]
    if not grown:
        return []
    return [
        f"The fine-tune has more tokens than the base, up to {max(grown)}; the adapter is for the base's own and does not know the new ones. `--for peft --carry all` keeps them.",
        "",
    ]


def _left_out(rows: Sequence[EnergyRow], summary: Summary) -> list[str]:
    failed = [f"- {code(row.tensor)} failed: {_cell(row.reason)}" for row in rows if row.status == "failed"]
    if failed:
        failed = ["**This adapter is partial**; the energies above do not count these tensors:", "", *failed, ""]
    failed += [
        f"- {code(name)} could not be compared: {_cell(reason)}" for name, reason in summary.uncompared[:MOST_NAMES]
    ]
    grouped = reasons(summary)
    if not grouped:
        return [*failed, ""] if failed else []
    lines = ["## What it leaves out", "", "| why | tensors | share of ‖ΔW‖² |", "|---|---|---|"]
    lines += [f"| {_cell(reason)} | {number} | {percent(share, 2)} |" for reason, number, share in grouped]
    return [*failed, "", *lines, "", *_matrices_left_out(rows, summary)]


def _matrices_left_out(rows: Sequence[EnergyRow], summary: Summary) -> list[str]:
    """By name, since each of these could have carried a pair; norms and biases are in the manifest."""
    matrices = {row.tensor for row in rows if len(row.shape) >= 2}
    out = [(name, share) for name, _, share, _ in summary.left_out if name in matrices]
    if not out:
        return []
    names = [f"- {code(name)}: {percent(share, 2)} of ‖ΔW‖²" for name, share in out[:MOST_NAMES]]
    more = [f"- and {len(out) - MOST_NAMES} more, in `energy.parquet`"] if len(out) > MOST_NAMES else []
    return ["Matrices among them:", "", *names, *more, ""]


def _cell(text: str) -> str:
    """Text from a checkpoint or a flag, harmless inside a Markdown table."""
    flat = " ".join(text.split())[:300]
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")


def code(text: str) -> str:
    """A name from a checkpoint or a flag, as Markdown code."""
    return f"`{_cell(text)}`"
