"""Weights of eight bits, and the scales that belong to them. Pure: names and shapes, and one function of tensors.

A scale is multiplied by, whatever its name says: `weight_scale_inv` of DeepSeek, one for 128 × 128 entries
(deepseek-ai/DeepSeek-V3, README_WEIGHTS.md, "Dequantization Method"); the same of transformers, for `weight_block_size` or for the
whole tensor, `scale` and `qscale_weight` by other names (integrations/finegrained_fp8.py, `Fp8Dequantize._dequantize_one`, and its
quantizer's renamings); `weight_scale` of compressed-tensors' float-quantized, for a tensor, a channel, a group or a block
(quantization/lifecycle/forward.py, `dequantize`), and of ModelOpt, which vLLM reads as one for each row where it is a vector.
Without any scale the values are the weight, as `Fp8Dequantize.convert` takes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from phlora_pipeline.errors import quoted

FP8 = frozenset({"F8_E4M3", "F8_E5M2"})

_SCALE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", "F8_E8M0", "U8"})
_BLOCK = (128, 128)
_CHUNK = 1 << 18
"""Entries that are held beside the weight while it is scaled: they stay in a processor's cache."""

_ACTIVATIONS = re.compile(r"\.((input|output|activation|[qkv]|kv|kv_cache|prob)_scale|input_global_scale)$")


class Stored(Protocol):
    """What a header says of a tensor."""

    @property
    def dtype(self) -> str:
        """As safetensors names it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Dimensions."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a scale belongs to a weight.

    Attributes:
        name: of the scale.
        grid: its shape, with as many dimensions as the weight has.
        block: how many entries of the weight, in each dimension, share one entry of the scale.
    """

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]


class UnfitScaleError(ValueError):
    """A weight and what should be its scale do not belong together; says why."""


def find_scales(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> dict[str, Scaling]:
    """Weight → its scale, for every weight of eight bits that has one.

    Args:
        tensors: of one checkpoint, by name.
        config: its `config.json`, which may say how large a block is, and that there should be scales.

    Raises:
        UnfitScaleError: a scale does not fit its weight, or one is missing where others, or the config, promise it.
    """
    sizes = _block_size(config)
    found: dict[str, Scaling] = {}
    bare = []
    for name in (name for name, stored in tensors.items() if stored.dtype in FP8):
        scale = next((other for other in _scale_names(name) if other in tensors), "")
        if scale:
            found[name] = _scaling(tensors[name].shape or (1,), scale, tensors[scale], sizes)
        else:
            bare.append(name)
    if bare and (found or quantisation(config)):
        why = f"{len(found)} others have one" if found else "config.json tells of quantised weights"
        raise UnfitScaleError(f"{quoted(bare[0])} is stored as {tensors[bare[0]].dtype} without a scale, though {why}")
    return found


def activation_scales(tensors: Mapping[str, Stored]) -> frozenset[str]:
    """Names of single numbers beside quantised weights that scale activations or caches: no part of any weight."""
    return frozenset(
        name for name, stored in tensors.items() if _ACTIVATIONS.search(name) and stored.shape in {(), (1,)}
    )


def dequantise(
    stored: Tensor, scale: Tensor, scaling: Scaling, shape: tuple[int, ...], first: int, out: Tensor
) -> None:
    """Write weight × scale into `out`, each product rounded once to float32.

    Args:
        stored: (n,) in eight bits; it may lie in the last quarter of `out`'s memory, from where it is taken in time.
        scale: of the whole weight, of as many entries as its grid has.
        scaling: how it applies.
        shape: of the whole weight, of one dimension at least.
        first: where `stored` begins in it, counted in entries.
        out: (n,) float32.
    """
    width = shape[-1]
    scale = _as_float(scale).reshape(-1, scaling.grid[-1])
    # A table of all 256 values: four times as fast as torch's own conversion, and as exact.
    values = torch.arange(256, dtype=torch.uint8).view(stored.dtype).float()
    for start in range(0, len(stored), _CHUNK):
        codes = stored[start : start + _CHUNK].view(torch.uint8).int()
        top, bottom = (first + start) // width, (first + start + len(codes) - 1) // width + 1
        rows = scale[_grid_rows(torch.arange(top, bottom), scaling, shape)]  # (rows, columns of the grid)
        factors = rows.repeat_interleave(scaling.block[-1], dim=1)[:, :width].reshape(-1)
        at = first + start - top * width
        numbers = torch.index_select(values, 0, codes)
        torch.mul(numbers, factors[at : at + len(codes)], out=out[start : start + len(codes)])


def _grid_rows(rows: Tensor, scaling: Scaling, shape: tuple[int, ...]) -> Tensor:
    """Which row of the grid, its leading dimensions taken together, each such row of the weight belongs to."""
    found, stride = torch.zeros_like(rows), 1
    for size, block, grid in zip(shape[-2::-1], scaling.block[-2::-1], scaling.grid[-2::-1], strict=True):
        found += rows % size // block * stride
        rows, stride = rows // size, stride * grid
    return found


def _as_float(scale: Tensor) -> Tensor:
    """Bytes are exponents: 2^(byte − 127), as the OCP's microscaling formats have them."""
    return (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float()


def _scale_names(name: str) -> Iterator[str]:
    yield f"{name}_scale_inv"
    yield f"{name}_scale"
    if name.endswith(".weight"):
        yield from (f"{name.removesuffix('weight')}{last}" for last in ("scale", "qscale_weight", "scale_weight"))


def _scaling(weight: tuple[int, ...], name: str, scale: Stored, sizes: tuple[int, int]) -> Scaling:
    if scale.dtype not in _SCALE_DTYPES:
        raise UnfitScaleError(
            f"{quoted(name)}, the scale of a weight, is stored as {scale.dtype}: not in floating point"
        )
    grid = _grid(scale.shape, weight)
    usual = (*[1] * len(weight), *sizes)[-len(weight) :]  # dimensions before the last two are of experts
    block = tuple(_block(*each) for each in zip(weight[:-1], grid, usual, strict=False))
    block += (_block(weight[-1], grid[-1], usual[-1]) or _group(weight[-1], grid[-1]),)
    if len(grid) != len(weight) or not all(block):
        raise UnfitScaleError(
            f"{quoted(name)} of shape {list(scale.shape)} is no scale of a weight of shape {list(weight)}: neither one number,"
            f" nor one for each row, nor for blocks of {list(sizes)}, nor for groups of inputs"
        )
    return Scaling(name, grid, block)


def _grid(scale: tuple[int, ...], weight: tuple[int, ...]) -> tuple[int, ...]:
    if all(size == 1 for size in scale):
        return (1,) * len(weight)
    if len(scale) == 1:  # one for each row, or for each expert
        return (*scale, *(1,) * (len(weight) - 1))
    return (*(1,) * (len(weight) - len(scale)), *scale)


def _block(size: int, count: int, usual: int) -> int:
    """Entries that share one of `count` scales: all, as many as usual, or one; 0 where none of this fits."""
    if count == 1:
        return size
    return usual if -(-size // usual) == count else int(size == count)


def _group(size: int, count: int) -> int:
    """The same of inputs, which groups of any size may divide; a few rows of outputs would be fused layers of their own."""
    return 0 if not count or size % count else size // count


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What `config.json` says of quantised weights; empty where it says nothing."""
    return _mapping(config.get("quantization_config") or config.get("compression_config"))


def _block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Of `weight_block_size`, or of the first of compressed-tensors' groups that has one."""
    told = quantisation(config)
    groups = [_mapping(_mapping(group).get("weights")) for group in _mapping(told.get("config_groups")).values()]
    for size in (told.get("weight_block_size"), *(weights.get("block_structure") for weights in groups)):
        if isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) and each > 0 for each in size):
            return size[0], size[1]
    return _BLOCK


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
