"""What lies beside the weights: the config, the manifest and the run, and what they promise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from phlora_pipeline import (
    adapter,
    loaders,
    manifest,
    reducer,
    storage,
    targets,
)
from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.targets import Dialect

_SMALL = 64 << 20


def config_of(folder: str) -> dict[str, Any]:
    """`adapter_config.json`.

    Raises:
        RequestError: it is not there, or is not that of a LoRA.
    """
    info = storage.stat(storage.join(folder, adapter.CONFIG))
    if info is None:
        raise NotFoundError(
            f"there is no adapter at {folder}: {adapter.CONFIG} is missing",
            remedy="give the folder that phlora extract wrote",
        )
    try:
        config = json.loads(storage.read_object(info, limit=_SMALL))
    except ValueError as error:
        raise RequestError(f"{info.url} is not JSON: {error}") from error
    if not isinstance(config, dict) or (config.get("peft_type") != "LORA" and config.get("format") != "kohya"):
        raise RequestError(f"{info.url} is not the config of a LoRA adapter")
    return config


def ranks_of(config: Mapping[str, Any], folder: str) -> loaders.Ranks:
    """Each module's rank and scale.

    Raises:
        RequestError: the config gives none, or is of a kind that is not measured.
    """
    if config.get("use_dora"):
        raise RequestError(
            f"{folder} uses use_dora, which verify does not measure",
            remedy="verify adapters as phlora extract writes them",
        )
    if config.get("format") == "kohya":
        return loaders.Ranks(1, 1, {}, {}, rslora=False)  # in the file itself
    try:
        return loaders.Ranks.of(config)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{folder}/{adapter.CONFIG} gives no rank and scale: {error}") from error


def promises_of(folder: str, run: Mapping[str, Any]) -> dict[str, EnergyRow]:
    """Module → its row of the manifest; empty where there is none, and where its energies are shares of another adapter's."""
    if run.get("operation") == "compress":
        return {}
    url = storage.join(folder, reducer.MANIFEST)
    return {row.module: row for row in manifest.read(url)} if storage.stat(url) else {}


def run_of(folder: str) -> dict[str, Any]:
    """`run.json`; empty where there is none."""
    info = storage.stat(storage.join(folder, reducer.RUN))
    return reducer.run_record(info) if info else {}


def dialect_of(run: Mapping[str, Any]) -> Dialect:
    """For whom it was written; where nobody says, for PEFT."""
    named = run.get("settings", {}).get("dialect")
    return named if named in targets.dialects() else "peft"


def digest_problems(folder: str, run: Mapping[str, Any]) -> Iterator[str]:
    """Are these the weights that the run published? Two adapters of one shape look alike to every loader."""
    weights = storage.stat(storage.join(folder, adapter.WEIGHTS))
    promised = run.get("weights", {}).get("sha256")
    if promised and weights and storage.sha256(weights) != promised:
        yield f"{adapter.WEIGHTS} is not the file that {reducer.RUN} tells of"
