"""`adapter_config.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from phlora_pipeline import convolutions, experts, targets
from phlora_pipeline.adapter.slots import Layout
from phlora_pipeline.plan import Plan


def adapter_config(plan: Plan, layout: Layout, base_name: str, architectures: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json`, with only what every loader reads the same way.

    Args:
        plan: for the rank.
        layout: for the modules.
        base_name: hub id or served name of the base; empty where it is not known.
        architectures: of the fine-tune's `config.json`.
    """
    if targets.server_rules(plan.model_type, plan.dialect).unets_only:
        # No peft_type: PEFT would find none of the keys, and say nothing.
        return {"format": "kohya", "base_model_name_or_path": base_name or None, "r": plan.written_rank}
    causal = any("ForCausalLM" in name or "LMHead" in name for name in architectures)
    modules = frozenset(map(convolutions.whole_of, layout.modules - layout.parameters.keys()))
    parameters = sorted(set(layout.parameters.values()))
    # PEFT and vLLM read a key as a regular expression for the end of a module's name; from `^` on it is the whole of it.
    pattern = {f"^{re.escape(module)}": rank for module, rank in layout.ranks.items()}
    if experts.GATE_UP in parameters:  # two pairs in one, a block each
        pattern[rf".*\.{re.escape(experts.GATE_UP)}"] = 2 * plan.written_rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if causal else None,
        "base_model_name_or_path": base_name or None,
        "inference_mode": True,
        "r": plan.written_rank,
        "lora_alpha": plan.written_rank,
        "lora_dropout": 0.0,
        "bias": "none",
        **({"lora_bias": True} if layout.biases else {}),
        "fan_in_fan_out": layout.fan_in_fan_out,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": list(layout.whole) or None,
        "target_modules": targets.target_modules(modules, [*plan.modules, *layout.modules]),
        **({"target_parameters": parameters} if parameters else {}),
    }


def base_name_from(config: Mapping[str, Any]) -> str:
    """The base's hub id from `_name_or_path`, where that is one and not a path."""
    name = str(config.get("_name_or_path") or "")
    return name if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) else ""
