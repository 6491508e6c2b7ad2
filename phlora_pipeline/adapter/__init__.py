"""Write side: which keys an adapter file has, what shape each is, and which factor fills it. Layouts, not bytes.

What is portable follows one rule (`servers.toml` and the loaders' sources say why): one rank for all modules, reached by
zero-padding; `lora_alpha == r`, so that every loader's scale is 1; no rsLoRA, no `modules_to_save`, no bias; plain 2-D keys;
explicit zero pairs where a family would otherwise have a gap. With a policy that chooses ranks, the dialects whose servers read patterns get
each module at its own rank and the same alpha, so that the scale is 1 there, too.
"""

from __future__ import annotations

from phlora_pipeline.adapter.config import adapter_config, base_name_from
from phlora_pipeline.adapter.fill import cut, dtype_of_most, fill, fill_stack, keep, pick_dtype, round_factor
from phlora_pipeline.adapter.layout import drafting, make_layout
from phlora_pipeline.adapter.size import file_bytes, file_header, parameters
from phlora_pipeline.adapter.slots import DTYPES, PREFIX, Kept, Layout, Slot, kohya_name, stored_dtype

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"

__all__ = [
    "CONFIG", "DTYPES", "PREFIX", "WEIGHTS", "Kept", "Layout", "Slot", "adapter_config", "base_name_from", "cut", "drafting", "dtype_of_most",
    "file_bytes", "file_header", "fill", "fill_stack", "keep", "kohya_name", "make_layout", "parameters", "pick_dtype",
    "round_factor", "stored_dtype",
]  # fmt: skip
