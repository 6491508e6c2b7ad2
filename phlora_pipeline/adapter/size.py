"""What an adapter's file weighs, to the byte, before any factor is read."""

from __future__ import annotations

import math
from collections.abc import Mapping

from phlora_pipeline import safetensors_format
from phlora_pipeline.adapter.slots import Layout, stored_dtype

METADATA: Mapping[str, str] = {"format": "pt"}
"""What PEFT's own files have for `__metadata__`."""


def file_header(layout: Layout, dtype: str, metadata: Mapping[str, str] = METADATA) -> bytes:
    """The first bytes of `adapter_model.safetensors`."""
    items = layout.in_file_order(dtype)
    return safetensors_format.build_header(
        {item.key: (stored_dtype(item, dtype)[0], item.shape) for item in items}, metadata
    )


def file_bytes(layout: Layout, dtype: str, metadata: Mapping[str, str] = METADATA) -> int:
    """Of the file: header and tensors; 0 of an adapter without any, which is not written."""
    if not layout.slots:
        return 0
    items = layout.in_file_order(dtype)
    payload = sum(safetensors_format.tensor_bytes(stored_dtype(item, dtype)[0], item.shape) for item in items)
    return len(file_header(layout, dtype, metadata)) + payload


def parameters(layout: Layout) -> int:
    """Numbers in it: factors, zero pairs, and what is kept whole."""
    return sum(math.prod(item.shape) for items in (layout.slots, layout.kept) for item in items)
