"""Which tensors of two checkpoints can be compared, which of these are adapted, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from phlora_pipeline import carry, convolutions, targets
from phlora_pipeline.checkpoint import TORCH_DTYPES, Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.plan.blocks import TensorPair
from phlora_pipeline.targets import Selection, ServerRules

_CONVOLUTIONS = {
    r"^(?!norm|mamba|num_key).*groups(_width)?$": "if one of the convolutions that are adapted is grouped, PEFT will not load its pair: say it by --conv-groups 'GLOB=N'",
    r"dilation": "PEFT forgets a convolution's dilation until the adapter is merged: merge it, or leave dilated ones out by --exclude 'GLOB'",
}


def pair_up(base: Checkpoint, tuned: Checkpoint, selection: Selection) -> tuple[list[TensorPair], dict[str, str]]:
    """Tensors that can be compared, and those that cannot."""
    pairs: list[TensorPair] = []
    unread: dict[str, str] = {}
    differing: list[str] = []
    moved = (
        (base.tensors[name], ref)
        for name, ref in tuned.tensors.items()
        if name in base.tensors and base.tensors[name].shape != ref.shape
    )
    grown = targets.resized((targets.kind_of(ref.name, ref.shape), before.shape, ref.shape) for before, ref in moved)
    for name, after in sorted(tuned.tensors.items()):
        before = base.tensors.get(name)
        kind = targets.kind_of(name, after.shape)
        if before is None:
            unread[name] = "not in the base"
        elif before.shape[1:] == after.shape[1:] and (before.shape[:1] + after.shape[:1]) in grown:
            shared = min(before.shape[0], after.shape[0])
            pairs.append(
                TensorPair(targets.module_of(name), kind, before.rows(shared), after.rows(shared), rows=before.shape[0])
            )
            if after.shape[0] > shared:
                unread[f"{name}[{shared}:]"] = f"{after.shape[0] - shared} rows that the base does not have"
        elif before.shape != after.shape:
            unread[name] = f"shape differs: base {list(before.shape)}, fine-tune {list(after.shape)}"
            if not selection.excludes(name):
                differing.append(f"{name} (base {list(before.shape)}, fine-tune {list(after.shape)})")
        elif {before.dtype, after.dtype} - TORCH_DTYPES.keys():
            unread[name] = f"stored as {before.dtype} and {after.dtype}, which are not read"
        else:
            pairs.append(_pair(targets.module_of(name), kind, before, after))
    if differing:
        raise RequestError(
            f"shapes differ in {len(differing)} of {len(tuned.tensors)} tensors: {some(differing)}",
            remedy="give the right base, or leave these tensors out: --exclude 'GLOB'",
        )
    return pairs, unread


def _pair(module: str, kind: targets.Kind, base: TensorRef, tuned: TensorRef) -> TensorPair:
    if kind != "conv":
        return TensorPair(module, kind, base, tuned, rows=base.shape[0] if base.shape else 0)
    return TensorPair(module, kind, base.matrix, tuned.matrix, kernel=base.shape[1:], rows=base.shape[0])


def choose(
    pairs: Sequence[TensorPair],
    selection: Selection,
    rules: ServerRules,
    tied: tuple[str, str] | None,
    *,
    multimodal: bool,
) -> tuple[list[TensorPair], dict[str, str]]:
    """Pairs that are adapted, and the reason for each that is not."""
    chosen: list[TensorPair] = []
    left_out: dict[str, str] = {}
    experts = targets.has_experts(pair.name for pair in pairs)
    shapes = {pair.name: pair.shape for pair in pairs}
    for pair in pairs:
        name = convolutions.whole_of(pair.name)
        reason = (
            (targets.EXCLUDED if selection.excludes(name) else "")
            or targets.shape_refusal(pair.shape, pair.kind, pair.tuned.dtype)
            or targets.shape_refusal(pair.shape, pair.kind, pair.base.dtype)
            or (_kernel_refusal(pair.name, (pair.shape[0], *pair.kernel), shapes, selection) if pair.kernel else "")
            or selection.refusal(name, pair.kind)
            or (targets.tower_refusal(pair.name) if multimodal else "")
            or (_shadowed_refusal(pair, rules) if experts else "")
            or targets.server_refusal(pair.kind, pair.shape, rules)
            or _single_expert_refusal(pair, rules)
            or _group_refusal(pair, rules)
            or _tied_refusal(pair, rules, tied)
        )
        if reason:
            left_out[pair.name] = reason
        else:
            chosen.append(pair)
    return chosen, left_out


def keep_whole(
    chosen: Sequence[TensorPair],
    left_out: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
    selection: Selection,
) -> tuple[list[TensorPair], dict[str, str], dict[str, carry.Place]]:
    """The choice once more, where what has no low-rank form is kept whole if it changed.

    An embedding gives up its factors where the biases of others need PEFT's `lora_bias`, and where the fine-tune has more
    rows than the base: it is kept whole, with the output that it is tied to. It is kept with the fine-tune's rows, so that
    beside biases whatever else has fewer of them is kept, too: no model has the base's rows and the fine-tune's at once.

    Returns:
        Pairs that are adapted, the reason for each tensor that is not, and the place of each that is kept.
    """
    biases = carry.has_biases(tensors, (convolutions.whole_of(pair.module) for pair in chosen))
    shapes = {name: ref.shape for name, ref in tensors.items()}
    more = {pair.name: tensors[pair.name].shape[0] - pair.rows for pair in chosen}
    aside = {
        pair.name: pair.kind
        for pair in chosen
        if more[pair.name] > 0 or (biases and (pair.kind == "embedding" or more[pair.name]))
    }
    adapted = {convolutions.whole_of(pair.module): pair.kind for pair in chosen if pair.name not in aside}
    wanted = aside | {
        name: targets.kind_of(name, ref.shape)
        for name, ref in tensors.items()
        if not selection.excludes(name)
        and (
            targets.keeps_whole(name, ref.shape)
            or (targets.kind_of(name, ref.shape) == "conv" and _kernel_refusal(name, ref.shape, shapes, selection))
        )
    }
    places, without = carry.places(wanted, tensors, adapted)
    kept = [pair for pair in chosen if pair.name not in aside or pair.name in without]
    told = {name: place.words for name, place in places.items()}
    told |= {name: carry.OTHER_ROWS if more[name] else carry.BESIDE_BIASES for name in aside if name in places}
    return kept, {**left_out, **told, **{name: why for name, why in without.items() if name in left_out}}, places


def _kernel_refusal(name: str, shape: Sequence[int], shapes: Mapping[str, Sequence[int]], selection: Selection) -> str:
    """Why a convolution is not adapted; one that was taken apart by its groups is."""
    if convolutions.whole_of(name) != name:
        return ""
    bias = shapes.get(f"{targets.module_of(name)}.bias", ())
    return targets.kernel_refusal(name, shape, selection.groups_of(name), bias)


def _group_refusal(pair: TensorPair, rules: ServerRules) -> str:
    if convolutions.groups_of(pair.module) == 1 or rules.dialect == "peft":
        return ""
    return "a grouped convolution is not known to be applied by any but PEFT; --for peft adapts it"


def _shadowed_refusal(pair: TensorPair, rules: ServerRules) -> str:
    """Dense layers and shared experts beside routed ones; PEFT alone is given them as parameters, which it finds."""
    if rules.dialect == "peft" or "PEFT" not in rules.takes or not targets.shadowed(pair.module, pair.kind):
        return ""
    leaf = pair.module.rpartition(".")[2]
    told = f"PEFT takes every {leaf} of a model with experts for one of them, and would drop this one"
    return f"{told}; --for peft adapts it"


def _single_expert_refusal(pair: TensorPair, rules: ServerRules) -> str:
    """Experts one by one, of a type whose loaders know them in one parameter only, and by its name."""
    if pair.kind != "expert" or not targets.takes_parameters(rules.model_type, rules.dialect):
        return ""
    if targets.is_transposed(pair.module, rules.model_type):
        return ""
    return f"{rules.model_type!r} has its experts in one parameter; where a matrix each goes there is not known"


def _tied_refusal(pair: TensorPair, rules: ServerRules, tied: tuple[str, str] | None) -> str:
    if tied is None:
        return ""
    source, output = tied
    if pair.module == output:
        return f"tied to {source}, whose delta goes on both" if rules.tied_embeddings else f"tied to {source}"
    if pair.module == source and not output:
        return "tied to an output that the checkpoint does not name; half of a tied delta is worse than none"
    if pair.module == source and not rules.tied_embeddings:
        return f"tied to {output}: not every server takes the delta on both ends; --for peft adapts both"
    return ""


def tied_modules(configured: Checkpoint, pairs: Sequence[TensorPair]) -> tuple[str, str] | None:
    """The input embedding and the output module of a causal model that share one weight, or None.

    Tied is what `tie_word_embeddings` says, or what a checkpoint without an output matrix of its own leaves no doubt of.
    """
    causal = any("ForCausalLM" in name or "LMHead" in name for name in configured.architectures)
    tied = any(
        part in name
        for name in configured.architectures
        for part in ("MaskedLM", "PreTraining", "ConditionalGeneration")
    )
    inputs = [pair for pair in pairs if pair.kind == "embedding"]
    if not inputs or not (causal or tied) or configured.config.get("tie_word_embeddings") is False:
        return None
    # Positions are embedded too (GPT-2's wpe); the vocabulary has the most rows.
    source = max(inputs, key=lambda pair: pair.shape[0]).module
    outputs = [pair.module for pair in pairs if pair.kind == "lm_head"]
    if not outputs:
        # Decoders that call their input so call their output lm_head; elsewhere the name is anybody's guess.
        return source, "lm_head" if causal and source.rpartition(".")[2] in {"embed_tokens", "wte"} else ""
    return (source, outputs[0]) if configured.config.get("tie_word_embeddings") is True else None


def multimodal(base: Checkpoint, tuned: Checkpoint) -> bool:
    """Whether there is more to the model than language."""
    return any(key in side.config for side in (base, tuned) for key in ("vision_config", "audio_config"))


def of_convolutions(chosen: Sequence[TensorPair], config: Mapping[str, Any]) -> Iterator[str]:
    """What PEFT makes of a convolution that is not as plain as its kernel looks, where `config.json` speaks of such."""
    names = [pair.name for pair in chosen if pair.kernel and convolutions.groups_of(pair.module) == 1]
    for about, meant in _CONVOLUTIONS.items():
        found = {key: value for key, value in config.items() if re.search(about, key) and _beyond_one(value)}
        if names and found:
            told = ", ".join(f"{key} {value}" for key, value in sorted(found.items()))
            yield f"config.json says {told}; {meant} ({some(names)})"


def _beyond_one(value: object) -> bool:
    return any(map(_beyond_one, value)) if isinstance(value, list) else isinstance(value, int) and value > 1


def some(names: Iterable[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    ordered = sorted(names)
    return (
        ", ".join(ordered[:most]) + (f" and {len(ordered) - most} more" if len(ordered) > most else "")
        if ordered
        else "none"
    )
