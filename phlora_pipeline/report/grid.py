"""Layer × projection: where in the model the energy is kept, and what rank that takes. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.report.choices import rank_for

GOAL = 0.9
"""Of the energy: the rank that it takes is told of each tensor."""

_KINDS = ("attention", "mlp", "expert", "router", "linear", "conv", "embedding", "lm_head")
_ORDER = ("q", "query", "k", "key", "v", "value", "qkv", "o", "out", "gate", "up", "gate_up", "down", "w1", "w3", "w2")


@dataclass(frozen=True, slots=True)
class Cell:
    """The tensors of one projection in one layer: one, or the experts together.

    Attributes:
        tensors: how many.
        status: what became of them; `adapted` where any is.
        energy: E_r, weighted by ‖ΔW‖²; None where nothing is adapted.
        ranks: the smallest and the largest; None where nothing is adapted.
        needed: the rank that keeps `GOAL` in each of them; None where that is beyond what is known.
    """

    tensors: int
    status: str
    energy: float | None
    ranks: tuple[int, int] | None
    needed: int | None


@dataclass(frozen=True, slots=True)
class Grid:
    """`cells[projection][layer]`; None where a layer has no such projection."""

    projections: tuple[str, ...]
    layers: tuple[str, ...]
    cells: tuple[tuple[Cell | None, ...], ...]


def grid(rows: Sequence[EnergyRow]) -> Grid:
    """The matrices that belong to a layer; embeddings and heads do not, and are in no cell."""
    placed: dict[tuple[str, str], dict[tuple[str, int], list[EnergyRow]]] = {}
    for row in rows:
        if len(row.shape) < 2 or row.kind in {"norm", "bias"} or (place := place_of(row.module)) is None:
            continue
        prefix, number, projection = place
        placed.setdefault((row.kind, projection), {}).setdefault((prefix, number), []).append(row)
    layers = sorted({layer for column in placed.values() for layer in column})
    names = labels([projection for _, projection in placed])
    order = sorted(placed, key=lambda key: (_of_kind(key[0]), _of_name(names[key[1]]), key[1]))
    return Grid(
        tuple(names[projection] for _, projection in order),
        tuple(_layer_names(layers)),
        tuple(tuple(_cell(placed[key].get(layer, ())) for layer in layers) for key in order),
    )


def place_of(module: str) -> tuple[str, int, str] | None:
    """What stands before the layer's number, the number, and the projection; None where there is no layer.

    >>> place_of("model.layers.3.mlp.experts.7.w1"), place_of("lm_head")
    (('model.layers', 3, 'mlp.experts.*.w1'), None)
    """
    parts = module.split(".")
    at = next((index for index, part in enumerate(parts) if part.isdecimal()), None)
    if at is None or at == len(parts) - 1:
        return None
    projection = ("*" if part.isdecimal() else part for part in parts[at + 1 :])
    return ".".join(parts[:at]), int(parts[at]), ".".join(projection)


def labels(names: Sequence[str]) -> dict[str, str]:
    """The shortest ends by which names can be told apart.

    >>> labels(["self_attn.q_proj", "attention.output.dense", "output.dense"])
    {'self_attn.q_proj': 'q_proj', 'attention.output.dense': 'attention.output.dense', 'output.dense': 'output.dense'}
    """
    found = {}
    for name in names:
        parts = name.split(".")
        ends = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        others = [f".{other}" for other in names if other != name]
        found[name] = next((end for end in ends if not any(other.endswith(f".{end}") for other in others)), name)
    return found


def _cell(rows: Sequence[EnergyRow]) -> Cell | None:
    if not rows:
        return None
    own = [row for row in rows if row.rank is not None and row.delta_norm]
    if not own:
        return Cell(len(rows), rows[0].status, None, None, None)
    total = math.fsum((row.delta_norm or 0.0) ** 2 for row in own)
    kept = math.fsum((row.delta_norm or 0.0) ** 2 * (row.preserved_energy or 0.0) for row in own)
    ranks = [row.rank or 0 for row in own]
    needed = [rank_for(row, GOAL) for row in own]
    known = [rank for rank in needed if rank is not None]
    return Cell(
        len(rows), "adapted", kept / total, (min(ranks), max(ranks)), max(known) if len(known) == len(needed) else None
    )


def _layer_names(layers: Sequence[tuple[str, int]]) -> list[str]:
    """Numbers; with a name before each where the model has several stacks of layers."""
    prefixes = sorted({prefix for prefix, _ in layers})
    if len(prefixes) < 2:
        return [str(number) for _, number in layers]
    told = _without_common(prefixes)
    return [f"{told[prefix]} {number}" for prefix, number in layers]


def _without_common(prefixes: Sequence[str]) -> Mapping[str, str]:
    """Less what all have at the beginning and at the end.

    >>> _without_common(["model.encoder.layers", "model.decoder.layers"])
    {'model.encoder.layers': 'encoder', 'model.decoder.layers': 'decoder'}
    """
    parts = [prefix.split(".") for prefix in prefixes]
    least = min(map(len, parts)) - 1
    start = next((n for n in range(least) if len({part[n] for part in parts}) > 1), least)
    end = next((n for n in range(least - start) if len({part[-1 - n] for part in parts}) > 1), least - start)
    return {prefix: ".".join(part[start : len(part) - end]) for prefix, part in zip(prefixes, parts, strict=True)}


def _of_kind(kind: str) -> int:
    return _KINDS.index(kind) if kind in _KINDS else len(_KINDS)


def _of_name(label: str) -> int:
    leaf = re.sub(r"_proj$", "", label.rpartition(".")[2])
    return _ORDER.index(leaf) if leaf in _ORDER else len(_ORDER)
