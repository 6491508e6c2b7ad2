"""Which modules get a pair, which a zero pair, and what is kept whole: from a plan and what has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from phlora_pipeline import carry, convolutions, experts, targets
from phlora_pipeline.adapter.slots import PREFIX, Kept, Layout, Slot, group_slots, kohya_slots, pair_slots
from phlora_pipeline.checkpoint import TensorRef
from phlora_pipeline.plan import Plan, TensorPair
from phlora_pipeline.targets import Kind

_STACKED: frozenset[Kind] = frozenset({"expert", "router"})
"""Kinds that PEFT adapts in every layer or in none; where experts are stacked, every expert or none."""


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
    shadowed = _shadowed(plan)
    filled = (
        adapted
        if rules.whole_families
        else {pair.module for pair in own if pair.kind in _STACKED} | (adapted & shadowed)
    )
    zero = targets.families(plan.matrices, frozenset(filled))
    moved = {place.module for name, place in plan.carried.items() if place.how == "bias" and name in changed}
    # A bias needs a pair that it can be the bias of; of a grouped convolution all groups are in one.
    zero |= (moved & plan.matrices.keys()) - adapted
    zero |= convolutions.siblings(plan.matrices, adapted | moved) - adapted
    whole = tuple(carry.kept_modules(changed, plan.carried, tuned or {}))
    if whole and not adapted | zero:
        # PEFT loads no LoRA without a pair.
        first = plan.adapted[0].module
        zero = convolutions.siblings(plan.matrices, [first]) | {first}
    stacks = _stacks(plan, adapted | zero)
    stacked = {pair.module for pairs in stacks.values() for pair in pairs}
    bare = stacked | _routers(plan, adapted | zero) | (shadowed & (adapted | zero))
    grouped = _by_convolution(plan, adapted | zero)
    stacked |= {pair.module for pairs in grouped.values() for pair in pairs}
    ranks = {pair.module: _slot_rank(plan, pair, (own_ranks or {}).get(pair.name, plan.rank)) for pair in own}
    ranks |= {module: _slot_rank(plan, plan.matrices[module], 1) for module in zero}
    slots = [
        slot
        for pair in own
        if pair.module not in stacked
        for slot in _pair_slots(plan, pair, ranks[pair.module], pair.name)
    ]
    slots += [slot for name, pairs in stacks.items() for slot in _stack_slots(plan, name, pairs, factored)]
    for name, pairs in grouped.items():
        each = max(_rank_of_group(plan, pair, (own_ranks or {}).get(pair.name, 1)) for pair in pairs)
        slots += group_slots(name, pairs, each, factored)
        ranks = {module: rank for module, rank in ranks.items() if convolutions.whole_of(module) != name}
        ranks[name] = each * len(pairs)
    slots += [
        slot for module in zero - stacked for slot in _pair_slots(plan, plan.matrices[module], ranks[module], None)
    ]
    if plan.tied and plan.tied[0] in adapted:
        source, output = plan.tied
        ranks[output] = ranks[source]
        pair = plan.matrices[source]
        slots += pair_slots(output, pair, ranks[source], pair.name, embedding=False, transposed=False)
        adapted |= {output}
    if rules.unets_only:
        slots = [renamed for slot in slots for renamed in kohya_slots(slot)]
    parameters = {module: experts.parameter_of(module) for module in sorted(bare)}
    if targets.names_parameters(plan.model_type, plan.dialect):
        single = [module for module in sorted(adapted | zero) if plan.matrices[module].kind == "expert"]
        parameters |= {module: experts.fused_into(module, plan.model_type) for module in single}
    turned = any(targets.is_transposed(module, plan.model_type) for module in adapted - bare)
    kept = [*_whole(plan, whole, tuned or {})]
    if moved:
        kept += [
            _bias(plan, module, base or {}, tuned or {}) for module in set(map(convolutions.whole_of, adapted | zero))
        ]
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


def drafting(
    changed: frozenset[str], base: Mapping[str, TensorRef], tuned: Mapping[str, TensorRef]
) -> Callable[[Plan, Mapping[str, int]], Layout]:
    """A maker of layouts for the tensors that have a rank: what they weigh is known only from the whole.

    Args:
        changed, base, tuned: as of `make_layout`.
    """
    return lambda plan, ranks: make_layout(plan, frozenset(ranks), ranks, changed, base, tuned)


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
    name = f"{module}.bias"
    pairs = [plan.matrices[part] for part in convolutions.siblings(plan.matrices, [module]) or [module]]
    turned = targets.is_transposed(module, plan.model_type)
    rows = sum(pair.shape[1] if turned else pair.rows for pair in pairs)
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


def _by_convolution(plan: Plan, modules: frozenset[str]) -> dict[str, list[TensorPair]]:
    """Grouped convolution → its groups in order."""
    found: dict[str, list[TensorPair]] = {}
    for module in sorted(convolutions.siblings(plan.matrices, modules), key=convolutions.number_of):
        found.setdefault(convolutions.whole_of(module), []).append(plan.matrices[module])
    return found


def _rank_of_group(plan: Plan, pair: TensorPair, own: int) -> int:
    return own if plan.per_tensor_ranks else convolutions.rank_of_one(pair.module, plan.rank)


def _routers(plan: Plan, modules: frozenset[str]) -> set[str]:
    """Those that are no linear layers in memory."""
    asked = plan.model_type, plan.dialect
    bare = targets.takes_parameters(*asked) or targets.names_parameters(*asked)
    return {module for module in modules if bare and plan.matrices[module].kind == "router"}


def _stack_slots(plan: Plan, parameter: str, pairs: Sequence[TensorPair], changed: frozenset[str]) -> list[Slot]:
    stack = tuple(pair.name if pair.name in changed else None for pair in pairs)
    transposed = targets.is_transposed(parameter, plan.model_type)
    width = plan.written_rank * len(pairs)
    both = pair_slots(experts.wrapper_of(parameter), pairs[0], width, None, embedding=False, transposed=transposed)
    return [replace(slot, stack=stack) for slot in both]


def _shadowed(plan: Plan) -> frozenset[str]:
    """Modules that PEFT would take for experts, and finds by their parameters."""
    if plan.dialect != "peft" or not targets.has_experts((*plan.matrices, *plan.left_out, *plan.unread)):
        return frozenset()
    return frozenset(module for module, pair in plan.matrices.items() if targets.shadowed(module, pair.kind))


def _slot_rank(plan: Plan, pair: TensorPair, own: int) -> int:
    """Experts and routers keep the adapter's rank: PEFT stacks the ones and renames the others, and no pattern follows."""
    return own if plan.per_tensor_ranks and pair.kind not in {"expert", "router"} else plan.written_rank


def _pair_slots(plan: Plan, pair: TensorPair, rank: int, tensor: str | None) -> list[Slot]:
    embedding = pair.kind == "embedding"
    transposed = embedding or targets.is_transposed(pair.module, plan.model_type)
    return pair_slots(pair.module, pair, rank, tensor, embedding=embedding, transposed=transposed)
