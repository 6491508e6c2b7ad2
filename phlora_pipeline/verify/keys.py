"""Whether the file's keys and the config name the same modules, and whether these are the base's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from phlora_pipeline import (
    convolutions,
    experts,
    targets,
)
from phlora_pipeline.checkpoint import Checkpoint
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.verify.pairs import Pair


def key_problems(pairs: Mapping[str, Pair], config: Mapping[str, Any], base: Checkpoint) -> Iterator[str]:
    """Modules without a pair, and pairs without a module, as PEFT matches them."""
    modules = {targets.module_of(name) for name in base.tensors}
    wanted, parameters = config.get("target_modules") or [], config.get("target_parameters") or []
    for module in sorted(pairs):
        fused = experts.GATE_UP in parameters and targets.kind_of(f"{module}.weight", (1, 1)) == "expert"
        named = _matched(convolutions.whole_of(module), wanted) or _matched(experts.parameter_of(module), parameters)
        if not (fused or named):
            yield f"{module} is in the file but not in target_modules: PEFT would drop it without a word"
        if module not in modules and targets.kind_of(f"{module}.weight", (1, 1)) != "lm_head":
            yield f"{module} is no module of the base: loaders would drop it without a word"
    for module in sorted(modules - set(pairs)):
        if _matched(convolutions.whole_of(module), wanted) or _matched(experts.parameter_of(module), parameters):
            yield f"the config names {module}, which has no pair in the file"


def broken_promises(pairs: Mapping[str, Pair], promised: Mapping[str, EnergyRow]) -> Iterator[str]:
    """Pairs that the manifest promises and the file lacks."""
    for module, row in sorted(promised.items()):
        if row.status in {"adapted", "zero_filled"} and module not in pairs:
            yield f"the manifest says {module} is {row.status}, but the file has no pair for it"


def _matched(module: str, wanted: object) -> bool:
    """As PEFT matches: a list by whole-component suffix, a string as a regular expression."""
    if isinstance(wanted, str):
        return wanted == "all-linear" or re.fullmatch(wanted, module) is not None
    return isinstance(wanted, list) and any(module == name or module.endswith(f".{name}") for name in wanted)
