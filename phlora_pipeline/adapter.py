"""Write side: which keys an adapter file has, what shape each is, and which factor fills it. Layouts, not bytes.

Everything here follows one rule for portability (`servers.toml` and the loaders' sources say why): one rank for all
modules, reached by zero-padding; `lora_alpha == r`, so that every loader's scale is 1; no rsLoRA, no `modules_to_save`,
no bias; plain 2-D keys; explicit zero pairs where a family would otherwise have a gap. With `--energy`, the dialects whose
servers read patterns get each module at its own rank and the same alpha, so that the scale is 1 there, too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from phlora_pipeline import targets
from phlora_pipeline.plan import Plan, TensorPair

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}

Side = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the adapter file.

    Attributes:
        key: its name in the file.
        shape: as written, padded to the adapter's rank.
        tensor: the weight whose factor fills it, or None for zeros.
        side: which factor.
        transposed: whether the factor is turned: for weights that are stored as (in, out), and for embeddings.
        alpha: the number that it holds, where it is no factor: kohya's files have each pair's alpha in them.
    """

    key: str
    shape: tuple[int, ...]
    tensor: str | None
    side: Side
    transposed: bool
    alpha: int | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The adapter file as a whole.

    Attributes:
        slots: in file order: by key, as the reference library sorts tensors of one dtype.
        modules: the modules that have a pair.
        zero_filled: those of them whose pair is zero.
        fan_in_fan_out: whether any pair is for a weight stored as (in, out).
        ranks: module → its rank, where that is not the adapter's.
    """

    slots: tuple[Slot, ...]
    modules: frozenset[str]
    zero_filled: frozenset[str]
    fan_in_fan_out: bool
    ranks: Mapping[str, int]


def make_layout(plan: Plan, changed: frozenset[str], own_ranks: Mapping[str, int] | None = None) -> Layout:
    """Slots for every changed target, its tied output, and the zero pairs that complete families.

    Args:
        plan: what was meant to be adapted.
        changed: names of the tensors that have factors.
        own_ranks: the rank of these factors, where the plan has each written at its own.
    """
    own = [pair for pair in plan.adapted if pair.name in changed]
    adapted = frozenset(pair.module for pair in own)
    rules = targets.server_rules(plan.model_type, plan.dialect)
    zero = targets.families(plan.matrices, adapted) if rules.whole_families else frozenset()
    ranks = {pair.module: _slot_rank(plan, pair, (own_ranks or {}).get(pair.name, plan.rank)) for pair in own}
    ranks |= {module: _slot_rank(plan, plan.matrices[module], 1) for module in zero}
    slots = [slot for pair in own for slot in _pair_slots(plan, pair, ranks[pair.module], pair.name)]
    slots += [slot for module in zero for slot in _pair_slots(plan, plan.matrices[module], ranks[module], None)]
    if plan.tied and plan.tied[0] in adapted:
        source, output = plan.tied
        ranks[output] = ranks[source]
        pair = plan.matrices[source]
        slots += _slots(output, pair, ranks[source], pair.name, embedding=False, transposed=False)
        adapted |= {output}
    if rules.unets_only:
        slots = [renamed for slot in slots for renamed in _kohya_slots(slot)]
    turned = any(targets.is_transposed(module, plan.model_type) for module in adapted)
    return Layout(
        tuple(sorted(slots, key=lambda slot: slot.key)),
        adapted | zero,
        zero,
        turned,
        {module: rank for module, rank in sorted(ranks.items()) if rank != plan.written_rank},
    )


def _slot_rank(plan: Plan, pair: TensorPair, own: int) -> int:
    """Experts and routers keep the adapter's rank: PEFT stacks the ones and renames the others, and no pattern follows."""
    return own if plan.per_tensor_ranks and pair.kind not in {"expert", "router"} else plan.written_rank


def _pair_slots(plan: Plan, pair: TensorPair, rank: int, tensor: str | None) -> list[Slot]:
    embedding = pair.kind == "embedding"
    transposed = embedding or targets.is_transposed(pair.module, plan.model_type)
    return _slots(pair.module, pair, rank, tensor, embedding=embedding, transposed=transposed)


def _slots(
    module: str, pair: TensorPair, rank: int, tensor: str | None, *, embedding: bool, transposed: bool
) -> list[Slot]:
    d, k = pair.shape
    inputs, outputs = (d, k) if transposed else (k, d)
    first, second = ("B", "A") if transposed else ("A", "B")
    # PEFT keeps an embedding's factors as bare parameters, the others' as modules with a weight.
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    return [
        Slot(f"{PREFIX}{module}.{down}", (rank, inputs), tensor, first, transposed),  # type: ignore[arg-type]
        Slot(f"{PREFIX}{module}.{up}", (outputs, rank), tensor, second, transposed),  # type: ignore[arg-type]
    ]


def kohya_name(module: str) -> str:
    """A module's name in kohya's files.

    >>> kohya_name("down_blocks.0.attentions.1.proj_in")
    'lora_unet_down_blocks_0_attentions_1_proj_in'
    """
    return KOHYA_PREFIX + module.replace(".", "_")


def _kohya_slots(slot: Slot) -> list[Slot]:
    """The slot by its other name; beside A the alpha, which is the rank, so that the scale is 1."""
    module, _, side = slot.key.removeprefix(PREFIX).rpartition(".lora_")
    name = kohya_name(module)
    if side == "B.weight":
        return [replace(slot, key=f"{name}.lora_up.weight")]
    alpha = Slot(f"{name}.alpha", (), None, "A", transposed=False, alpha=slot.shape[0])
    return [replace(slot, key=f"{name}.lora_down.weight"), alpha]


def stored_dtype(slot: Slot, dtype: str) -> tuple[str, torch.dtype]:
    """How safetensors and torch call what the slot is stored as; not every rank is a number of 16 bits."""
    return DTYPES["float32" if slot.alpha is not None else dtype]


def fill(slot: Slot, factor: Tensor | None, rank: int, dtype: torch.dtype) -> Tensor:
    """The slot's tensor: the factor cut to `rank`, rounded once, turned if need be, padded with zeros.

    Args:
        slot: where it goes.
        factor: A (q, k) or B (d, q) float32, or None for zeros.
        rank: of the factors that are kept, at most the slot's.
        dtype: of the adapter.

    Returns:
        Contiguous, of the slot's shape.
    """
    if slot.alpha is not None:
        return torch.tensor(slot.alpha, dtype=dtype)
    filled = torch.zeros(slot.shape, dtype=dtype)
    if factor is not None:
        kept = round_factor(cut(factor, slot.side, rank), dtype)
        kept = kept.mT if slot.transposed else kept
        filled[: kept.shape[0], : kept.shape[1]] = kept
    return filled


def cut(factor: Tensor, side: Side, rank: int) -> Tensor:
    """The factor at a smaller rank: the first rows of A (r, k), or the first columns of B (d, r)."""
    return factor[:rank] if side == "A" else factor[:, :rank]


def round_factor(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor in the adapter's dtype; the one rounding between the solver and the file."""
    return factor.to(dtype)


def pick_dtype(asked: str, pairs: Sequence[TensorPair]) -> str:
    """`float32`, `bfloat16` or `float16`: what was asked for, or for `auto` the fine-tune's dtype where that has 16 bits.

    A checkpoint of several dtypes counts as that of most of its adapted entries.
    """
    if asked != "auto":
        return asked
    entries: dict[str, int] = {}
    for pair in pairs:
        entries[pair.tuned.dtype] = entries.get(pair.tuned.dtype, 0) + pair.numel
    most = max(sorted(entries), key=lambda name: entries[name])
    return {"BF16": "bfloat16", "F16": "float16"}.get(most, "float32")


def adapter_config(plan: Plan, layout: Layout, base_name: str, architectures: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`, with only what every loader reads the same way.

    Args:
        plan: for the rank.
        layout: for the modules.
        base_name: hub id or served name of the base; empty where it is not known.
        architectures: of the fine-tune's `config.json`.
    """
    if targets.server_rules(plan.model_type, plan.dialect).unets_only:
        # No peft_type: PEFT would find none of the keys, and say nothing.
        return {"format": "kohya", "base_model_name_or_path": base_name or None, "r": plan.written_rank}
    causal = any("ForCausalLM" in name or "LMHead" in name for name in architectures)
    # PEFT and vLLM read a key as a regular expression for the end of a module's name; from `^` on it is the whole of it.
    pattern = {f"^{re.escape(module)}": rank for module, rank in layout.ranks.items()}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": plan.written_rank,
        "lora_alpha": plan.written_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": layout.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": None,
        "target_modules": targets.target_modules(layout.modules, [*plan.modules, *layout.modules]),
    }


def base_name_from(config: Mapping[str, Any]) -> str:
    """The base's hub id from `_name_or_path`, where that is one and not a path."""
    name = str(config.get("_name_or_path") or "")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else ""
