"""Manifests of adapters that nobody extracted: as many as a test wants, of any shape."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from phlora_pipeline import manifest
from phlora_pipeline.manifest import ENERGY_RANKS, EnergyRow

PROJECTIONS = {
    "self_attn.q_proj": ("attention", 64, 64),
    "self_attn.k_proj": ("attention", 32, 64),
    "mlp.up_proj": ("mlp", 160, 64),
}


def adapted(module: str, kind: str, shape: tuple[int, ...], decay: float, *, rank: int = 8, most: int = 24, rest: float = 0.1, **others: Any) -> EnergyRow:  # fmt: skip
    """σ_i = i^−decay, `most` of them known, and an energy of `rest` beyond these."""
    values = tuple(i**-decay for i in range(1, most + 1))
    total = math.fsum(value * value for value in values) + rest

    def kept(r: int) -> float | None:
        return math.fsum(value * value for value in values[:r]) / total if r <= most else None

    told = {
        "rank": rank, "delta_norm": math.sqrt(total), "relative_change": 0.01, "cosine": 0.999, "preserved_energy": kept(rank),
        "written_energy": kept(rank), "singular_values": values, "energy_at": {r: kept(r) for r in ENERGY_RANKS}, "solver": "exact", "certificate": 3e-7,
    }  # fmt: skip
    return EnergyRow(
        "ab" * 16, f"{module}.weight", module, kind, shape, "BF16", "BF16", "adapted", **{**told, **others}
    )


def rows(*, layers: int = 2, decay: float = 0.5, **others: Any) -> list[EnergyRow]:
    """A small decoder: its projections adapted, its norms left out."""
    found = []
    for layer in range(layers):
        for number, (name, (kind, d, k)) in enumerate(PROJECTIONS.items()):
            found.append(adapted(f"model.layers.{layer}.{name}", kind, (d, k), decay + 0.1 * number, **others))
        norm = f"model.layers.{layer}.input_layernorm"
        reason = "a norm has no low-rank form"
        found.append(EnergyRow("ab" * 16, f"{norm}.weight", norm, "norm", (64,), "BF16", "BF16", "skipped", reason, delta_norm=0.02, relative_change=0.003))  # fmt: skip
    return found


def write(path: Path, found: list[EnergyRow], model: str = "", base: str = "llama-8b") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(manifest.to_parquet(found, model=model, base=base if model else ""))
    return path


def zoo(out: Path, models: int, **others: Any) -> Path:
    """The dataset of a zoo, without its adapters."""
    for number in range(models):
        place = (
            out / "_manifest" / f"base=llama-{number % 3}b" / f"model=team--bot-{number:03d}" / f"{number:032x}.parquet"
        )
        write(place, rows(decay=0.3 + 0.9 * (number * 7 % models) / models, **others))
    return out
