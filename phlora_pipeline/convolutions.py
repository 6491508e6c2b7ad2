"""Grouped convolutions, seen as one convolution for each group; and PEFT's way of holding the groups' factors. Pure.

A kernel (d, c, height …) of G groups is G kernels (d/G, c, height …), each from c input channels of its own: ranges of the
kernel's bytes. No checkpoint says G, and no shape: the input may have c, 2c, 3c … channels. So the user says it.

In PEFT (0.21.2, tuners/lora/layer.py, `_ConvNd.update_layer`) A is a convolution without groups and B one with them, so
that r must be a multiple of G. The two are the groups' own updates B_g·A_g where A is zero but for its diagonal:
    A (r, G·c, height …) = diag(A_0, A_1 …), A_g (r/G, c·height…)        B (d, r/G, 1 …): B_0 above B_1 …, B_g (d/G, r/G)
A is stored with its zeros. At the least rank, r = G, it has G·G·c·height… entries and the kernel d·c·height…: the pair is
smaller than what it stands for only where G² < d. In a depthwise convolution G = d, or nearly so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.targets import Selection, kind_of, module_of, worth_grouping

_GROUP = re.compile(r"(?P<module>.+)\.group_(?P<group>\d+)_of_(?P<groups>\d+)(?P<weight>(?:\.weight)?)")


def told(tuned: Checkpoint, selection: Selection) -> dict[str, int]:
    """Kernel → its groups, of those that are taken apart: the user names them, and LoRA gains by it.

    Raises:
        RequestError: what the user says cannot be so.
    """
    kernels = {name: ref for name, ref in tuned.tensors.items() if kind_of(name, ref.shape) == "conv"}
    for glob, groups in selection.conv_groups:
        named = [name for name in kernels if selection.groups_of(name) is not None and selection.says(glob, name)]
        if not named:
            raise RequestError(
                f"--conv-groups {glob}={groups} names no convolution of the fine-tune, which has {len(kernels)}",
                remedy="see the tensors' names in phlora plan --json",
            )
        for name in named:
            if kernels[name].shape[0] % groups:
                raise RequestError(
                    f"{name} of shape {list(kernels[name].shape)} cannot have {groups} groups: they do not divide its {kernels[name].shape[0]} outputs",
                    remedy="see the model's code for `groups`, and say it: --conv-groups 'GLOB=N'",
                )
    found = {name: selection.groups_of(name) or 1 for name in kernels}
    return {name: groups for name, groups in found.items() if worth_grouping(kernels[name].shape[0], groups)}


def apart(checkpoint: Checkpoint, groups: Mapping[str, int]) -> Checkpoint:
    """The checkpoint with these kernels taken apart."""
    if not groups:
        return checkpoint
    tensors: dict[str, TensorRef] = {}
    for name, ref in checkpoint.tensors.items():
        count = groups.get(name, 1)
        if count == 1 or not ref.shape or ref.shape[0] % count:
            tensors[name] = ref
            continue
        tensors |= {part.name: part for part in kernels(ref, count)}
    return replace(checkpoint, tensors=tensors)


def kernels(ref: TensorRef, groups: int) -> list[TensorRef]:
    """The kernel of each group, as ranges of the whole one's bytes."""
    rows, each = ref.shape[0] // groups, ref.matrix.shape[1] * ref.shape[0] // groups
    return [
        replace(
            ref.entries(group * each, (group + 1) * each),
            name=f"{module_of(ref.name)}.group_{group}_of_{groups}.weight",
            shape=(rows, *ref.shape[1:]),
        )
        for group in range(groups)
    ]


def whole_of(name: str) -> str:
    """The tensor or module that a group's is a part of; any other is its own.

    >>> whole_of("embed.conv.group_3_of_16.weight"), whole_of("embed.proj")
    ('embed.conv.weight', 'embed.proj')
    """
    match = _GROUP.fullmatch(name)
    return match["module"] + match["weight"] if match else name


def groups_of(module: str) -> int:
    """How many groups a group's module is one of; 1 for any other."""
    match = _GROUP.fullmatch(module)
    return int(match["groups"]) if match else 1


def number_of(module: str) -> int:
    """Which group a group's module is."""
    return int(_GROUP.fullmatch(module)["group"])  # type: ignore[index]


def siblings(modules: Iterable[str], of: Iterable[str]) -> frozenset[str]:
    """All groups of the kernels that these modules, or their groups, are of."""
    wholes = {whole_of(module) for module in of}
    return frozenset(module for module in modules if groups_of(module) > 1 and whole_of(module) in wholes)


def rank_of_one(module: str, rank: int) -> int:
    """The rank that a matrix has in an adapter of some rank: a group has its share, and at least 1."""
    return max(1, rank // groups_of(module))


def of_one(stacked: Tensor, group: int, groups: int, *, down: bool) -> Tensor:
    """One group's factor in PEFT's tensor, as a view: A_g (r/G, c·height…) or B_g (d/G, r/G)."""
    if down:
        return stacked.view(groups, stacked.shape[0] // groups, groups, -1)[group, :, group]
    return stacked.view(groups, stacked.shape[0] // groups, stacked.shape[1])[group]


def reaches_across(stacked: Tensor, groups: int) -> bool:
    """Whether an A has entries beside its diagonal: from other groups' channels, which no grouped kernel sees."""
    own = sum(int(of_one(stacked, group, groups, down=True).count_nonzero()) for group in range(groups))
    return own != int(stacked.count_nonzero())
