"""The JSON beside the weights, where the merge makes it another: the index, `config.json`, and the merge's own record."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from phlora_pipeline import storage
from phlora_pipeline.errors import RequestError
from phlora_pipeline.merge.shards import ShardPlan
from phlora_pipeline.storage import ObjectInfo

_SMALL = 64 << 20


def index(info: ObjectInfo, plans: Sequence[ShardPlan]) -> bytes:
    """The base's index with the merged sizes; its own bytes where they are right already."""
    targets = [target for plan in plans for target in plan.targets]
    sizes = {"total_size": sum(target.nbytes for target in targets)}
    data, document = _read(info)
    metadata = dict(document.get("metadata") or {})
    if "total_parameters" in metadata:
        sizes["total_parameters"] = sum(math.prod(target.shape) for target in targets)
    places = {target.ref.name: plan.shard.name for plan in plans for target in plan.targets}
    weight_map = {name: shard for name, shard in document["weight_map"].items() if name in places}
    made = {**document, "metadata": {**metadata, **sizes}, "weight_map": weight_map}
    return data if made == document else text(made)


def config(info: ObjectInfo, dtype: str, resized: tuple[int, int] | None, *, dequantised: bool) -> bytes:
    """The base's `config.json` with the merged dtype and vocabulary; its own bytes where neither is another.

    Args:
        info: the base's file.
        dtype: in torch's name; empty for the base's.
        resized: rows of the vocabulary, in the base and merged; None where they are as many.
        dequantised: whether the base was quantised, which the merged weights are not.

    Raises:
        RequestError: the vocabulary has another size, and the config does not say in a known place how large it is.
    """
    data, document = _read(info)
    made = json.loads(data)
    for part in list(_parts(made)):
        part |= {key: dtype for key in ("dtype", "torch_dtype") if dtype and part.get(key)}
        for key in ("quantization_config", "compression_config"):
            if dequantised:
                part.pop(key, None)
    if resized:
        sizes = [part for part in _parts(made) if part.get("vocab_size") == resized[0]]
        if not sizes:
            raise RequestError(
                f"an adapter has a vocabulary of {resized[1]} rows, the base of {resized[0]}, and no vocab_size in {info.url} says so",
                remedy="resize the base's embeddings first, and save it, or merge without this adapter",
            )
        for part in sizes:
            part["vocab_size"] = resized[1]
    return data if made == document else text(made)


def text(document: Mapping[str, Any]) -> bytes:
    """As hubs show it."""
    return (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode()


def _parts(config: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The config, and those inside it: a multimodal model's language model has one of its own."""
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _parts(value)


def _read(info: ObjectInfo) -> tuple[bytes, dict[str, Any]]:
    data = storage.read_object(info, limit=_SMALL)
    return data, json.loads(data)
