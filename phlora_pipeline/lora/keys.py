"""From the names of an adapter's tensors to pairs, in PEFT's keys or kohya's. Headers only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from phlora_pipeline import adapter, targets
from phlora_pipeline.adapter import PREFIX
from phlora_pipeline.checkpoint import TensorRef, read_tensors
from phlora_pipeline.loaders import Ranks
from phlora_pipeline.lora.modules import Form, LoraModule, Whole

_PAIR = re.compile(
    rf"{re.escape(PREFIX)}(?P<module>.+)\.(?:(?P<embedding>lora_embedding_[AB])|(?P<linear>lora_[AB])\.weight|(?P<bias>lora_B\.bias))"
)
_KOHYA = re.compile(r"(?P<name>lora_\w+)\.(?P<part>lora_down\.weight|lora_up\.weight|alpha)")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_WRAPPED = ".base_layer"
_FIRST = ("gate_up_proj", "down_proj")
"""In the order in which a module has them, and PEFT wraps them."""


@dataclass
class Found:
    """What the keys say: modules by name, tensors that are kept whole, and what is wrong, in words."""

    modules: dict[str, LoraModule] = field(default_factory=dict)
    whole: list[Whole] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def is_kohya(keys: Iterable[str]) -> bool:
    """Whether a file has kohya's keys."""
    return any(_KOHYA.fullmatch(key) for key in keys)


def by_peft(tensors: Mapping[str, TensorRef], config: Mapping[str, Any], ranks: Ranks) -> Found:
    """Every pair of a PEFT file."""
    found = Found()
    sides: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        match = _PAIR.fullmatch(key)
        if match:
            side = match["embedding"] or match["linear"] or match["bias"]
            sides.setdefault(match["module"], {})[side] = ref
        elif (name := _replaced(key, config)) is not None:
            found.whole.append(Whole(key, name, ref))
        else:
            found.problems.append(f"unexpected key {key!r}: no loader knows what to do with it")
    parameters = _parameters(config.get("target_parameters") or ())
    for path, parts in sides.items():
        halves = set(parts) - {"lora_B.bias"}
        if halves not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
            found.problems.append(f"{path} has {', '.join(sorted(halves))} without its counterpart")
            continue
        A, B = (parts[name] for name in sorted(halves))
        name = _parameter(path, parameters) or path
        form: Form = "embedding" if "lora_embedding_A" in halves else "conv" if len(A.shape) > 2 else "linear"
        _add(found, name, PREFIX + path, form, A, B, ranks, parts.get("lora_B.bias"))
    return found


def by_kohya(tensors: Mapping[str, TensorRef]) -> Found:
    """Every pair of a kohya file, by the flattened names."""
    found = Found()
    groups: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        match = _KOHYA.fullmatch(key)
        if match is None:
            found.problems.append(f"unexpected key {key!r}: no loader knows what to do with it")
        else:
            groups.setdefault(match["name"], {})[match["part"]] = ref
    for name, parts in groups.items():
        if not {"lora_down.weight", "lora_up.weight"} <= set(parts):
            found.problems.append(f"{name} has {', '.join(sorted(parts))}, and not both factors")
            continue
        A, B, alpha = parts["lora_down.weight"], parts["lora_up.weight"], parts.get("alpha")
        form: Form = "conv" if len(A.shape) > 2 else "linear"
        if why := _unfit(A, B, A.shape[:1], form):
            found.problems.append(f"{name} {why}")
            continue
        rank = A.shape[0]
        # Where there is none, or zero, kohya's own loader takes the rank.
        value = float(read_tensors([alpha])[0]) if alpha else 0.0
        found.modules[name] = LoraModule(name, name, form, A, B, rank, (value or rank) / rank, alpha=alpha)
    return found


def _add(
    found: Found, name: str, path: str, form: Form, A: TensorRef, B: TensorRef, ranks: Ranks, bias: TensorRef | None
) -> None:
    rank = ranks.rank(name)
    count = A.shape[0] // rank if A.shape else 0
    is_stack = name != path.removeprefix(PREFIX) and count > 1
    wanted = (count * rank if is_stack else rank,)
    groups = _groups(A, B, rank) if form == "conv" else 1
    if groups > 1:
        found.modules[name] = LoraModule(name, path, "groups", A, B, rank // groups, ranks.scale(name), groups, bias)
        return
    if why := _unfit(A, B, wanted, form):
        said = f", {adapter.CONFIG} says rank {rank}" if "has " in why else ""
        found.problems.append(f"{name} {why}{said}")
        return
    found.modules[name] = LoraModule(
        name, path, "stack" if is_stack else form, A, B, rank, ranks.scale(name), count if is_stack else 1, bias
    )


def _groups(A: TensorRef, B: TensorRef, rank: int) -> int:
    """How many groups a convolution's pair says that it has: A has the rows of all, B the columns of one."""
    groups = A.shape[0] // B.shape[1] if B.shape[1:] and B.shape[1] else 1
    whole = rank == A.shape[0] == groups * B.shape[1] and not A.shape[1] % groups and not B.shape[0] % groups
    fits = whole and not _unfit(A, B, A.shape[:1], "conv", columns=(rank // groups,))
    return groups if fits else 1


def _unfit(
    A: TensorRef, B: TensorRef, rank: tuple[int, ...], form: Form, columns: tuple[int, ...] | None = None
) -> str:
    """Why two tensors are no factors of this rank; empty where they are. `columns`: of B, where they are not as many."""
    if strange := sorted({A.dtype, B.dtype} - _FLOATS):
        return f"is stored as {', '.join(strange)}: factors that are not in floating point are not read"
    least = 3 if form == "conv" else 2
    shaped = len(A.shape) == len(B.shape) >= least and not (form == "conv" and set(B.shape[2:]) != {1})
    if not shaped or A.shape[:1] != rank or B.shape[1:2] != (columns or rank) or 0 in (*A.shape, *B.shape):
        return f"has {list(A.shape)} and {list(B.shape)}"
    return ""


def _replaced(key: str, config: Mapping[str, Any]) -> str | None:
    """The model's tensor in whose place PEFT loads this one; None where it does not."""
    name = key.removeprefix(PREFIX)
    module, _, leaf = name.rpartition(".")
    if name == key or not module:
        return None
    whole = tuple(config.get("modules_to_save") or ())
    # As PEFT matches: by the end of a name, with no regard for components; and all that is inside.
    if whole and any(part.endswith(whole) for part in _ancestors(module)):
        return name
    if leaf == "bias" and config.get("bias", "none") != "none":
        return name.replace(f"{_WRAPPED}.", ".")
    if leaf == "weight":  # of an embedding that was resized, PEFT saves the base's as well
        plain = module.removesuffix(_WRAPPED)
        if targets.kind_of(f"{plain}.weight", (1, 1)) in {"embedding", "lm_head"}:
            return f"{plain}.weight"
    return None


def _ancestors(module: str) -> Iterator[str]:
    while module:
        yield module
        module = module.rpartition(".")[0]


def _parameters(names: Sequence[str]) -> dict[str, list[str]]:
    """Module's ending → the leaves of its parameters that PEFT wraps, in that order."""
    found: dict[str, list[str]] = {}
    for name in names:
        at, _, leaf = name.rpartition(".")
        found.setdefault(at, []).append(leaf)
    return {
        at: sorted(leaves, key=lambda leaf: _FIRST.index(leaf) if leaf in _FIRST else -1)
        for at, leaves in found.items()
    }


def _parameter(path: str, parameters: Mapping[str, list[str]]) -> str | None:
    """The parameter whose factors have this path: the last one that was wrapped is outermost, without a `base_layer`."""
    module, depth = path, 0
    while module.endswith(_WRAPPED):
        module, depth = module.removesuffix(_WRAPPED), depth + 1
    leaves: list[str] = []
    for at, others in parameters.items():
        if module == at or module.endswith(f".{at}"):
            leaves += [leaf for leaf in others if leaf not in leaves]
    if depth >= len(leaves):
        return None
    return f"{module}.{leaves[-1 - depth]}"
