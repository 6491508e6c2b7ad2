"""Write side: which keys an adapter file has, what shape each is, and which factor fills it. Layouts, not bytes.

What is portable follows one rule (`servers.toml` and the loaders' sources say why): one rank for all modules, reached by
zero-padding; `lora_alpha == r`, so that every loader's scale is 1; no rsLoRA, no `modules_to_save`, no bias; plain 2-D keys;
explicit zero pairs where a family would otherwise have a gap. With `--energy`, the dialects whose servers read patterns get
each module at its own rank and the same alpha, so that the scale is 1 there, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from phlora_pipeline import carry, experts, safetensors_format, targets
from phlora_pipeline.carry import Place
from phlora_pipeline.checkpoint import TORCH_DTYPES, TensorRef, read_tensors
from phlora_pipeline.plan import Plan, TensorPair
from phlora_pipeline.targets import Kind

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}

_STACKED: frozenset[Kind] = frozenset({"expert", "router"})
"""Kinds that PEFT adapts in every layer or in none; where experts are stacked, every expert or none."""

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
        stack: instead of `tensor`, the weights of all experts in order, where one tensor of the file holds the factors of all.
        alpha: the number that it holds, where it is no factor: kohya's files have each pair's alpha in them.
    """

    key: str
    shape: tuple[int, ...]
    tensor: str | None
    side: Side
    transposed: bool
    stack: tuple[str | None, ...] = ()
    alpha: int | None = None


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of the adapter file that is no factor: one that is kept whole, or the difference of a bias.

    Attributes:
        key: its name in the file.
        dtype: as stored there, in safetensors' name; of a difference F32.
        shape: as in the fine-tune.
        tuned: the fine-tune's tensor; None for zeros.
        base: what is taken off it; None where it is kept whole.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    tuned: TensorRef | None = None
    base: TensorRef | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The adapter file as a whole.

    Attributes:
        slots: by key.
        modules: the modules that have a pair.
        zero_filled: those of them whose pair is zero.
        fan_in_fan_out: whether any pair is for a weight stored as (in, out).
        ranks: module → its rank, where that is not the adapter's.
        parameters: of the modules, those that loaders know by a parameter's name → that name.
        kept: what is no factor, by key.
        whole: modules that are kept whole.
        biases: whether the pairs have biases.
    """

    slots: tuple[Slot, ...]
    modules: frozenset[str]
    zero_filled: frozenset[str]
    fan_in_fan_out: bool
    ranks: Mapping[str, int]
    parameters: Mapping[str, str]
    kept: tuple[Kept, ...] = ()
    whole: tuple[str, ...] = ()
    biases: bool = False

    def carries(self, place: Place) -> bool:
        """Whether what belongs there is in the file."""
        return self.biases if place.how == "bias" else place.module in self.whole

    def in_file_order(self, dtype: str) -> list[Slot | Kept]:
        """As the reference library sorts: wider dtypes first, which keeps all of them aligned, then by key."""

        def order(item: Slot | Kept) -> tuple[int, str]:
            return -safetensors_format.DTYPE_BITS[stored_dtype(item, dtype)[0]], item.key

        return sorted((*self.slots, *self.kept), key=order)


def make_layout(
    plan: Plan,
    factored: frozenset[str],
    own_ranks: Mapping[str, int] | None = None,
    changed: frozenset[str] = frozenset(),
    base: Mapping[str, TensorRef] | None = None,
    tuned: Mapping[str, TensorRef] | None = None,
) -> Layout:
    """Slots for every changed target, its tied output, the zero pairs that complete families, and what is kept whole.

    Args:
        plan: what was meant to be adapted.
        factored: names of the tensors that have factors.
        own_ranks: the rank of these factors, where the plan has each written at its own.
        changed: names of all tensors that differ from the base's.
        base, tuned: the checkpoints' tensors, for what is kept whole.
    """
    own = [pair for pair in plan.adapted if pair.name in factored]
    adapted = frozenset(pair.module for pair in own)
    rules = targets.server_rules(plan.model_type, plan.dialect)
    filled = adapted if rules.whole_families else {pair.module for pair in own if pair.kind in _STACKED}
    zero = targets.families(plan.matrices, frozenset(filled))
    moved = {place.module for name, place in plan.carried.items() if place.how == "bias" and name in changed}
    zero |= moved - adapted  # a bias needs a pair that it can be the bias of
    whole = tuple(carry.kept_modules(changed, plan.carried, tuned or {}))
    if whole and not adapted | zero:
        zero = frozenset({plan.adapted[0].module})  # PEFT loads no LoRA without a pair
    stacks = _stacks(plan, adapted | zero)
    stacked = {pair.module for pairs in stacks.values() for pair in pairs}
    bare = stacked | _routers(plan, adapted | zero)
    ranks = {pair.module: _slot_rank(plan, pair, (own_ranks or {}).get(pair.name, plan.rank)) for pair in own}
    ranks |= {module: _slot_rank(plan, plan.matrices[module], 1) for module in zero}
    slots = [
        slot
        for pair in own
        if pair.module not in stacked
        for slot in _pair_slots(plan, pair, ranks[pair.module], pair.name)
    ]
    slots += [slot for name, pairs in stacks.items() for slot in _stack_slots(plan, name, pairs, factored)]
    slots += [
        slot for module in zero - stacked for slot in _pair_slots(plan, plan.matrices[module], ranks[module], None)
    ]
    if plan.tied and plan.tied[0] in adapted:
        source, output = plan.tied
        ranks[output] = ranks[source]
        pair = plan.matrices[source]
        slots += _slots(output, pair, ranks[source], pair.name, embedding=False, transposed=False)
        adapted |= {output}
    if rules.unets_only:
        slots = [renamed for slot in slots for renamed in _kohya_slots(slot)]
    parameters = {module: experts.parameter_of(module) for module in sorted(bare)}
    turned = any(targets.is_transposed(module, plan.model_type) for module in adapted - bare)
    kept = [*_whole(plan, whole, tuned or {})]
    if moved:
        kept += [_bias(plan, module, base or {}, tuned or {}) for module in adapted | zero]
    if plan.tied and plan.tied[0] in whole:
        whole += (plan.tied[1],)
    return Layout(
        tuple(sorted(slots, key=lambda slot: slot.key)),
        adapted | zero,
        zero,
        turned,
        {module: rank for module, rank in sorted(ranks.items()) if rank != plan.written_rank},
        parameters,
        tuple(sorted(kept, key=lambda item: item.key)),
        whole,
        bool(moved),
    )


def _whole(plan: Plan, modules: Sequence[str], tuned: Mapping[str, TensorRef]) -> Iterator[Kept]:
    """Every tensor of these modules, and of the output that one of them is tied to."""
    for name, ref in tuned.items():
        module, _, leaf = name.rpartition(".")
        if module not in modules:
            continue
        yield Kept(PREFIX + name, "F32" if ref.scale else ref.dtype, ref.shape, ref)
        if plan.tied and module == plan.tied[0]:
            yield Kept(f"{PREFIX}{plan.tied[1]}.{leaf}", "F32" if ref.scale else ref.dtype, ref.shape, ref)


def _bias(plan: Plan, module: str, base: Mapping[str, TensorRef], tuned: Mapping[str, TensorRef]) -> Kept:
    """The difference of a module's bias; zeros where it has none. PEFT looks for one beside every pair."""
    name, pair = f"{module}.bias", plan.matrices[module]
    rows = pair.shape[1] if targets.is_transposed(module, plan.model_type) else pair.rows
    if name in base and name in tuned:
        return Kept(f"{PREFIX}{module}.lora_B.bias", "F32", tuned[name].shape, tuned[name], base[name])
    return Kept(f"{PREFIX}{module}.lora_B.bias", "F32", (rows,))


def _stacks(plan: Plan, modules: frozenset[str]) -> dict[str, list[TensorPair]]:
    """Parameter → the pairs of all its experts in order, where loaders take experts so."""
    if not targets.takes_parameters(plan.model_type, plan.dialect):
        return {}
    found: dict[str, list[TensorPair]] = {}
    pairs = [plan.matrices[module] for module in modules if plan.matrices[module].kind == "expert"]
    for pair in sorted(pairs, key=lambda pair: experts.number_of(pair.module)):
        found.setdefault(experts.parameter_of(pair.module), []).append(pair)
    return found


def _routers(plan: Plan, modules: frozenset[str]) -> set[str]:
    """Those that are no linear layers in memory."""
    bare = targets.takes_parameters(plan.model_type, plan.dialect)
    return {module for module in modules if bare and plan.matrices[module].kind == "router"}


def _stack_slots(plan: Plan, parameter: str, pairs: Sequence[TensorPair], changed: frozenset[str]) -> list[Slot]:
    stack = tuple(pair.name if pair.name in changed else None for pair in pairs)
    transposed = targets.is_transposed(parameter, plan.model_type)
    width = plan.written_rank * len(pairs)
    both = _slots(experts.wrapper_of(parameter), pairs[0], width, None, embedding=False, transposed=transposed)
    return [replace(slot, stack=stack) for slot in both]


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
    d, k = pair.rows, pair.shape[1]
    inputs, outputs = (d, k) if transposed else (k, d)
    first, second = ("B", "A") if transposed else ("A", "B")
    # PEFT keeps an embedding's factors as bare parameters, the others' as modules with a weight.
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    # A convolution's factors are a convolution with its kernel, and one with a kernel of 1.
    into, out_of = (pair.kernel, (1,) * (len(pair.kernel) - 1)) if pair.kernel else ((inputs,), ())
    return [
        Slot(f"{PREFIX}{module}.{down}", (rank, *into), tensor, first, transposed),  # type: ignore[arg-type]
        Slot(f"{PREFIX}{module}.{up}", (outputs, rank, *out_of), tensor, second, transposed),  # type: ignore[arg-type]
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


def stored_dtype(slot: Slot | Kept, dtype: str) -> tuple[str, torch.dtype]:
    """How safetensors and torch call what the slot is stored as; not every rank is a number of 16 bits."""
    if isinstance(slot, Kept):
        return slot.dtype, TORCH_DTYPES[slot.dtype]
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
    filled = torch.zeros((slot.shape[0], math.prod(slot.shape[1:])), dtype=dtype)
    if factor is not None:
        kept = round_factor(cut(factor, slot.side, rank), dtype)
        kept = kept.mT if slot.transposed else kept
        filled[: kept.shape[0], : kept.shape[1]] = kept
    return filled.reshape(slot.shape)


def keep(item: Kept) -> Tensor:
    """The tensor itself, read from the checkpoints."""
    if item.tuned is None:
        return torch.zeros(item.shape)
    if item.base is None:
        return read_tensors([item.tuned])[0]
    tuned, base = read_tensors([item.tuned, item.base])
    return tuned.float() - base.float()


def fill_stack(slot: Slot, factors: Iterable[Tensor | None], rank: int, dtype: torch.dtype) -> Tensor:
    """The same of a stack: one factor for each expert, in order."""
    filled = torch.zeros(slot.shape, dtype=dtype)
    for expert, factor in enumerate(factors):
        one = experts.of_one(filled, expert, len(slot.stack), down=(slot.side == "A") != slot.transposed)
        one.copy_(fill(replace(slot, shape=(one.shape[0], one.shape[1]), stack=()), factor, rank, dtype))
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
    modules = layout.modules - layout.parameters.keys()
    parameters = sorted(set(layout.parameters.values()))
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
        **({"lora_bias": True} if layout.biases else {}),
        "fan_in_fan_out": layout.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": list(layout.whole) or None,
        "target_modules": targets.target_modules(modules, [*plan.modules, *layout.modules]),
        **({"target_parameters": parameters} if parameters else {}),
    }


def base_name_from(config: Mapping[str, Any]) -> str:
    """The base's hub id from `_name_or_path`, where that is one and not a path."""
    name = str(config.get("_name_or_path") or "")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else ""
