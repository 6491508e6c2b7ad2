"""What an adapter keeps whole beside its factors, and where PEFT has a place for it: norms, biases, grown embeddings. Pure.

A LoRA has no form for them, and though their share of ‖ΔW‖² is small they may be what a fine-tune lives by. PEFT has two
places. A bias beside an adapted weight becomes the bias of its `lora_B` (`lora_bias`), which holds the difference. The
rest goes to `modules_to_save`, which keeps whole modules, each instead of the base's: so a module can be kept whose tensors
are all its own, and not one that has others inside. vLLM, SGLang and llama.cpp refuse both, or drop them.

Sources: PEFT 0.21.2, tuners/lora/layer.py (`lora_bias`: not for embeddings, nor for `ParamWrapper`, which carries experts)
and utils/other.py (`ModulesToSaveWrapper`: found by the end of a name, its whole state dict is read).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from phlora_pipeline.targets import Kind

Carry = Literal["none", "all"]
How = Literal["bias", "module"]

BESIDE_BIASES = "kept whole: in modules_to_save, since PEFT's lora_bias does not go with a LoRA on an embedding"
OTHER_ROWS = "kept whole: in modules_to_save, with the fine-tune's rows, which are not as many as the base's"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor is kept.

    Attributes:
        how: `bias` of the module's LoRA, or with all of its `module`.
        module: which.
    """

    how: How
    module: str

    @property
    def words(self) -> str:
        """For the manifest."""
        return "kept whole: the bias of its LoRA" if self.how == "bias" else "kept whole: in modules_to_save"


def places(
    wanted: Mapping[str, Kind], names: Iterable[str], adapted: Mapping[str, Kind]
) -> tuple[dict[str, Place], dict[str, str]]:
    """A place for each tensor that is wanted whole, or the reason why PEFT has none.

    Args:
        wanted: tensor → kind.
        names: all tensors of the checkpoint.
        adapted: module → kind, of those that carry factors.

    Returns:
        Tensor → place, and tensor → reason.
    """
    containers = {parent for name in names for parent in _ancestors(_module(name))}
    experts = bool({"expert", "router"} & set(adapted.values()))
    found: dict[str, Place] = {}
    without: dict[str, str] = {}
    for name, kind in wanted.items():
        module, _, leaf = name.rpartition(".")
        if module in adapted and leaf == "bias" and not experts:
            found[name] = Place("bias", module)
        elif module in adapted:
            why = "PEFT's lora_bias does not go with a LoRA on experts" if experts else "beside an adapted weight"
            without[name] = f"PEFT has no place for this {kind}: {why}"
        elif not module or module in containers:
            without[name] = f"PEFT has no place for this {kind}: it saves whole modules, and this one has others inside"
        else:
            found[name] = Place("module", module)
    return found, without


def has_biases(names: Iterable[str], adapted: Iterable[str]) -> bool:
    """Whether any adapted module has a bias."""
    there = set(names)
    return any(f"{module}.bias" in there for module in adapted)


def kept_modules(changed: Iterable[str], found: Mapping[str, Place], names: Iterable[str]) -> list[str]:
    """Modules that are kept whole because one of their tensors changed, and those that PEFT would take for one of them.

    PEFT looks for names that *end* as one of these does, with no regard for components: `norm` finds `layers.0.layernorm`.
    What is found must be in the file, so it is kept as well: it is what the fine-tune has, changed or not.
    """
    chosen = {place.module for name, place in found.items() if place.how == "module" and name in set(changed)}
    modules = {_module(name) for name in names}
    return sorted(module for module in modules if any(module.endswith(ending) for ending in chosen))


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _ancestors(module: str) -> Iterable[str]:
    while module := module.rpartition(".")[0]:
        yield module
