"""The file that a compressed adapter becomes: the keys that it had, with fewer ranks. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from phlora_pipeline import targets
from phlora_pipeline.adapter import Kept, Layout, Slot
from phlora_pipeline.lora import Adapter, LoraModule
from phlora_pipeline.targets import Dialect, Kind

_UNIFORM: frozenset[Kind] = frozenset({"expert", "router"})
"""PEFT stacks the ones and renames the others, and no pattern follows."""

EXPERT = "#"
"""Between a stack's name and the number of an expert."""

_KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")


def written_rank(ranks: Mapping[str, int], dialect: Dialect) -> int:
    """What the config says: the largest, on the dialect's grid."""
    return targets.written_rank(max(ranks.values()), targets.server_rules("", dialect).rank_grid)


def make_layout(lora: Adapter, ranks: Mapping[str, int], dialect: Dialect) -> Layout:
    """Slots for every pair, and what is kept as it is.

    Args:
        lora: as it was.
        ranks: module → how many of its ranks are written.
        dialect: whether each is stored at its own rank, or padded to one.
    """
    written = written_rank(ranks, dialect)
    per_tensor = targets.server_rules("", dialect).per_tensor_ranks
    stored = {
        name: ranks[name] if per_tensor and not _is_uniform(module) else written
        for name, module in lora.modules.items()
    }
    slots = [slot for name, module in lora.modules.items() for slot in _slots(module, stored[name])]
    kept = [Kept(item.key, item.ref.dtype, item.ref.shape, item.ref) for item in lora.whole]
    kept += [_bias(module) for module in lora.modules.values() if module.bias]
    return Layout(
        tuple(sorted(slots, key=lambda slot: slot.key)),
        frozenset(lora.modules),
        frozenset(),
        bool(lora.config.get("fan_in_fan_out")),
        {name: rank for name, rank in stored.items() if rank != written},
        {},
        tuple(sorted(kept, key=lambda item: item.key)),
        biases=any(module.bias for module in lora.modules.values()),
    )


def config_of(lora: Adapter, layout: Layout, rank: int, base_name: str) -> dict[str, Any]:
    """The adapter's own config, with the new ranks and scales of 1."""
    named = base_name or lora.base_name or None
    if lora.kohya:
        return {**lora.config, "format": "kohya", "base_model_name_or_path": named, "r": rank}
    pattern = {f"^{re.escape(module)}": own for module, own in layout.ranks.items()}
    config = {
        **lora.config,
        "base_model_name_or_path": named,
        "inference_mode": True,
        # How the training began: PEFT would begin so again, before it loads, and asks even ranks of one way.
        "init_lora_weights": True,
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
    }
    return {name: None if name in {"eva_config", "lora_ga_config"} else value for name, value in config.items()}


def metadata_of(lora: Adapter, rank: int) -> dict[str, str]:
    """What the file says of itself: UIs read from it which base a kohya file is for."""
    if not lora.kohya:
        return {"format": "pt"}
    return {
        **lora.metadata,
        **{name: str(rank) for name in ("ss_network_dim", "ss_network_alpha") if name in lora.metadata},
    }


def _slots(module: LoraModule, rank: int) -> list[Slot]:
    """Two, or with kohya's alpha three; nothing is turned: what was A stays A."""
    rows, columns = module.experts * rank, module.B.shape[2:]
    stack = tuple(f"{module.name}{EXPERT}{expert}" for expert in range(module.experts)) if module.experts > 1 else ()
    tensor = None if stack else module.name
    A = Slot(module.A.name, (rows, *module.A.shape[1:]), tensor, "A", transposed=False, stack=stack)
    B = Slot(module.B.name, (module.outputs, rows, *columns), tensor, "B", transposed=False, stack=stack)
    if not module.A.name.endswith(_KOHYA[0]):
        return [A, B]
    return [A, B, replace(A, key=module.path + _KOHYA[2], shape=(), tensor=None, alpha=rank)]


def _bias(module: LoraModule) -> Kept:
    """It is scaled as B·A is, and that scale is 1 from now on."""
    assert module.bias is not None
    dtype = module.bias.dtype if module.scale == 1 else "F32"
    return Kept(module.bias.name, dtype, module.bias.shape, module.bias)


def _is_uniform(module: LoraModule) -> bool:
    return module.form == "stack" or targets.kind_of(f"{module.name}.weight", (1, 1)) in _UNIFORM
