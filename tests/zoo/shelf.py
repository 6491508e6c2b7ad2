"""Adapters as a run publishes them, without the mathematics: for tests of what happens to them afterwards."""

from __future__ import annotations

import hashlib
import json

from phlora_pipeline import manifest, storage
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.zoo import layout

MODEL = "support-bot"


def version(number: int) -> str:
    """A version's name: 32 hex digits."""
    return f"{number:032x}"


def moment(number: int) -> str:
    """The nth night, as records tell it."""
    return f"2026-11-{number:02d}T01:00:00.000000+00:00"


def row(name: str, number: int) -> EnergyRow:
    return EnergyRow(
        version(number), name, name, "mlp", (4, 6), "BF16", "BF16", "adapted", rank=2, delta_norm=0.5, preserved_energy=0.75,
        singular_values=(0.5, 0.25), energy_at={8: 1.0, 16: None},
    )  # fmt: skip


def files(number: int, model: str = MODEL, *, weights: bytes | None = None) -> dict[str, bytes]:
    """What an adapter's folder holds, in the order of publication."""
    weights = b"weights of %d " % number * 1000 if weights is None else weights
    run = {
        "version": version(number),
        "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
    }
    return {
        layout.WEIGHTS: weights,
        layout.MANIFEST: manifest.to_parquet([row("a.weight", number)], model=model, base="org/base"),
        layout.CARD: b"# card",
        layout.RUN: json.dumps(run).encode(),
        layout.CONFIG: b"{}",
    }


def publish(out: str, number: int, model: str = MODEL, *, without: tuple[str, ...] = ()) -> str:
    """Put an adapter, or what there is of it before a crash; returns its folder."""
    folder = storage.join(out, model, version(number))
    for name, data in files(number, model).items():
        if name not in without:
            storage.put_new(storage.join(folder, name), data)
    return folder


def names(out: str) -> list[str]:
    """Everything below a URL, relative to it."""
    return [info.url.removeprefix(f"{out}/") for info in storage.list_tree(out)]
