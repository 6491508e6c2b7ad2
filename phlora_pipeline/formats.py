"""Formats that hold no weights which could be subtracted: recognised by the names of tensors, and refused with a remedy. Pure.

A merged checkpoint often keeps the `quantization_config` of its training, with plain weights beside it, so a config alone
condemns nothing; it gives the format its name. Names are those that transformers' quantizers and their libraries write.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from phlora_pipeline.errors import quoted
from phlora_pipeline.quantised import Stored, quantisation

_INTEGERS = frozenset({"U8", "I8", "I16", "U16", "I32", "U32", "F4"})
_OF_TRANSFORMERS = "load it with transformers, {}, and save_pretrained"
_LOADED_DENSE = "quantization_config=CompressedTensorsConfig(dequantize=True)"
_BY_METHOD = _OF_TRANSFORMERS.format("call model.dequantize()")
_BY_ITS_LIBRARY = "by the library that packed it"
_BY_CONVERTING = "compressed_tensors' convert_checkpoint does it, with {}"


@dataclass(frozen=True, slots=True)
class _Format:
    name: str
    marks: re.Pattern[str]
    methods: frozenset[str]
    how: str


def _format(name: str, marks: str, methods: str, how: str) -> _Format:
    return _Format(name, re.compile(marks), frozenset(methods.split()), how)


_FORMATS = (
    _format("GPTQ", r"\.g_idx$", "gptq auto-round", "each layer of GPTQModel's torch backend has dequantize_weight()"),
    _format("AWQ", r"\.q(weight|zeros)$", "awq", _BY_CONVERTING.format("AutoAWQConverter, then CompressedTensorsDequantizer")),
    _format(
        "bitsandbytes", r"\.(SCB|(nested_)?absmax|(nested_)?quant_map|quant_state\.bitsandbytes__\w+)$",
        "bitsandbytes", _BY_METHOD,
    ),
    _format(
        "compressed-tensors, packed", r"\.weight_packed$", "compressed-tensors", _OF_TRANSFORMERS.format(_LOADED_DENSE)
    ),
    _format("MXFP4", r"_blocks$", "mxfp4", _OF_TRANSFORMERS.format("quantization_config=Mxfp4Config(dequantize=True)")),
    _format("HQQ", r"\.W_q$", "hqq", "each HQQLinear has dequantize()"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Refusal:
    """A format that is not read: which, where it was seen, and how to get at weights."""

    format: str
    seen: str
    remedy: str


def refusal(tensors: Mapping[str, Stored], config: Mapping[str, Any]) -> Refusal | None:
    """Why a checkpoint cannot be read as weights; None where it can.

    Args:
        tensors: its tensors by name.
        config: its `config.json`.
    """
    method = str(quantisation(config).get("quant_method") or "")
    told = f"config.json says quant_method {quoted(method)}" if method else ""
    name, found = next(_marked(tensors, method), ("", None))
    if found is None:
        return None
    seen = f"{quoted(name)} is there, as {tensors[name].dtype} of shape {list(tensors[name].shape)}"
    return Refusal(
        found.name, " and ".join(each for each in (told, seen) if each),
        f"give the checkpoint in bf16 or fp8 that it was made from, or dequantise it first: {found.how}",
    )  # fmt: skip


def _marked(tensors: Mapping[str, Stored], method: str) -> Iterator[tuple[str, _Format]]:
    """Tensors that no checkpoint of plain weights has, and the format that they are of."""
    # What the config names comes first: GPTQ and AWQ share most of their tensors' names.
    for known in sorted(_FORMATS, key=lambda known: method not in known.methods):
        yield from ((name, known) for name in tensors if known.marks.search(name) and _is_real(known, name, tensors))
    for name, stored in tensors.items():
        # Buffers of integers are common, weights of integers are not: those have a scale, or a config that tells of them.
        packed = stored.dtype in _INTEGERS and name.endswith("weight") and len(stored.shape) >= 2
        if packed and (method or any(f"{name}{last}" in tensors for last in ("_scale", "_scale_inv", "_scales"))):
            how = _OF_TRANSFORMERS.format(_LOADED_DENSE) if method == "compressed-tensors" else _BY_ITS_LIBRARY
            yield name, _format(method or "integers with scales", "", "", how)


def _is_real(known: _Format, name: str, tensors: Mapping[str, Stored]) -> bool:
    """`_blocks` alone could be anybody's name; MXFP4 has scales beside it."""
    return known.name != "MXFP4" or f"{name.removesuffix('_blocks')}_scales" in tensors
