"""Experts that a checkpoint keeps in one 3-D tensor, seen as the matrices that they are; and PEFT's way of stacking their factors. Pure.

transformers 5 holds a layer's experts as `experts.gate_up_proj` and `experts.down_proj`, and so does a checkpoint that
is saved as it is in memory. Each expert's matrix is a range of the stack's bytes, so that taking a stack apart is to name
the ranges, as checkpoints of single experts name them; all that follows knows matrices only.

With E experts, H hidden and I inner features:
    (E, 2I, H) and (E, H, I): (out, in), gate above up: three matrices of each expert (Mixtral, Qwen3-MoE and most others).
    (E, H, 2I) and (E, I, H): (in, out), gate beside up or interleaved with it: two matrices of each expert (gpt-oss).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from phlora_pipeline import targets
from phlora_pipeline.checkpoint import Checkpoint, TensorRef
from phlora_pipeline.errors import CheckpointError, quoted

_STACK = re.compile(r"(?P<at>(?:.+\.)?experts)\.gate_up_proj(?P<weight>(?:\.weight)?)")
_ONE = re.compile(r"(?P<at>(?:.+\.)?experts)\.(?P<expert>\d+)\.(?P<leaf>\w+)")
GATE_UP = "experts.gate_up_proj"
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


def apart(base: Checkpoint, tuned: Checkpoint) -> tuple[Checkpoint, Checkpoint]:
    """Both checkpoints with every stack of experts taken apart; stacks that are not understood stay as they are.

    Raises:
        CheckpointError: an expert is there twice, by itself and in a stack.
    """
    model_type = tuned.model_type or base.model_type
    return (
        replace(base, tensors=_apart(base.tensors, model_type, base.url)),
        replace(tuned, tensors=_apart(tuned.tensors, model_type, tuned.url)),
    )


def _apart(tensors: Mapping[str, TensorRef], model_type: str, url: str) -> Mapping[str, TensorRef]:
    blocks: dict[str, str] = {}
    stacked: set[str] = set()
    matrices: list[TensorRef] = []
    for match in filter(None, map(_STACK.fullmatch, tensors)):
        down = tensors.get(f"{match['at']}.down_proj{match['weight']}")
        block = match["at"].rpartition(".")[0]
        renamed = _block_of_single_experts(block, model_type)
        if down and (seen := list(_matrices(tensors[match[0]], down, renamed, model_type))):
            blocks[block] = renamed
            stacked |= {match[0], down.name}
            matrices += seen
    if not stacked:
        return tensors
    others = (replace(ref, name=_moved(name, blocks)) for name, ref in tensors.items() if name not in stacked)
    result: dict[str, TensorRef] = {}
    for ref in (*others, *matrices):
        if ref.name in result:
            raise CheckpointError(
                f"{url} holds {quoted(ref.name)} twice: by itself and in a stack of experts",
                remedy="save the model again, by one library",
            )
        result[ref.name] = ref
    return result


def _matrices(gate_up: TensorRef, down: TensorRef, block: str, model_type: str) -> Iterator[TensorRef]:
    """Every expert's matrices; none where shapes, dtypes or the model type do not say for certain what they are."""
    shapes = gate_up.shape, down.shape
    if not {gate_up.dtype, down.dtype} <= _FLOATS or {len(shape) for shape in shapes} != {3} or 0 in gate_up.shape:
        return
    (experts, a, b), (others, c, d) = shapes
    at, turned = f"{block}.experts".lstrip("."), targets.is_transposed("gate_up_proj", model_type)
    # No shapes fit both orientations: (2d, c) and (d, 2c) are the same nowhere.
    if experts != others or (a, b) != ((d, 2 * c) if turned else (2 * d, c)):
        return
    names = targets.expert_names(model_type)
    for expert in range(experts):
        if turned:
            yield rows_of(gate_up, f"{at}.{expert}.gate_up_proj.weight", expert * a, a)
            yield rows_of(down, f"{at}.{expert}.down_proj.weight", expert * c, c)
        else:
            yield rows_of(gate_up, f"{at}.{expert}.{names['gate']}.weight", expert * a, a // 2)
            yield rows_of(gate_up, f"{at}.{expert}.{names['up']}.weight", expert * a + a // 2, a // 2)
            yield rows_of(down, f"{at}.{expert}.{names['down']}.weight", expert * c, c)


def rows_of(stack: TensorRef, name: str, first: int, count: int) -> TensorRef:
    """Some rows, counted through all of a stack's matrices, as a matrix of its own."""
    width = stack.shape[2]
    return replace(stack.entries(first * width, (first + count) * width), name=name, shape=(count, width))


def _block_of_single_experts(block: str, model_type: str) -> str:
    """Mixtral's `mlp` in memory is `block_sparse_moe` where its experts are apart, its router with it."""
    parent, dot, leaf = block.rpartition(".")
    return f"{parent}{dot}{targets.expert_names(model_type).get('block', leaf)}"


def _moved(name: str, blocks: Mapping[str, str]) -> str:
    at = name
    while at := at.rpartition(".")[0]:
        if at in blocks:
            return blocks[at] + name[len(at) :]
    return name


def parameter_of(module: str) -> str:
    """The parameter in memory, as PEFT's `target_parameters` names it, that holds a module's weight.

    >>> parameter_of("layers.0.mlp.experts.3.down_proj"), parameter_of("layers.0.mlp.router")
    ('layers.0.mlp.experts.down_proj', 'layers.0.mlp.router.weight')
    """
    match = _ONE.fullmatch(module)
    return f"{match['at']}.{match['leaf']}" if match else f"{module}.weight"


def fused_into(module: str, model_type: str) -> str:
    """The end of the name of the parameter that transformers 5 makes of single experts' matrices of this kind.

    >>> fused_into("layers.0.block_sparse_moe.experts.3.w1", "mixtral")
    'experts.gate_up_proj'
    """
    down = module.rpartition(".")[2] == targets.expert_names(model_type)["down"]
    return "experts.down_proj" if down else GATE_UP


def number_of(module: str) -> int:
    """Which expert a module of experts is of."""
    return int(_ONE.fullmatch(module)["expert"])  # type: ignore[index]


def wrapper_of(parameter: str) -> str:
    """The path of a stack's factors in an adapter: PEFT wraps the experts once for each parameter, `down_proj` last.

    >>> wrapper_of("mlp.experts.gate_up_proj"), wrapper_of("mlp.experts.down_proj")
    ('mlp.experts.base_layer', 'mlp.experts')
    """
    at, _, leaf = parameter.rpartition(".")
    return at if leaf == "down_proj" else f"{at}.base_layer"


def of_one(stacked: Tensor, expert: int, experts: int, *, down: bool) -> Tensor:
    """One expert's factor in PEFT's stack of them, as a view.

    Args:
        stacked: A (E·r, in), whose row e·r + ρ is row ρ of expert e, or B (out, r·E), whose column ρ·E + e is its column ρ.
        expert, experts: which of how many.
        down: whether it is A.
    """
    if down:
        return stacked.view(experts, -1, stacked.shape[1])[expert]
    return stacked.view(stacked.shape[0], -1, experts)[..., expert]
