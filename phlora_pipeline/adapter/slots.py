"""The tensors of an adapter's file: names and shapes, and what each is filled with. No bytes yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from phlora_pipeline import safetensors_format
from phlora_pipeline.carry import Place
from phlora_pipeline.checkpoint import TORCH_DTYPES, TensorRef
from phlora_pipeline.plan import TensorPair

PREFIX = "base_model.model."
KOHYA_PREFIX = "lora_unet_"
DTYPES = {"float32": ("F32", torch.float32), "bfloat16": ("BF16", torch.bfloat16), "float16": ("F16", torch.float16)}
Side = Literal["A", "B"]


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of the adapter file.

    Attributes:
        key: its name in the file.
        shape: as written, padded to the adapter's rank.
        tensor: the weight whose factor fills it, or None for zeros.
        side: which factor.
        transposed: whether the factor is turned: for weights that are stored as (in, out), and for embeddings.
        stack: instead of `tensor`, the weights of all experts in order, where one tensor of the file holds the factors of all.
        alpha: the number that it holds, where it is no factor: kohya's files have each pair's alpha in them.
        grouped: whether the stack is of a convolution's groups, and not of experts.
    """

    key: str
    shape: tuple[int, ...]
    tensor: str | None
    side: Side
    transposed: bool
    stack: tuple[str | None, ...] = ()
    alpha: int | None = None
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Kept:
    """A tensor of the adapter file that is no factor: one that is kept whole, or the difference of a bias.

    Attributes:
        key: its name in the file.
        dtype: as stored there, in safetensors' name; of a difference F32.
        shape: as in the fine-tune.
        tuned: the fine-tune's tensor; None for zeros.
        base: what is taken off it; None where it is kept whole.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    tuned: TensorRef | None = None
    base: TensorRef | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """The adapter file as a whole.

    Attributes:
        slots: by key.
        modules: the modules that have a pair.
        zero_filled: those of them whose pair is zero.
        fan_in_fan_out: whether any pair is for a weight stored as (in, out).
        ranks: module → its rank, where that is not the adapter's.
        parameters: of the modules, those that loaders know by a parameter's name → that name.
        kept: what is no factor, by key.
        whole: modules that are kept whole.
        biases: whether the pairs have biases.
    """

    slots: tuple[Slot, ...]
    modules: frozenset[str]
    zero_filled: frozenset[str]
    fan_in_fan_out: bool
    ranks: Mapping[str, int]
    parameters: Mapping[str, str]
    kept: tuple[Kept, ...] = ()
    whole: tuple[str, ...] = ()
    biases: bool = False

    def carries(self, place: Place) -> bool:
        """Whether what belongs there is in the file."""
        return self.biases if place.how == "bias" else place.module in self.whole

    def in_file_order(self, dtype: str) -> list[Slot | Kept]:
        """As the reference library sorts: wider dtypes first, which keeps all of them aligned, then by key."""

        def order(item: Slot | Kept) -> tuple[int, str]:
            return -safetensors_format.DTYPE_BITS[stored_dtype(item, dtype)[0]], item.key

        return sorted((*self.slots, *self.kept), key=order)


def pair_slots(
    module: str, pair: TensorPair, rank: int, tensor: str | None, *, embedding: bool, transposed: bool
) -> list[Slot]:
    d, k = pair.rows, pair.shape[1]
    inputs, outputs = (d, k) if transposed else (k, d)
    first, second = ("B", "A") if transposed else ("A", "B")
    # PEFT keeps an embedding's factors as bare parameters, the others' as modules with a weight.
    down, up = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    # A convolution's factors are a convolution with its kernel, and one with a kernel of 1.
    into, out_of = (pair.kernel, (1,) * (len(pair.kernel) - 1)) if pair.kernel else ((inputs,), ())
    return [
        Slot(f"{PREFIX}{module}.{down}", (rank, *into), tensor, first, transposed),  # type: ignore[arg-type]
        Slot(f"{PREFIX}{module}.{up}", (outputs, rank, *out_of), tensor, second, transposed),  # type: ignore[arg-type]
    ]


def group_slots(module: str, pairs: Sequence[TensorPair], rank: int, factored: frozenset[str]) -> list[Slot]:
    """The pair of a grouped convolution: A over the channels of all groups, B a group at a time.

    Args:
        module: the convolution.
        pairs: its groups in order.
        rank: of each.
        factored: tensors that have factors.
    """
    (channels, *window), count = pairs[0].kernel, len(pairs)
    stack = tuple(pair.name if pair.name in factored else None for pair in pairs)
    down, up = (rank * count, channels * count, *window), (pairs[0].rows * count, rank, *(1 for _ in window))
    return [
        Slot(f"{PREFIX}{module}.lora_A.weight", down, None, "A", transposed=False, stack=stack, grouped=True),
        Slot(f"{PREFIX}{module}.lora_B.weight", up, None, "B", transposed=False, stack=stack, grouped=True),
    ]


def kohya_name(module: str) -> str:
    """A module's name in kohya's files.

    >>> kohya_name("down_blocks.0.attentions.1.proj_in")
    'lora_unet_down_blocks_0_attentions_1_proj_in'
    """
    return KOHYA_PREFIX + module.replace(".", "_")


def kohya_slots(slot: Slot) -> list[Slot]:
    """The slot by its other name; beside A the alpha, which is the rank, so that the scale is 1."""
    module, _, side = slot.key.removeprefix(PREFIX).rpartition(".lora_")
    name = kohya_name(module)
    if side == "B.weight":
        return [replace(slot, key=f"{name}.lora_up.weight")]
    alpha = Slot(f"{name}.alpha", (), None, "A", transposed=False, alpha=slot.shape[0])
    return [replace(slot, key=f"{name}.lora_down.weight"), alpha]


def stored_dtype(slot: Slot | Kept, dtype: str) -> tuple[str, torch.dtype]:
    """How safetensors and torch call what the slot is stored as; not every rank is a number of 16 bits."""
    if isinstance(slot, Kept):
        return slot.dtype, TORCH_DTYPES[slot.dtype]
    return DTYPES["float32" if slot.alpha is not None else dtype]
