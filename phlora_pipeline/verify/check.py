"""One module: the energy that its pair keeps, measured from the written bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from phlora_pipeline import (
    lowrank,
    targets,
)
from phlora_pipeline.checkpoint import Checkpoint, read_tensors
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.verify.pairs import Factors, Pair


@dataclass(frozen=True, slots=True)
class ModuleCheck:
    """One module of the adapter.

    Attributes:
        module: in the base.
        written_energy: 1 − ‖ΔW − s·BA‖²/‖ΔW‖² as measured; None where ΔW = 0.
        promised: what the manifest says; None where it says nothing.
        problem: in words; empty where all is well.
    """

    module: str
    written_energy: float | None
    promised: float | None
    problem: str


def check(
    module: str,
    pair: Pair,
    factors: Factors,
    base: Checkpoint,
    tuned: Checkpoint,
    promised: Mapping[str, EnergyRow],
    scale: float,
    tolerance: float,
    device: torch.device,
) -> tuple[ModuleCheck, float, float]:
    """The check, the energy that the pair keeps, and that of the module's ΔW; a tied output's counts with its input."""
    name = f"{module}.weight"
    repeats = name not in base.tensors
    if repeats:  # a tied output has no tensor of its own: its input has the delta, and the promise
        name = next(
            (
                other
                for other, ref in base.tensors.items()
                if targets.kind_of(other, ref.shape) == "embedding" and ref.shape[:1] == pair.up.shape[:1]
            ),
            name,
        )
    row = promised.get(targets.module_of(name))
    before, after = base.tensors.get(name), tuned.tensors.get(name)
    if before is None or after is None or before.shape[1:] != after.shape[1:] or len(before.shape) < 2:
        return _unmeasured(module, "the checkpoints hold no comparable matrix of this name")
    down, up = (tensor.to(device, torch.float32).flatten(1) for tensor in factors.read(pair))  # (r, in), (out, r)
    if factors.strays(pair):
        return _unmeasured(module, "A has entries beside its groups' own channels, which no grouped kernel can see")
    before, after = before.matrix, after.matrix
    turned = pair.embedding or targets.is_transposed(module, tuned.model_type or base.model_type)
    product = (down.mT, up.mT) if turned else (up, down)
    if (product[0].shape[0], product[1].shape[1]) != before.shape:
        return _unmeasured(
            module, f"the pair {list(down.shape)}, {list(up.shape)} does not fit the weight {list(before.shape)}"
        )
    if row and row.status in {"zero_filled", "failed"}:
        is_zero = not (down.any() and up.any())
        return _unmeasured(module, "" if is_zero else f"the manifest says {row.status}, but the pair is not zero")
    # Of a vocabulary that was grown or shrunk the shared rows; the adapter has a row for each that the base has.
    shared = min(before.shape[0], after.shape[0])
    product = (product[0][:shared], product[1])
    delta = torch.empty((shared, before.shape[1]), dtype=torch.float32, device=device)
    stored = read_tensors([before.rows(shared), after.rows(shared)])
    total = float(lowrank.form_delta(stored[0], stored[1], delta)[2])
    left = float(lowrank.sum_of_squares(delta.addmm_(*product, alpha=-scale)))
    energy = 1 - left / total if total else None
    word = row.written_energy if row else None
    found = ModuleCheck(module, energy, word, _energy_problem(energy, left, word, tolerance))
    return (found, 0.0, 0.0) if repeats else (found, total - left, total)


def _unmeasured(module: str, problem: str) -> tuple[ModuleCheck, float, float]:
    return ModuleCheck(module, None, None, problem), 0.0, 0.0


def _energy_problem(energy: float | None, left: float, promised: float | None, tolerance: float) -> str:
    if energy is None:
        return "" if left == 0 else "the weight did not change, but its pair is not zero"
    if not math.isfinite(energy):
        return "its values are not finite"
    if promised is not None and abs(energy - promised) > tolerance:
        return f"keeps {energy:.6f} of the update's energy, the manifest promises {promised:.6f}"
    if promised is None and energy < -tolerance:
        return f"takes the base further from the fine-tune: energy {energy:.6f}"
    return ""
