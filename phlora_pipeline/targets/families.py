"""Modules that belong together for a server, and lists of modules that PEFT reads as just these."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# A server fuses these at load: where one of a group is adapted, the others must have a pair too.
_FAMILIES = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
)
_EXPERT_FAMILIES = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("w1", "w2", "w3"))


def families(modules: Iterable[str], adapted: frozenset[str]) -> frozenset[str]:
    """Modules that need a zero pair so that every family of which one member is adapted is whole.

    Families, as servers fuse and stack them: the same module in every layer, q/k/v, gate/up, and all experts with all
    their projections.

    Args:
        modules: every matrix module of the checkpoint.
        adapted: those that carry a delta.
    """
    whole = {_family_type(module) for module in adapted}
    whole |= {relative for kind_type in whole for relative in _relatives(kind_type)}
    return frozenset(module for module in modules if module not in adapted and _family_type(module) in whole)


def _family_type(module: str) -> str:
    """The module's path with every layer and expert number taken out."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module)


def _relatives(kind_type: str) -> list[str]:
    parent, _, leaf = kind_type.rpartition(".")
    groups = _EXPERT_FAMILIES if ".experts." in kind_type else _FAMILIES
    return [f"{parent}.{other}" for group in groups if leaf in group for other in group]


def target_modules(adapted: frozenset[str], modules: Sequence[str]) -> list[str]:
    """`target_modules` as a list that PEFT's suffix match reads as exactly `adapted`.

    A last path component stands for all its modules where every module of that name is adapted; the others are named in
    full, since a suffix would also match a vision tower, a pooler, or a container: the `0` of `classifier.0` is a layer's, too.

    >>> target_modules(frozenset({"a.0.q", "a.1.q", "a.0.dense"}), ["a.0.q", "a.1.q", "a.0.dense", "pooler.dense"])
    ['a.0.dense', 'q']
    """
    others = {module.rpartition(".")[2] for module in modules if module not in adapted}
    others |= {part for module in modules if not module.endswith("bias") for part in module.split(".")[:-1]}
    # A component that is itself a suffix of another's path is safe: PEFT matches whole components only.
    return sorted({leaf if (leaf := module.rpartition(".")[2]) not in others else module for module in adapted})
