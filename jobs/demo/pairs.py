"""What a demo pair is, and what is asked of it: two checkpoint folders and a score."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Pair:
    """A base, its fine-tune, and the task they are scored by.

    Attributes:
        name: as the table shows it.
        metric: what the scores are, in a few words.
        base, tuned: checkpoint folders.
        adapter: where its adapter goes.
        promised_points: how far base + r32 adapter may lie below the full fine-tune.
        options: of `phlora extract`, beside the checkpoints and the rank.
        scores: given the adapter's folder, the metric of base, fine-tune, and base with the adapter, each from 0 to 1.
    """

    name: str
    metric: str
    base: Path
    tuned: Path
    adapter: Path
    scores: Callable[[Path], Scores]
    promised_points: float
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Scores:
    """One metric, from 0 to 1.

    Attributes:
        base, tuned: of the two checkpoints.
        adapted: of the base with the adapter, loaded by PEFT.
        matrices: of the base with the fine-tune's own matrices, whole: what no rank can exceed. None where it was not asked.
    """

    base: float
    tuned: float
    adapted: float
    matrices: float | None = None


def digest(recipe: Mapping[str, object]) -> str:
    """Short name for what decides a prepared checkpoint, so that a changed recipe cannot meet an old folder.

    >>> digest({"steps": 200}) == digest({"steps": 200}), digest({"steps": 200}) == digest({"steps": 201})
    (True, False)
    """
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:8]
