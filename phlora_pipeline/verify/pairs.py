"""The pairs of an adapter's file, in PEFT's keys or kohya's."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from phlora_pipeline import (
    adapter,
    convolutions,
    experts,
    loaders,
    targets,
)
from phlora_pipeline.checkpoint import Checkpoint, TensorRef, read_tensors

_KEY = re.compile(
    r"base_model\.model\.(?P<module>.+)\.(?:(?P<embedding>lora_embedding_[AB])|(?P<linear>lora_[AB])\.weight)"
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Two factors of the file.

    Attributes:
        down, up: A and B, in the orientation that they are stored in.
        embedding: whether they are an embedding's.
        alpha: the tensor that holds it, in kohya's files.
        expert, experts: which of how many, where they hold the factors of all experts, or of all groups of a convolution.
        grouped: whether they are a convolution's.
    """

    down: TensorRef
    up: TensorRef
    embedding: bool
    alpha: TensorRef | None = None
    expert: int = 0
    experts: int = 1
    grouped: bool = False


class Factors:
    """Reads pairs; a stack of experts once for all that are asked for one after another."""

    def __init__(self) -> None:
        self._of: list[TensorRef] = []
        self._held: list[Tensor] = []

    def read(self, pair: Pair) -> list[Tensor]:
        """A (r, in) and B (out, r), or an embedding's."""
        if self._of != [pair.down, pair.up]:
            self._of, self._held = [pair.down, pair.up], read_tensors([pair.down, pair.up])
        if pair.experts == 1:
            return self._held
        both = zip(self._held, (True, False), strict=True)
        of_one = convolutions.of_one if pair.grouped else experts.of_one
        return [of_one(held, pair.expert, pair.experts, down=down) for held, down in both]

    def strays(self, pair: Pair) -> bool:
        """Whether A, as it was read last, has entries that no group of the convolution sees."""
        return pair.grouped and pair.expert == 0 and convolutions.reaches_across(self._held[0], pair.experts)


def groups_in(tensors: Mapping[str, TensorRef]) -> dict[str, int]:
    """Kernel → its groups, as the shapes of its pair say: A has the rows of all, B the columns of one."""
    found = {}
    for key, up in tensors.items():
        down = tensors.get(key.replace(".lora_B.", ".lora_A."))
        if (
            (match := _KEY.fullmatch(key))
            and match["linear"] == "lora_B"
            and len(up.shape) > 2
            and up.shape[1]
            and down
        ):
            found[f"{match['module']}.weight"] = down.shape[0] // up.shape[1]
    return {name: groups for name, groups in found.items() if groups > 1}


def pairs_of(
    tensors: Mapping[str, TensorRef], ranks: loaders.Ranks, parameters: Sequence[str]
) -> tuple[dict[str, Pair], list[str]]:
    """Module → its pair, by PEFT's keys, and what is wrong with others. `parameters`: names of stacked experts."""
    sides: dict[str, dict[str, TensorRef]] = {}
    problems = []
    for key, ref in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            problems.append(f"unexpected key {key!r}: no loader knows what to do with it")
        else:
            sides.setdefault(match["module"], {})[match["embedding"] or match["linear"]] = ref
    pairs: dict[str, Pair] = {}
    stacks = {experts.wrapper_of(name): name for name in parameters}
    groups = groups_in(tensors)
    for module, found in sides.items():
        if set(found) not in ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}):
            problems.append(f"{module} has {', '.join(sorted(found))} without its counterpart")
            continue
        down, up = (found[name] for name in sorted(found))
        rank = ranks.rank(module)
        if module in stacks and down.shape[:1] == up.shape[1:] and not down.shape[0] % rank:
            (at, _, leaf), count = stacks[module].rpartition("."), down.shape[0] // rank
            pairs |= {
                f"{at}.{expert}.{leaf}": Pair(down, up, embedding=False, expert=expert, experts=count)
                for expert in range(count)
            }
        elif (count := groups.get(f"{module}.weight", 1)) > 1 and down.shape[0] == rank == count * up.shape[1]:
            pairs |= {
                f"{module}.group_{group}_of_{count}": Pair(
                    down, up, embedding=False, expert=group, experts=count, grouped=True
                )
                for group in range(count)
            }
        elif down.shape[0] == rank == up.shape[1]:
            pairs[module] = Pair(down, up, embedding="lora_embedding_A" in found)
        else:
            problems.append(f"{module} has {list(down.shape)} and {list(up.shape)}, {adapter.CONFIG} says rank {rank}")
    return pairs, problems


def kohya_pairs(tensors: Mapping[str, TensorRef], base: Checkpoint) -> tuple[dict[str, Pair], list[str]]:
    """By the names that diffusion UIs make of the base's modules."""
    modules = {adapter.kohya_name(targets.module_of(name)): targets.module_of(name) for name in base.tensors}
    found: dict[str, dict[str, TensorRef]] = {}
    for key, ref in tensors.items():
        name, _, part = key.partition(".")
        found.setdefault(name, {})[part] = ref
    pairs, problems = {}, []
    for name, parts in found.items():
        if name not in modules:
            problems.append(f"{name} is no module of the base: UIs would drop it")
        elif set(parts) != {"lora_down.weight", "lora_up.weight", "alpha"}:
            problems.append(f"{name} has {', '.join(sorted(parts))}, and not a pair with its alpha")
        elif parts["lora_down.weight"].shape[:1] != parts["lora_up.weight"].shape[1:2]:
            problems.append(f"{name} has factors of two ranks")
        else:
            pairs[modules[name]] = Pair(
                parts["lora_down.weight"], parts["lora_up.weight"], embedding=False, alpha=parts["alpha"]
            )
    return pairs, problems


def scale_of(module: str, pair: Pair, ranks: loaders.Ranks) -> float:
    """What B·A is multiplied by."""
    if pair.alpha is None:
        return ranks.scale(module)
    return float(read_tensors([pair.alpha])[0]) / pair.down.shape[0]
