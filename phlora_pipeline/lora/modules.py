"""The values: one pair of factors, where its bytes are and what it is multiplied by; a tensor that is kept whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from phlora_pipeline import convolutions, experts
from phlora_pipeline.checkpoint import TensorRef, read_tensors
from phlora_pipeline.errors import CheckpointError

Form = Literal["linear", "embedding", "conv", "stack", "groups"]


@dataclass(frozen=True, slots=True)
class LoraModule:
    """Two factors and their scale: ΔW = scale·B·A, for each expert of a stack, or group of a convolution.

    Attributes:
        name: the module that they are for; of a stack, and of what PEFT knows by a parameter's name, that parameter. In
            kohya's files the flattened name (`lora_unet_down_blocks_0_…`).
        path: what its keys begin with.
        form: `embedding`: of a matrix with a row per token, so that ΔW is (B·A)ᵀ; `conv`: A has the kernel; `stack`: of all experts;
            `groups`: of a grouped convolution.
        A: (r, k), (r, channels, height, width), of a stack (E·r, k), of groups (G·r, G·channels …), of an embedding (r, rows).
        B: (d, r), (d, r, 1, 1), of a stack (d, r·E), of groups (G·d, r, 1 …), of an embedding (columns, r).
        rank: of one pair.
        scale: what B·A is multiplied by: alpha over r or over its root.
        experts: how many pairs the factors hold, of experts or of groups.
        bias: of B, which is scaled as well (`lora_bias`); None where it has none.
        alpha: the tensor that holds it, in kohya's files.
    """

    name: str
    path: str
    form: Form
    A: TensorRef
    B: TensorRef
    rank: int
    scale: float
    experts: int = 1
    bias: TensorRef | None = None
    alpha: TensorRef | None = None

    @property
    def inputs(self) -> int:
        """k: columns of one A, a convolution's kernel flattened."""
        return self.A.matrix.shape[1] // (self.experts if self.form == "groups" else 1)

    @property
    def outputs(self) -> int:
        """d: rows of one B."""
        return self.B.shape[0] // (self.experts if self.form == "groups" else 1)

    @property
    def numel(self) -> int:
        """Entries of A and B, as stored."""
        return self.experts * self.rank * (self.inputs + self.outputs)

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (experts, r, k) and B (experts, d, r) in float32, without the scale.

        Raises:
            CheckpointError: an entry is NaN or infinite, or no kernel of a group has its channel.
        """
        refs = [self.A, self.B]
        A, B = (finite(ref, tensor).float().flatten(1) for ref, tensor in zip(refs, read_tensors(refs), strict=True))
        if self.experts == 1:
            return A[None], B[None]
        of_one = convolutions.of_one if self.form == "groups" else experts.of_one
        if self.form == "groups" and convolutions.reaches_across(A, self.experts):
            raise CheckpointError(
                f"{self.A.name} of {self.A.url} reaches from each of {self.experts} groups into the channels of others: such an update is none of a grouped kernel",
                remedy="serve it unmerged: PEFT trains A without groups, and they cannot be put back into the weight",
            )
        split = [
            [of_one(side, expert, self.experts, down=down) for expert in range(self.experts)]
            for side, down in ((A, True), (B, False))
        ]
        return torch.stack(split[0]), torch.stack(split[1])


@dataclass(frozen=True, slots=True)
class Whole:
    """A tensor of the adapter that takes the place of one of the model's.

    Attributes:
        key: in the file.
        name: the tensor that it replaces.
        ref: where it is.
    """

    key: str
    name: str
    ref: TensorRef


def finite(ref: TensorRef, tensor: Tensor) -> Tensor:
    """The tensor itself.

    Raises:
        CheckpointError: an entry is NaN or infinite; says how many, and which is the first.
    """
    wrong = ~tensor.isfinite()
    if wrong.any():
        first = [int(index) for index in wrong.nonzero()[0]]
        raise CheckpointError(
            f"{ref.name} of {ref.url} has {int(wrong.sum())} entries that are NaN or infinite, the first at {first}",
            remedy="such an adapter gives no output; take one of before its training diverged",
        )
    return tensor
