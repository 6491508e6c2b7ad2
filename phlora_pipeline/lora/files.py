"""An adapter as it lies in storage: a PEFT folder, or one `.safetensors` file. Opening reads headers and the config."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from phlora_pipeline import adapter, storage
from phlora_pipeline.checkpoint import TensorRef, open_file
from phlora_pipeline.errors import CheckpointError, NotFoundError, RequestError, one_line
from phlora_pipeline.loaders import Ranks
from phlora_pipeline.lora import refused
from phlora_pipeline.lora.keys import by_kohya, by_peft, is_kohya
from phlora_pipeline.lora.modules import LoraModule, Whole
from phlora_pipeline.storage import ObjectInfo

_SMALL = 64 << 20
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA as its headers and its config describe it.

    Attributes:
        url: the folder or file that was asked for.
        weights: the file.
        config: `adapter_config.json`; empty where there is none.
        modules: by name.
        whole: tensors that take the place of the model's own, by key.
        kohya: whether the keys are kohya's.
        metadata: of the weights' file.
        fingerprint: sha256 (hex) of what identifies its bytes; the URL has no part in it.
    """

    url: str
    weights: str
    config: Mapping[str, Any] = field(repr=False)
    modules: Mapping[str, LoraModule]
    whole: tuple[Whole, ...]
    kohya: bool
    metadata: Mapping[str, str] = field(repr=False)
    fingerprint: str

    @property
    def base_name(self) -> str:
        """What `adapter_config.json` calls the base; empty where it does not."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def rank(self) -> int:
        """The largest of its modules."""
        return max(module.rank for module in self.modules.values())


def open_adapter(url: str) -> Adapter:
    """Open an adapter: a PEFT folder, or a file of kohya's, or a PEFT file with its config beside it.

    Raises:
        NotFoundError: there is none.
        CheckpointError: it is damaged, or no plain low-rank update; says why by name.
    """
    url = storage.normalize(url)
    weights, config = _located(url)
    if config and (why := refused.of_config(config)):
        raise _refusal(url, why)
    tensors, metadata = open_file(weights.url)
    if why := refused.of_keys(tensors):
        raise _refusal(url, why)
    kohya = config.get("format") == "kohya" or (not config and is_kohya(tensors))
    if not kohya and not config:
        raise NotFoundError(
            f"{storage.join(url.rpartition('/')[0], adapter.CONFIG)} is missing, and the scale of {url} with it",
            remedy="put the adapter's config beside its weights, or give its folder",
        )
    found = by_kohya(tensors) if kohya else by_peft(tensors, config, ranks_of(config, url))
    if not found.modules and not found.problems:
        found.problems.append("it holds no pair of factors")
    if found.problems:
        raise CheckpointError(f"{url}: {listed(found.problems)}", remedy="download it, or save it, again")
    return Adapter(
        url,
        weights.url,
        config,
        dict(sorted(found.modules.items())),
        tuple(sorted(found.whole, key=lambda item: item.key)),
        kohya,
        metadata,
        _fingerprint(weights, config, tensors),
    )


def ranks_of(config: Mapping[str, Any], url: str) -> Ranks:
    """Each module's rank and scale.

    Raises:
        CheckpointError: the config gives none.
    """
    try:
        return Ranks.of(config)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{adapter.CONFIG} of {url} gives no rank and scale: {error}", remedy="download it, or save it, again"
        ) from error


def _located(url: str) -> tuple[ObjectInfo, dict[str, Any]]:
    """The weights' file, and the config."""
    files = {storage.basename(info.url): info for info in storage.list_folder(url)}
    if not files:
        weights = storage.stat(url)
        beside = storage.stat(storage.join(url.rpartition("/")[0], adapter.CONFIG))
    else:
        weights, beside = files.get(adapter.WEIGHTS), files.get(adapter.CONFIG)
        alone = [info for name, info in files.items() if name.endswith(".safetensors")]
        if weights is None and beside is None and len(alone) == 1 and "config.json" not in files:
            weights = alone[0]
    if weights is None and "adapter_model.bin" in files:
        raise CheckpointError(
            f"{files['adapter_model.bin'].url} is a pickle; it is never unpickled here, since that can run any code",
            remedy="save the adapter again with safe_serialization=True",
        )
    if weights is None or (
        files and beside is None and storage.basename(weights.url) == adapter.WEIGHTS and not _is_kohya(weights)
    ):
        missing = adapter.CONFIG if weights else adapter.WEIGHTS
        raise NotFoundError(
            f"there is no adapter at {url}: {missing} is missing",
            remedy=f"give a folder with {adapter.CONFIG} and {adapter.WEIGHTS}, or one .safetensors file",
        )
    if storage.basename(weights.url).endswith((".bin", ".pt", ".pth", ".ckpt")):
        raise CheckpointError(
            f"{weights.url} is a pickle; it is never unpickled here, since that can run any code",
            remedy="save the adapter again as safetensors",
        )
    return weights, _read_config(beside) if beside else {}


def _is_kohya(weights: ObjectInfo) -> bool:
    return is_kohya(open_file(weights.url)[0])


def _read_config(info: ObjectInfo) -> dict[str, Any]:
    try:
        config = json.loads(storage.read_object(info, limit=_SMALL))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{info.url} is not JSON: {one_line(error)}", remedy="download or write it again"
        ) from error
    if not isinstance(config, dict) or (not config.get("peft_type") and config.get("format") != "kohya"):
        raise RequestError(f"{info.url} is not the config of an adapter", remedy="give a LoRA adapter's folder")
    return config


def _refusal(url: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{url} is not a plain low-rank update of its base: {why}",
        remedy="merge it by the library that made it, then extract",
    )


def listed(problems: list[str]) -> str:
    """In words: the first few."""
    more = [f"and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
    return "; ".join([*problems[:_SHOWN], *more])


def _fingerprint(weights: ObjectInfo, config: Mapping[str, Any], tensors: Mapping[str, TensorRef]) -> str:
    lines = [f"{weights.etag} {weights.size}", json.dumps(config, sort_keys=True)]
    lines += [f"{name} {ref.dtype} {list(ref.shape)} {ref.start}" for name, ref in sorted(tensors.items())]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
