"""Which tensors are adapted: from a tensor's name and shape to its module, kind and orientation. Pure.

Kinds come from names and shapes, as the field has come to spell them, not from a table per architecture; what *servers*
take for a kind comes from `servers.toml`.
"""

from __future__ import annotations

from phlora_pipeline.targets.families import families, target_modules
from phlora_pipeline.targets.kinds import (
    MATRIX_KINDS,
    Kind,
    has_experts,
    keeps_whole,
    kernel_refusal,
    kind_of,
    module_of,
    resized,
    shadowed,
    shape_refusal,
    tower_refusal,
    worth_grouping,
)
from phlora_pipeline.targets.selection import EXCLUDED, Selection, Targets
from phlora_pipeline.targets.servers import (
    Dialect,
    ServerRules,
    dialects,
    expert_names,
    is_conv1d,
    is_transposed,
    model_types,
    names_parameters,
    server_refusal,
    server_rules,
    takes_parameters,
    written_rank,
)

__all__ = [
    "EXCLUDED", "MATRIX_KINDS", "Dialect", "Kind", "Selection", "ServerRules", "Targets", "dialects", "expert_names",
    "families", "has_experts", "is_conv1d", "is_transposed", "keeps_whole", "kernel_refusal", "kind_of", "model_types", "module_of", "names_parameters", "resized",
    "server_refusal", "server_rules", "shadowed", "shape_refusal", "takes_parameters", "target_modules", "tower_refusal",
    "worth_grouping", "written_rank",
]  # fmt: skip
