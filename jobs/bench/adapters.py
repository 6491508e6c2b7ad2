"""What adapters on disk keep of an update: read back from their files, ours and others' alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from . import truth

PREFIX = "base_model.model."


def energies(base_folder: Path, tuned_folder: Path, adapters: dict[str, Path]) -> dict[str, Any]:
    """Captured energy of each adapter over the tensors that all of them hold, and where ours falls shortest."""
    factors = {tool: adapter_factors(folder) for tool, folder in adapters.items()}
    common = sorted(set.intersection(*(set(found) for found in factors.values())))
    total, kept, differences = 0.0, dict.fromkeys(adapters, 0.0), []
    with (
        safe_open(base_folder / "model.safetensors", "pt") as base,
        safe_open(tuned_folder / "model.safetensors", "pt") as tuned,
    ):
        for module in common:
            before, after = base.get_tensor(f"{module}.weight"), tuned.get_tensor(f"{module}.weight")
            size = float((after.double() - before.double()).square().sum())
            share = {tool: truth.captured(before, after, *found[module]) for tool, found in factors.items()}
            total += size
            kept = {tool: kept[tool] + size * share[tool] for tool in adapters}
            differences.append((share["ours"] - share.get("mergekit", share["ours"]), module))
    worst, where = min(differences)
    return {
        "tensors": len(common),
        "not_in_both": sorted(set.union(*(set(found) for found in factors.values())) - set(common)),
        "captured": {tool: value / total for tool, value in kept.items()},
        "worst_difference": worst,
        "worst_tensor": where,
    }


def adapter_factors(folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (A (r, k), B (d, r)) such that ΔW ≈ BA in the checkpoint's orientation; an embedding's are stored turned."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as adapter:
        for key in adapter.keys():  # noqa: SIM118  # it is no dictionary
            module, _, kind = key.removeprefix(PREFIX).rpartition(".lora_")
            if kind == "A.weight":
                found[module] = (adapter.get_tensor(key), adapter.get_tensor(key.replace(".lora_A", ".lora_B")))
            elif kind == "embedding_A":
                up = adapter.get_tensor(key.replace("embedding_A", "embedding_B"))
                found[module] = (up.mT, adapter.get_tensor(key).mT)
    return found
