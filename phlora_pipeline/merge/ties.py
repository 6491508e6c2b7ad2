"""Where a base ties its output to its input, both ends of an adapter must say the same: merged, there is one matrix for both.

Unmerged, an adapter of a tied model has the update on both ends, which is right; one that has it on one end only means two
different matrices, and there is no place for the second one while the tie holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from phlora_pipeline import targets
from phlora_pipeline.checkpoint import Checkpoint, TensorRef, read_tensors
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora import Adapter, Fit, LoraModule
from phlora_pipeline.plan import TensorPair
from phlora_pipeline.plan.choice import tied_modules

SAME = {"BF16": 2.0**-6, "F16": 2.0**-9}
"""How far the two ends may be apart, of the larger one's largest entry, by what their factors are stored in: each may have been
rounded for itself, as by a compression. That is half an ulp for either factor of either end."""

_WIDE = 1e-5
"""The same of factors in float32."""

_BLOCK = 8 << 20


def require_both_ends(adapter: Adapter, found: Fit, base: Checkpoint) -> None:
    """Raise where an adapter would change one end of a tie, or the two in different ways.

    Raises:
        RequestError: says which end.
    """
    tie = tie_of(base)
    if tie is None:
        if found.tied is not None:
            raise RequestError(
                f"{adapter.url} has a pair for {found.tied.name}, which {base.url} has not, nor a tie to its input",
                remedy="give the base that it was trained on",
            )
        return
    source, output = (_end(found, module) for module in tie)
    if source is None and output is None:
        return
    if not _same(source, output):
        what = (
            "the two differ" if source and output else f"only {tie[0] if source else tie[1] or 'its output'} is changed"
        )
        raise RequestError(
            f"{base.url} ties {tie[1] or 'its output'} to {tie[0]}, and in {adapter.url} {what}: merged, they could not stay tied",
            remedy="untie the base first (a matrix of its own for the output, tie_word_embeddings false), or serve the adapter unmerged",
        )


def tie_of(base: Checkpoint) -> tuple[str, str] | None:
    """The modules of the input and of the output that share one weight; the output's name may be empty."""
    return tied_modules(
        base,
        [
            TensorPair(targets.module_of(name), targets.kind_of(name, ref.shape), ref, ref, rows=ref.shape[0])
            for name, ref in base.tensors.items()
            if len(ref.shape) == 2
        ],
    )


def _end(found: Fit, module: str) -> LoraModule | TensorRef | None:
    """What an adapter does to one end; None where it leaves it alone."""
    name = f"{module}.weight"
    if name in found.whole:
        return found.whole[name].ref
    if name in found.deltas:
        return found.deltas[name].module
    return found.tied if found.tied is not None and found.tied.name == module else None


def _same(source: LoraModule | TensorRef | None, output: LoraModule | TensorRef | None) -> bool:
    if isinstance(source, LoraModule) and isinstance(output, LoraModule):
        return _same_products(source, output)
    if isinstance(source, TensorRef) and isinstance(output, TensorRef):
        return source.shape == output.shape and _same_entries(source, output)
    return False


def _same_entries(source: TensorRef, output: TensorRef) -> bool:
    step = max(1, _BLOCK // source.matrix.shape[1]) * source.matrix.shape[1]
    stop = source.matrix.shape[0] * source.matrix.shape[1]
    pieces = ((source.entries(at, at + step), output.entries(at, at + step)) for at in range(0, stop, step))
    return all(torch.equal(*(tensor.float() for tensor in read_tensors(piece))) for piece in pieces)


def _same_products(source: LoraModule, output: LoraModule) -> bool:
    """Of an embedding's pair, which is turned, and of a linear layer's."""
    inner, outer = _sides(source), _sides(output)
    if (inner[0].shape[0], inner[1].shape[1]) != (outer[0].shape[0], outer[1].shape[1]):
        return False
    if source.scale == output.scale and all(map(torch.equal, inner, outer)):
        return True
    step, same = max(1, _BLOCK // inner[1].shape[1]), max(SAME.get(ref.dtype, _WIDE) for ref in (source.A, output.A))
    most = furthest = 0.0
    for first in range(0, inner[0].shape[0], step):
        one, other = (
            module.scale * (left[first : first + step] @ right)
            for module, (left, right) in ((source, inner), (output, outer))
        )
        most, furthest = max(most, float(one.abs().max())), max(furthest, float((one - other).abs().max()))
    return furthest <= same * most


def _sides(module: LoraModule) -> tuple[Tensor, Tensor]:
    """(rows, r) and (r, columns), a row for each token."""
    A, B = (each[0] for each in module.factors())
    return (A.mT, B.mT) if module.form == "embedding" else (B, A)
