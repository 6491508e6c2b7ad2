"""An adapter beside its base: which pair is for which matrix of the checkpoint, and what it adds to that, in its own orientation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from phlora_pipeline import convolutions, experts, names, targets
from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora.files import Adapter, listed
from phlora_pipeline.lora.modules import LoraModule, Whole

_KOHYA_PREFIX = re.compile(r"^lora_(unet|te\d?)_")
_EXPERTS = re.compile(r"(?P<block>.+)\.experts\.(?P<leaf>gate_up_proj|down_proj)")


@dataclass(frozen=True, slots=True)
class Delta:
    """What one pair adds to a matrix of the base.

    Attributes:
        tensor: the matrix; an expert's in a stack is a range of the stack's bytes, as a group's of a convolution. Where the adapter replaces it (`Fit.whole`),
            the adapter's own.
        module: the pair.
        transposed: whether the base stores it as (in, out), or with a row per token.
        expert: which of the pair's, or which group.
        first: row of B·A with which the matrix begins: gate and up are apart in most checkpoints, and one in memory.
    """

    tensor: TensorRef
    module: LoraModule
    transposed: bool
    expert: int = 0
    first: int = 0

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows of scale·B·A in the base's orientation: (stop − start, columns) float32."""
        return self.of(*self.module.factors(), start, stop)

    def of(self, A: Tensor, B: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """The same, of factors that were read before: a stack's are read once for all its experts."""
        d = self.tensor.matrix.shape[0]
        stop = d if stop is None else min(stop, d)
        A, B = A[self.expert], B[self.expert]  # (r, k), (d, r)
        if self.transposed:
            left, right = A[:, start:stop].mT, B.mT
        else:
            left, right = B[self.first + start : self.first + stop], A
        return (left @ right).mul_(self.module.scale)


@dataclass(frozen=True, slots=True)
class Fit:
    """An adapter's parts by the base's tensors.

    Attributes:
        deltas: name of a matrix in the base (as `experts.apart` names them) → what is added to it.
        biases: name of a bias → the pair whose `lora_bias`, scaled, is added to it.
        whole: name of a tensor → what takes its place, before anything is added; the base need not have it.
        tied: the pair of an output that is tied to its input, and has no tensor of its own; None where there is none.
    """

    deltas: Mapping[str, Delta]
    biases: Mapping[str, LoraModule]
    whole: Mapping[str, Whole]
    tied: LoraModule | None


@dataclass(frozen=True, slots=True)
class _Place:
    """A matrix, and which expert's rows of B·A, from `first` on, it is for; `size` of them, or all."""

    tensor: TensorRef
    expert: int = 0
    first: int = 0
    size: int | None = None

    def outputs(self, module: LoraModule) -> int:
        return module.outputs if self.size is None else self.size


def fit(lora: Adapter, base: Checkpoint) -> Fit:
    """Find every pair's place in the base. Reads nothing.

    Raises:
        RequestError: a module that the base does not have, or a shape that is not its own: names them.
    """
    base, _ = experts.apart(base, base)
    known = _by_adapter_names(lora, base)
    whole = {known[item.name].name if item.name in known else item.name: item for item in lora.whole}
    stored = frozenset(known)
    known |= {item.name: replace(item.ref, name=name) for name, item in whole.items()}
    deltas: dict[str, Delta] = {}
    tied: LoraModule | None = None
    problems: list[str] = []
    for module in lora.modules.values():
        if f"{module.name}.weight" not in stored and _is_tied(module, base):
            tied = module
            continue
        places = _places(module, known, base.model_type)
        if not places:
            problems.append(f"the base has no {module.name}")
        for place in places:
            turned = _transposed(module, place, base.model_type)
            if turned is None:
                shape, name = list(place.tensor.shape), place.tensor.name
                problems.append(
                    f"{module.name} is {place.outputs(module)} × {module.inputs}, {name} of the base is {shape}"
                )
            else:
                deltas[place.tensor.name] = Delta(place.tensor, module, turned, place.expert, place.first)
    if problems:
        fitting = len({delta.module.name for delta in deltas.values()}) + (tied is not None)
        raise RequestError(
            f"{lora.url} is not an adapter of {base.url}: {fitting} of its {len(lora.modules)} modules fit; {listed(problems)}",
            remedy=f"give the base that it was trained on{f', {lora.base_name}' if lora.base_name else ''}",
        )
    biases = {
        (known[f"{module.name}.bias"].name if f"{module.name}.bias" in known else f"{module.name}.bias"): module
        for module in lora.modules.values()
        if module.bias is not None
    }
    return Fit(deltas, biases, whole, tied)


def _by_adapter_names(lora: Adapter, base: Checkpoint) -> dict[str, TensorRef]:
    """The base's tensors by the names that the adapter has for them."""
    if lora.kohya:
        flat = {targets.module_of(name).replace(".", "_"): ref for name, ref in base.tensors.items()}
        ours = {name: flat.get(_KOHYA_PREFIX.sub("", name)) for name in lora.modules}
        return {f"{name}.weight": ref for name, ref in ours.items() if ref is not None}
    wanted = [f"{module.name}.weight" for module in lora.modules.values() if module.form != "stack"]
    renamed = names.matched(base.tensors, wanted)
    theirs = {other: name for name, other in renamed.items()}
    return {theirs.get(name, name): ref for name, ref in base.tensors.items()}


def _places(module: LoraModule, known: Mapping[str, TensorRef], model_type: str) -> list[_Place]:
    """The matrices that a pair is for; none where the base has not all of them."""
    ref = known.get(f"{module.name}.weight") or known.get(module.name)
    if ref is not None and module.form == "stack" and len(ref.shape) == 3:
        count, rows = ref.shape[:2]
        matrices = [experts.rows_of(ref, f"{ref.name}[{expert}]", expert * rows, rows) for expert in range(count)]
        return [_Place(matrix, expert) for expert, matrix in enumerate(matrices)] if count == module.experts else []
    if ref is not None and module.form == "groups" and not ref.shape[0] % module.experts:
        return [_Place(kernel, group) for group, kernel in enumerate(convolutions.kernels(ref, module.experts))]
    if ref is not None:
        return [_Place(ref)]
    match = _EXPERTS.fullmatch(module.name)
    found = [_of_one_expert(expert, module.outputs, match, known, model_type) for expert in range(module.experts)] if match else []  # fmt: skip
    return [place for places in found for place in places] if all(found) else []


def _of_one_expert(
    expert: int, outputs: int, match: re.Match[str], known: Mapping[str, TensorRef], model_type: str
) -> list[_Place]:
    """One expert's matrix, or its two: gate and up are one in memory, and apart in most checkpoints."""
    spelt = targets.expert_names(model_type)
    parent, dot, leaf = match["block"].rpartition(".")
    at = f"{parent}{dot}{spelt.get('block', leaf)}.experts.{expert}"
    if (ref := known.get(f"{at}.{match['leaf']}.weight")) is not None:
        return [_Place(ref, expert)]
    if match["leaf"] == "down_proj":
        parts, size = ["down"], outputs
    else:
        parts, size = ["gate", "up"], outputs // 2
    refs = [known.get(f"{at}.{spelt[part]}.weight") for part in parts]
    return [_Place(ref, expert, size * number, size) for number, ref in enumerate(refs) if ref is not None]


def _transposed(module: LoraModule, place: _Place, model_type: str) -> bool | None:
    """Whether B·A is turned in this matrix; None where it fits in neither way."""
    ref = place.tensor
    if len(ref.shape) < 2:
        return None
    shape, plain = ref.matrix.shape, (place.outputs(module), module.inputs)
    leaf = targets.module_of(ref.name).partition("[")[0]
    turned = module.form == "embedding" or targets.is_transposed(leaf, model_type)
    # Of a stack PEFT asks the model's class which way it is; where the type is not known, its shape tells.
    for choice in (turned, not turned) if module.form == "stack" else (turned,):
        if shape == (plain[::-1] if choice else plain):
            return choice
    return None


def _is_tied(module: LoraModule, base: Checkpoint) -> bool:
    is_head = targets.kind_of(f"{module.name}.weight", (1, 1)) == "lm_head"
    return is_head and bool(base.config.get("tie_word_embeddings", True))
