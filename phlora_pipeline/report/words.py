"""Names as they can be shown, and numbers as people read them. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phlora_pipeline.summary import percent, size

if TYPE_CHECKING:
    from phlora_pipeline.report.facts import ModelReport

MADE_BY = "made by phlora report"
"""In the first kilobytes of every file that is written here: what lacks it is somebody else's."""

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def shown(text: str) -> str:
    """Without what cannot be printed: names come from checkpoints.

    >>> shown("a" + chr(0) + "b" + chr(27))
    'a�b�'
    """
    return "".join(sign if sign.isprintable() else "�" for sign in text)


def short(text: str, most: int) -> str:
    """At most so many signs; what is left out is in the middle, since names differ at their ends.

    >>> short("model.layers.0.self_attn.q_proj", 20)
    'model.laye…tn.q_proj'
    """
    if len(text) <= most:
        return text
    head = (most - 1 + 1) // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"


def file_name(text: str) -> str:
    """A name that is safe in a path and in a link.

    >>> file_name("org/<my> model"), file_name("../..")
    ('org-my-model', 'model')
    """
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:96].rstrip("-.") or "model"


def ranks_told(ranks: tuple[int, int] | None) -> str:
    """`32`, or `8–64`.

    >>> ranks_told((32, 32)), ranks_told((8, 64)), ranks_told(None)
    ('32', '8–64', '–')
    """
    if ranks is None:
        return "–"
    return str(ranks[0]) if ranks[0] == ranks[1] else f"{ranks[0]}–{ranks[1]}"


def bound(value: float | None) -> str:
    """An upper bound, rounded up to one digit; a dash where there is none.

    >>> bound(4.12e-7), bound(0.0), bound(None)
    ('5×10⁻⁷', '0', '–')
    """
    if value is None:
        return "–"
    if value <= 0:
        return "0"
    power = math.floor(math.log10(value))
    head = math.ceil(value / 10.0**power - 1e-9)
    head, power = (1, power + 1) if head == 10 else (head, power)
    return f"{head}×10{str(power).translate(_RAISED)}"


def counted(number: int, noun: str) -> str:
    """With its plural.

    >>> counted(1, "tensor"), counted(2, "tensor")
    ('1 tensor', '2 tensors')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def noun(names: Sequence[str]) -> str:
    """What several are called: adapters, where two may be of one model.

    >>> noun(["bot", "llama"]), noun(["bot", "bot"])
    ('model', 'adapter')
    """
    return "model" if len(set(names)) == len(names) else "adapter"


def words(status: str) -> str:
    """A row's status, as a person says it.

    >>> words("zero_filled"), words("failed")
    ('zero-filled', 'failed')
    """
    return {"zero_filled": "zero-filled", "carried": "kept whole", "skipped": "left out"}.get(status, status)


def weight(report: ModelReport) -> str:
    """Of an adapter, beside the checkpoint; empty where that is not known."""
    known = report.checkpoint_bytes
    return f"{percent(report.adapter_bytes / known)} of the checkpoint's {size(known)}" if known else ""


def verdict(report: ModelReport) -> str:
    """The page in one sentence; empty where nothing is adapted."""
    summary = report.summary
    if report.ranks is None:
        return ""
    if report.compressed:
        whole = f"; {counted(summary.carried, 'tensor')} kept as they were" if summary.carried else ""
        return f"{size(report.adapter_bytes)} keep {percent(summary.preserved_energy)} of the energy of the adapter that was compressed, in {counted(summary.adapted, 'weight')}{whole}."
    beside = f", {weight(report)}," if report.checkpoint_bytes else ""
    whole = f"; {percent(summary.carried_energy, 2)} is kept whole beside them" if summary.carried else ""
    return (
        f"{size(report.adapter_bytes)}{beside} keep {percent(summary.preserved_energy)} of what fine-tuning changed in {counted(summary.adapted, 'weight')}, "
        f"which hold {percent(summary.coverage)} of the whole change{whole}."
    )
