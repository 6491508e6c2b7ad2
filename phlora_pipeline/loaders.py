"""How loaders read an adapter's config and keys, and what a dialect's would refuse, drop or misread. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from phlora_pipeline import targets
from phlora_pipeline.targets import ServerRules

Number = TypeVar("Number", int, float)


@dataclass(frozen=True, slots=True)
class Ranks:
    """Each module's rank and scale, as PEFT and vLLM read them: the first pattern that matches, or the config's own.

    Attributes:
        r, alpha: of modules that no pattern names.
        rank_pattern, alpha_pattern: regular expressions for the end of a module's name.
        rslora: whether the scale is alpha over the root of the rank.
    """

    r: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Ranks:
        """The ranks of an `adapter_config.json`.

        Raises:
            ValueError: one of its values is no rank or no scale.
        """
        ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
        r, alpha = config.get("r"), config.get("lora_alpha")
        for value in (r, *ranks.values()):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{value!r} is no rank")
        for value in (alpha, *alphas.values()):
            if not isinstance(value, int | float):
                raise TypeError(f"{value!r} is no lora_alpha")
        return cls(r, alpha, ranks, alphas, bool(config.get("use_rslora")))  # type: ignore[arg-type]

    def rank(self, module: str) -> int:
        """The rank of a module's pair."""
        return _first(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What B·A is multiplied by."""
        rank = self.rank(module)
        return _first(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


def _first(patterns: Mapping[str, Number], module: str, otherwise: Number) -> Number:
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), otherwise)


def objections(
    rules: ServerRules,
    config: Mapping[str, Any],
    modules: frozenset[str],
    base: Mapping[str, tuple[int, ...]],
) -> Iterator[str]:
    """What the dialect's loaders would not apply as written, in words.

    Args:
        rules: of the dialect for the base's model type.
        config: `adapter_config.json`.
        modules: those that have a pair in the file.
        base: the base's tensors → their shapes.
    """
    yield from _of_config(rules, config)
    known = {targets.module_of(name): shape for name, shape in base.items() if name.endswith(".weight")}
    for module in sorted(modules):
        if module not in known:
            if not rules.tied_embeddings and targets.kind_of(f"{module}.weight", (1, 1)) == "lm_head":
                yield f"{module} is tied in the base: loaders of --for {rules.dialect} do not take its half of the delta"
            continue
        name = f"{module}.weight"
        refusal = targets.server_refusal(targets.kind_of(name, known[module]), known[module], rules)
        if refusal:
            yield f"{module} has a pair, but {refusal}"
    if rules.whole_families:
        for module in sorted(targets.families(_matrices(known), modules)):
            yield f"{module} has no pair, but others of its family do: servers of --for {rules.dialect} fuse or stack them"


def _of_config(rules: ServerRules, config: Mapping[str, Any]) -> Iterator[str]:
    who = f"loaders of --for {rules.dialect}"
    if rules.unets_only != (config.get("format") == "kohya"):
        yield f"its keys are {'PEFT' if rules.unets_only else 'kohya'}'s, which {who} do not know"
    for name in ("rank_pattern", "alpha_pattern"):
        if config.get(name) and not rules.per_tensor_ranks:
            yield f"{name} is not read by all {who}: they would take one rank and one scale for every module"
    if config.get("use_rslora") and not rules.rslora:
        yield f"use_rslora is not read by all {who}"
    if isinstance(config.get("target_modules"), str) and not rules.target_pattern:
        yield f"target_modules is a regular expression, {who} want a list"
    if rules.max_rank is not None and config.get("r", 0) > rules.max_rank:
        yield f"rank {config['r']} is more than the {rules.max_rank} that {who} take"
    if not rules.carries:
        for name, none in (("bias", "none"), ("lora_bias", False), ("modules_to_save", None)):
            if (config.get(name) or none) != none:
                yield f"{name} {config[name]!r} is refused by {who}"


def _matrices(known: Mapping[str, tuple[int, ...]]) -> list[str]:
    kinds = {module: targets.kind_of(f"{module}.weight", shape) for module, shape in known.items()}
    return [module for module, kind in kinds.items() if kind in targets.MATRIX_KINDS]
