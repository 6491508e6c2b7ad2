"""The base as files: its shards as they lie there, and what is beside them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from phlora_pipeline import storage
from phlora_pipeline.checkpoint import INDEX, Checkpoint, TensorRef, open_checkpoint, open_file
from phlora_pipeline.storage import ObjectInfo

CONFIG = "config.json"

_WEIGHTS = re.compile(
    r"\.(safetensors|bin|pt|pth|ckpt|pkl|pickle|h5|msgpack|gguf|onnx|onnx_data|ot|tflite|npz)$|\.(safetensors|bin)\.index\.json$",
    re.IGNORECASE,
)
# Sums of files that will be others, the base's own record of a merge or an extraction, and what hubs keep for themselves.
_OF_THE_BASE = re.compile(r"(^|/)((\.|merge\.json$|README\.md$)|\w*SUMS?(\.\w+)?$)|\.(sha256|sha512|md5)$")


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of weights.

    Attributes:
        name: in its folder.
        info: the object.
        header: its bytes up to the first tensor.
        metadata: the header's `__metadata__`.
        refs: its tensors in the order of their bytes, without those that the index sends to another shard.
    """

    name: str
    info: ObjectInfo
    header: bytes
    metadata: Mapping[str, str]
    refs: tuple[TensorRef, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint and its files.

    Attributes:
        checkpoint: as opened.
        shards: by name.
        index: where it has one.
        config: where it has one.
        beside: name → file, of what is copied as it is: tokenizer, generation_config, templates, code, licence.
        left_out: names of files that would be the base's still: weights in other forms, checksums, the base's card.
    """

    checkpoint: Checkpoint
    shards: tuple[Shard, ...]
    index: ObjectInfo | None
    config: ObjectInfo | None
    beside: Mapping[str, ObjectInfo]
    left_out: tuple[str, ...]


def open_source(url: str) -> Source:
    """Open a checkpoint for copying: headers and listings, no tensor.

    Raises:
        RequestError: as `open_checkpoint`.
    """
    checkpoint = open_checkpoint(url)
    shards = tuple(_shard(checkpoint, place) for place in sorted({ref.url for ref in checkpoint.tensors.values()}))
    if any(
        shard.info.url == checkpoint.url for shard in shards
    ):  # a file, not a folder: its config alone lies beside it
        config = storage.stat(storage.join(checkpoint.url.rpartition("/")[0], CONFIG))
        return Source(checkpoint, shards, None, config, {}, ())
    folder = shards[0].info.url.rpartition("/")[0]
    files = {info.url.removeprefix(f"{folder}/"): info for info in storage.list_tree(checkpoint.url)}
    index, config = files.pop(INDEX, None), files.pop(CONFIG, None)
    for shard in shards:
        del files[shard.name]
    out = {name for name in files if _WEIGHTS.search(name) or _OF_THE_BASE.search(name)}
    # What lies below with weights of its own is another checkpoint, or the same one for another runtime.
    others = {f"{name.rpartition('/')[0]}/" for name in out if "/" in name and _WEIGHTS.search(name)}
    out |= {name for name in files if name.startswith(tuple(others))}
    beside = {name: info for name, info in sorted(files.items()) if name not in out}
    return Source(checkpoint, shards, index, config, beside, tuple(sorted(out)))


def _shard(checkpoint: Checkpoint, url: str) -> Shard:
    refs = sorted((ref for ref in checkpoint.tensors.values() if ref.url == url), key=lambda ref: (ref.start, ref.stop))
    there, metadata = open_file(url)
    start = min(ref.start for ref in there.values())
    header = bytearray(start)
    storage.read_ranges([storage.ByteRange(url, refs[0].etag, 0, memoryview(header))])
    size = max(ref.stop for ref in there.values())
    info = ObjectInfo(url, size, refs[0].etag)
    return Shard(storage.basename(url), info, bytes(header), metadata, tuple(refs))
