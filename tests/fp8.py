"""Weights of eight bits as their producers write them: quantised here by the definition, one scale for each block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.toys import LLAMA

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}


def config(block: Sequence[int] | None = (16, 16)) -> dict[str, Any]:
    """Of a Llama, as transformers' `FineGrainedFP8Config` writes it."""
    told = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block}
    return {**LLAMA, "quantization_config": told}


def quantised(
    weight: Tensor,
    block: Sequence[int],
    dtype: torch.dtype = torch.float8_e4m3fn,
    scale_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The weight in eight bits, and one scale for each block, so that its largest entry is the largest there is."""
    grid = tuple(-(-size // step) for size, step in zip(weight.shape, block, strict=True))
    largest = torch.zeros(grid, dtype=torch.float64)
    at = _cells(weight.shape, block)
    largest.view(-1).scatter_reduce_(0, at.view(-1), weight.double().abs().view(-1), "amax")
    scale = (largest.clamp(min=1e-12) / LARGEST[dtype]).to(scale_dtype)
    spread = scale.double().view(-1)[at]
    return (weight.double() / spread).clamp(-LARGEST[dtype], LARGEST[dtype]).float().to(dtype), scale


def dequantised(stored: Tensor, scale: Tensor, block: Sequence[int]) -> Tensor:
    """The definition, in float64: every entry times the scale of the block that it lies in."""
    return stored.float().double() * scale.float().double().reshape(-1)[_cells(stored.shape, block)]


def _cells(shape: Sequence[int], block: Sequence[int]) -> Tensor:
    """The number of its block, in row-major order, for every entry."""
    number = torch.zeros(tuple(shape), dtype=torch.int64)
    for dim, (size, step) in enumerate(zip(shape, block, strict=True)):
        places = (torch.arange(size) // step).view([-1 if other == dim else 1 for other in range(len(shape))])
        number = number * -(-size // step) + places
    return number


def checkpoint(
    tensors: Mapping[str, Tensor], block: Sequence[int] = (16, 16), *, suffix: str = "_scale_inv"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A checkpoint with its layers' matrices in eight bits and their scales, and what these are in float64."""
    stored: dict[str, Tensor] = {}
    meant: dict[str, Tensor] = {}
    for name, weight in tensors.items():
        if weight.ndim == 2 and ".layers." in name:
            step = [size if each is None else each for size, each in zip(weight.shape, block, strict=True)]
            stored[name], stored[f"{name}{suffix}"] = quantised(weight, step)
            meant[name] = dequantised(stored[name], stored[f"{name}{suffix}"], step)
        else:
            stored[name], meant[name] = weight, weight.double()
    return stored, meant
