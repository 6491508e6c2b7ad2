"""Is what an adapter keeps whole the fine-tune's own? Modules entry by entry, biases as differences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from phlora_pipeline import targets
from phlora_pipeline.adapter import PREFIX
from phlora_pipeline.checkpoint import Checkpoint, TensorRef, read_tensors

_BIAS = ".lora_B.bias"


def without_kept(
    tensors: Mapping[str, TensorRef], config: Mapping[str, Any], base: Checkpoint, tuned: Checkpoint
) -> tuple[dict[str, TensorRef], list[str]]:
    """The keys that are left for pairs, and what is wrong with the others.

    Args:
        tensors: of the adapter's file.
        config: `adapter_config.json`.
        base, tuned: the checkpoints.
    """
    whole = tuple(config.get("modules_to_save") or ())
    left: dict[str, TensorRef] = {}
    problems: list[str] = []
    for key, ref in tensors.items():
        name = key.removeprefix(PREFIX)
        if key.endswith(_BIAS) and config.get("lora_bias"):
            problems += _bias_problems(name.removesuffix(_BIAS), ref, base, tuned)
        elif whole and name.rpartition(".")[0].endswith(whole):
            problems += _whole_problems(name, ref, tuned)
        else:
            left[key] = ref
    there = {key.removeprefix(PREFIX) for key in tensors}
    problems += _missing(there, config, tuned)
    problems += _two_vocabularies(there, left, base, tuned)
    return left, problems


def _missing(there: set[str], config: Mapping[str, Any], tuned: Checkpoint) -> Iterator[str]:
    """What PEFT would look for in the file; it makes up the rest, and only says so."""
    whole = tuple(config.get("modules_to_save") or ())
    modules = {name.rpartition(".")[0] for name in there}
    gone = [module for module in whole if module not in modules]
    yield from (f"modules_to_save names {module}, which is not in the file" for module in gone)
    for name in tuned.tensors:
        module = name.rpartition(".")[0]
        if whole and module.endswith(whole) and name not in there and module not in gone:
            yield f"{name} is of a module in modules_to_save, but is not in the file"
    if config.get("lora_bias"):
        pairs = {name.removesuffix(".weight") for name in there if name.endswith(".lora_B.weight")}
        yield from (
            f"{pair} has no bias, but lora_bias is set" for pair in sorted(pairs) if f"{pair}.bias" not in there
        )


def _two_vocabularies(
    there: set[str], left: Mapping[str, TensorRef], base: Checkpoint, tuned: Checkpoint
) -> Iterator[str]:
    """Pairs have the base's rows, what is kept whole the fine-tune's."""
    other = {
        name: (ref.shape[0], tuned.tensors[name].shape[0])
        for name, ref in base.tensors.items()
        if name in tuned.tensors and ref.shape[:1] != tuned.tensors[name].shape[:1]
    }
    kept = [name for name in other if name in there]
    for name in other.keys() - kept if kept else ():
        module = targets.module_of(name)
        if any(key.startswith(f"{PREFIX}{module}.lora_") for key in left):
            yield f"{module} has a pair for the base's {other[name][0]} rows, but {kept[0]} is kept with the fine-tune's {other[kept[0]][1]}: no model has both"


def _bias_problems(module: str, ref: TensorRef, base: Checkpoint, tuned: Checkpoint) -> Iterator[str]:
    found = read_tensors([ref])[0].float()
    before, after = (side.tensors.get(f"{module}.bias") for side in (base, tuned))
    if before is None or after is None:
        if found.any():
            yield f"{module} has no bias, but its pair's bias is not zero"
        return
    old, new = (tensor.float() for tensor in read_tensors([before, after]))
    # One rounding of the difference, in whatever dtype it is stored.
    if found.shape != new.shape or not torch.allclose(found, new - old, rtol=1e-2, atol=0):
        yield f"the bias of {module}'s pair is not the difference of the two biases"


def _whole_problems(name: str, ref: TensorRef, tuned: Checkpoint) -> Iterator[str]:
    after = tuned.tensors.get(name)
    if after is None:  # an output that is tied to its input has no tensor of its own
        return
    if ref.shape != after.shape:
        yield f"{name} is kept as {list(ref.shape)}, the fine-tune has {list(after.shape)}"
    elif not torch.equal(*(tensor.float() for tensor in read_tensors([ref, after]))):
        yield f"{name} is kept, but is not the fine-tune's"
