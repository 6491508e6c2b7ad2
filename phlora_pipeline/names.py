"""Tensors that are the same in both checkpoints under names that differ by a wrapper's prefix. Pure.

A wrapper (PEFT's `base_model.model.`, torch.compile's `_orig_mod.`, DDP's `module.`, a head's `model.`, a multimodal model's
`language_model.`) puts a component of its own into every name below it. Names are equal where they are so without a few such
components, the same ones for the whole checkpoint; what that leaves open is not guessed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import combinations

from phlora_pipeline.checkpoint import Checkpoint

WRAPPERS = ("_orig_mod", "module", "base_model", "model", "language_model")
NEARLY_ALL = 0.9


def by_the_names_of(base: Checkpoint, tuned: Checkpoint) -> Checkpoint:
    """The fine-tune with the base's names, where one set of wrappers' components explains how they differ.

    Returns:
        `tuned` itself where the names agree already, or where nothing explains them; otherwise
        with what was matched in its `matched`.
    """
    renamed = matched(base.tensors, tuned.tensors)
    if not renamed:
        return tuned
    tensors = {renamed.get(name, name): ref for name, ref in tuned.tensors.items()}
    return replace(
        tuned,
        tensors={name: replace(ref, name=name) for name, ref in tensors.items()},
        matched=_told(renamed, len(tensors)),
    )


def matched(base: Iterable[str], tuned: Iterable[str]) -> dict[str, str]:
    """The fine-tune's name → the base's, for those that differ; empty where they agree as they are, or nothing is certain."""
    base, tuned = frozenset(base), frozenset(tuned)
    best = {name: name for name in base & tuned}
    if len(best) == len(tuned):
        return {}
    contenders = [best]
    for wrappers in _sets(base ^ tuned):
        found = _without(wrappers, base, tuned)
        if len(found) > len(best):
            best, contenders = found, []
        if len(found) == len(best):
            contenders.append(found)
    certain = all(found == best for found in contenders)
    enough = len(best) >= NEARLY_ALL * min(len(base), len(tuned))
    return {name: other for name, other in best.items() if name != other} if certain and enough else {}


def _sets(unmatched: Iterable[str]) -> Iterator[frozenset[str]]:
    """Of wrappers that names have which are not matched as they are, small ones first."""
    parts = {part for name in unmatched for part in name.split(".")}
    present = [wrapper for wrapper in WRAPPERS if wrapper in parts]
    return (frozenset(chosen) for size in range(1, len(present) + 1) for chosen in combinations(present, size))


def _without(wrappers: frozenset[str], base: frozenset[str], tuned: frozenset[str]) -> dict[str, str]:
    """Names that are equal without these components; empty where that makes two names of one checkpoint equal."""
    there, here = _plain(wrappers, base), _plain(wrappers, tuned)
    if len(there) < len(base) or len(here) < len(tuned):
        return {}
    return {here[name]: there[name] for name in here.keys() & there.keys()}


def _plain(wrappers: frozenset[str], names: frozenset[str]) -> dict[str, str]:
    return {".".join(part for part in name.split(".") if part not in wrappers): name for name in names}


def _told(renamed: dict[str, str], total: int) -> str:
    """In words, such as "298 of 300 names of the fine-tune match the base's: 298 without `_orig_mod.`"."""
    ways = Counter(_difference(name, other) for name, other in renamed.items())
    listed = ", ".join(f"{count} {way}" for way, count in sorted(ways.items(), key=lambda item: (-item[1], item[0])))
    return f"{len(renamed)} of {total} names of the fine-tune are matched to the base's: {listed}"


def _difference(name: str, other: str) -> str:
    """How the base's name comes of the fine-tune's.

    >>> _difference("base_model.model.model.norm.weight", "model.norm.weight")
    'without `base_model.model.`'
    """
    more, fewer = _wrappers_of(name), _wrappers_of(other)
    while more and fewer and more[-1] == fewer[-1]:
        more, fewer = more[:-1], fewer[:-1]
    while more and fewer and more[0] == fewer[0]:
        more, fewer = more[1:], fewer[1:]
    if not fewer:
        return f"without {_prefix(more)}"
    return f"with {_prefix(fewer)} for {_prefix(more)}" if more else f"with {_prefix(fewer)}"


def _wrappers_of(name: str) -> list[str]:
    return [part for part in name.split(".") if part in WRAPPERS]


def _prefix(parts: list[str]) -> str:
    return f"`{''.join(f'{part}.' for part in parts)}`"
