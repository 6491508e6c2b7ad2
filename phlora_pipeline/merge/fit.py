"""From adapters to what happens to each tensor of the base; whatever does not fit is refused here, before anything is written."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from phlora_pipeline import lora, targets
from phlora_pipeline.checkpoint import Checkpoint, TensorRef, read_tensors
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora import Adapter, Delta, Fit, LoraModule
from phlora_pipeline.merge.changes import BLOCK, FLOATS, Change, Product, Read, Whole
from phlora_pipeline.merge.ties import require_both_ends, tie_of

_STACKS = 2
"""A layer's: gate and up, and down."""


@dataclass(frozen=True, slots=True)
class Weighted:
    """An adapter, and how much of it is added."""

    lora: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class Fitted:
    """What adapters do to a base.

    Attributes:
        changes: tensor → what is done to it.
        resized: rows of the vocabulary, in the base and merged; None where they are as many.
    """

    changes: Mapping[str, Change]
    resized: tuple[int, int] | None


class _Factors:
    """An adapter's factors. Those of all experts are kept for a while: their experts' matrices lie in turns in a shard."""

    def __init__(self) -> None:
        self._held: dict[str, tuple[Tensor, Tensor]] = {}

    def read(self, delta: Delta) -> tuple[Tensor, Tensor]:
        """(rows, r) and (r, columns), in the orientation of the base."""
        A, B = (side[delta.expert] for side in self._of(delta.module))
        if delta.transposed:
            return A.mT, B.mT
        return B[delta.first : delta.first + delta.tensor.matrix.shape[0]], A

    def _of(self, module: LoraModule) -> tuple[Tensor, Tensor]:
        if module.experts == 1:
            return module.factors()
        if module.name not in self._held:
            if len(self._held) == _STACKS:
                del self._held[next(iter(self._held))]
            self._held[module.name] = module.factors()
        return self._held[module.name]


def fit(base: Checkpoint, adapters: Sequence[Weighted]) -> Fitted:
    """Find every part of every adapter its place in the base. Reads headers, and what a tie leaves in doubt.

    Raises:
        RequestError: something has no place, or not its shape; two adapters keep the same tensor whole; or one end of a tie
            would change without the other.
    """
    products: dict[str, list[Product]] = defaultdict(list)
    widths: dict[str, int] = {}
    wholes: dict[str, Whole] = {}
    containers = _Containers(base)
    for one in adapters:
        found = lora.fit(one.lora, base)
        require_both_ends(one.lora, found, base)
        for name, width, product in (*_deltas(one, found, containers), *_biases(one, found, base)):
            products[name].append(product)
            widths[name] = width
        for name, whole in _wholes(one, found, base):
            if name in wholes:
                raise RequestError(
                    f"{name} is kept whole by {wholes[name].ref.url} and by {whole.ref.url}: which of the two is it to be?",
                    remedy="merge one of the two",
                )
            wholes[name] = whole
    resized = _resized(base, wholes)
    changes = {
        name: _change(ref, products[name], wholes.get(name), widths.get(name, 0))
        for name, ref in base.tensors.items()
        if name in products or name in wholes
    }
    return Fitted(changes, resized)


def _deltas(one: Weighted, found: Fit, containers: _Containers) -> Iterator[tuple[str, int, Product]]:
    """Tensor, width of its rows, and what is added to some of them."""
    factors = _Factors()
    for delta in found.deltas.values():
        part = delta.tensor.matrix
        rows, width = part.shape
        name, entry = (part.name, 0) if part.name in found.whole else containers.place(part)
        yield name, width, Product(entry // width, rows, _reading(factors, delta), one.weight * delta.module.scale)


def _biases(one: Weighted, found: Fit, base: Checkpoint) -> Iterator[tuple[str, int, Product]]:
    """The same of pairs with a bias, as a column; one that is zero asks for no place."""
    for name, module in found.biases.items():
        assert module.bias is not None, "only pairs with a bias are listed"
        ref, there = module.bias, base.tensors.get(name)
        if there is not None and there.shape == ref.shape:
            yield name, 1, Product(0, ref.shape[0], _reading_bias(ref), one.weight * module.scale)
        elif read_tensors([ref])[0].any():
            has = f"is {list(there.shape)} there" if there else "is not there"
            raise RequestError(
                f"{one.lora.url} has a bias of {list(ref.shape)} for {name}, which {has}: in {base.url}",
                remedy="give the base that it was trained on",
            )


def _wholes(one: Weighted, found: Fit, base: Checkpoint) -> Iterator[tuple[str, Whole]]:
    """What takes a tensor's place; the output of a tie, which is asked for with its input, needs none."""
    for name, item in found.whole.items():
        if name in base.tensors:
            yield name, _whole(one, base.tensors[name], item.ref)
        elif (tie := tie_of(base)) is None or targets.module_of(name) != tie[1]:
            raise RequestError(
                f"{one.lora.url} keeps {name} whole, and {base.url} has no tensor of that name",
                remedy="give the base that it was trained on",
            )


def _whole(one: Weighted, ref: TensorRef, kept: TensorRef) -> Whole:
    """What takes a tensor's place: of its shape, but for the rows of a vocabulary; and a number of its sort."""
    rows = targets.kind_of(ref.name, ref.shape) in {"embedding", "lm_head", "bias", "other"}
    fits = kept.shape == ref.shape or (rows and len(kept.shape) == len(ref.shape) and kept.shape[1:] == ref.shape[1:])
    if not fits or (kept.dtype != ref.dtype and not {kept.dtype, ref.dtype} <= FLOATS):
        raise RequestError(
            f"{one.lora.url} keeps {ref.name} as {kept.dtype} {list(kept.shape)}, the base has {ref.dtype} {list(ref.shape)}",
            remedy="give the base that it was trained on",
        )
    return Whole(kept, one.weight)


def _resized(base: Checkpoint, wholes: Mapping[str, Whole]) -> tuple[int, int] | None:
    """How an adapter resizes the vocabulary.

    Raises:
        RequestError: not everything that has a row for each token is resized in the same way.
    """
    kinds = {name: targets.kind_of(name, ref.shape) for name, ref in base.tensors.items()}
    others = {name: whole.ref.shape for name, whole in wholes.items() if whole.ref.shape != base.tensors[name].shape}
    found = targets.resized((kinds[name], base.tensors[name].shape, shape) for name, shape in others.items())
    problems = [
        f"{name} becomes {list(shape)}"
        for name, shape in others.items()
        if (base.tensors[name].shape[0], shape[0]) not in found
    ]
    for rows, _ in found:
        vocabulary = (name for name, kind in kinds.items() if kind in {"embedding", "lm_head"})
        problems += [
            f"{name} does not" for name in vocabulary if base.tensors[name].shape[0] == rows and name not in others
        ]
    if problems or len(found) > 1:
        told = "; ".join([*(f"a vocabulary goes from {old} rows to {new}" for old, new in sorted(found)), *problems])
        raise RequestError(
            f"rows are not added to all that has one for each token of {base.url}: {told}",
            remedy="give an adapter that keeps every resized embedding whole",
        )
    return next(iter(found), None)


def _reading(factors: _Factors, delta: Delta) -> Read:
    return lambda: factors.read(delta)


def _change(ref: TensorRef, products: Sequence[Product], whole: Whole | None, width: int) -> Change:
    shape = whole.ref.shape if whole else ref.shape
    ordered = tuple(sorted(products, key=lambda product: product.first))
    return Change(shape, width or math.prod(shape[1:]) or 1, ordered, whole)


class _Containers:
    """The tensors on disk that matrices are in: an expert's may be some rows of a stack."""

    def __init__(self, base: Checkpoint) -> None:
        self._refs: dict[str, list[TensorRef]] = defaultdict(list)
        for ref in sorted(base.tensors.values(), key=lambda ref: ref.start):
            if ref.stop > ref.start:
                self._refs[ref.url].append(ref)

    def place(self, part: TensorRef) -> tuple[str, int]:
        """The tensor's name, and the number of its entry with which the part begins."""
        refs = self._refs[part.url]
        ref = refs[bisect_right(refs, part.start, key=lambda ref: ref.start) - 1]
        return ref.name, (part.start - ref.start) * math.prod(ref.shape) // (ref.stop - ref.start)


def _reading_bias(ref: TensorRef) -> Read:
    return lambda: (lora.finite(ref, read_tensors([ref])[0]).float()[:, None], torch.ones(1, 1))


def require_finite(adapters: Sequence[Weighted]) -> None:
    """Read all that will be added, and raise where any of it is no number.

    Raises:
        CheckpointError: names the tensor.
    """
    for one in adapters:
        for module in one.lora.modules.values():
            module.factors()
            if module.bias is not None:
                lora.finite(module.bias, read_tensors([module.bias])[0])
        for item in one.lora.whole:
            for at in range(0, math.prod(item.ref.shape), BLOCK):
                lora.finite(item.ref, read_tensors([item.ref.entries(at, at + BLOCK)])[0])
