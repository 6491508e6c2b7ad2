"""Read side: a checkpoint is a folder (or one file) of safetensors, known by its headers; tensors come by ranged reads.

Opening reads listings, `config.json`, the index and the headers, never a tensor. What comes out, `TensorRef`, says
where a tensor's bytes are and which content was seen, so that a later read is an error where the object was replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from phlora_pipeline import formats, quantised, safetensors_format, storage
from phlora_pipeline.errors import CheckpointError, IncompleteError, NotFoundError, one_line, quoted
from phlora_pipeline.quantised import UnfitScaleError
from phlora_pipeline.safetensors_format import Header
from phlora_pipeline.storage import ByteRange, ObjectInfo
from phlora_pipeline.tensors import TORCH_DTYPES, Scale, TensorRef, read_tensors, room_for

__all__ = [
    "INDEX",
    "TORCH_DTYPES",
    "Checkpoint",
    "TensorRef",
    "look",
    "open_checkpoint",
    "open_file",
    "read_tensors",
    "room_for",
]

INDEX = "model.safetensors.index.json"
_PICKLES_INDEX = "pytorch_model.bin.index.json"
_SMALL_FILE = 64 << 20
_FIRST_READ = 256 << 10
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +=-]{0,254}")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        url: the folder or file that was asked for.
        tensors: by name; scales are a part of their weights.
        config: `config.json`; empty where there is none.
        fingerprint: sha256 (hex) of what identifies its bytes; the URL has no part in it.
        listed: what `look` said of it when it was opened.
        matched: where its tensors go by another checkpoint's names, how these differ from its own, in words.
    """

    url: str
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] = field(repr=False)
    fingerprint: str
    listed: str = ""
    matched: str = ""

    @property
    def model_type(self) -> str:
        """`model_type` of `config.json`, or empty."""
        return str(self.config.get("model_type", ""))

    @property
    def architectures(self) -> tuple[str, ...]:
        """`architectures` of `config.json`: names of model classes."""
        return tuple(str(name) for name in self.config.get("architectures") or ())

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as stored."""
        return sum(ref.nbytes for ref in self.tensors.values())


def open_checkpoint(url: str) -> Checkpoint:
    """Open a folder with `model.safetensors`, or an index and its shards, or one `.safetensors` file.

    Raises:
        NotFoundError: nothing is there.
        IncompleteError: a shard that the index names is missing, or shorter than its header says.
        CheckpointError: what is there is not a checkpoint; pickles are refused unread.
    """
    url = storage.normalize(url)
    files = {storage.basename(info.url): info for info in storage.list_folder(url)}
    if not files:
        single = storage.stat(url)
        if single is None:
            raise NotFoundError(
                f"there is no checkpoint at {url}",
                remedy="give a folder with config.json and *.safetensors, or one .safetensors file",
            )
        if _PICKLE.match(url):
            raise _pickled(url)
        name = storage.basename(url)
        listed = _listed({name: single}, [name])
        # The model's config lies beside its file; ties and orientations are read there.
        config = storage.stat(storage.join(url.rpartition("/")[0], "config.json"))
        files = {name: single} | ({"config.json": config} if config else {})
        return _assemble(url, files, [name], {}, listed)
    if "adapter_config.json" in files:
        raise CheckpointError(
            f"{url} is a LoRA adapter, not a checkpoint",
            remedy="give the full fine-tuned weights; an adapter is already what this command makes",
        )
    weight_map = _read_index(url, files)
    shards = sorted(set(weight_map.values())) if weight_map else [_single_file(url, files)]
    return _assemble(url, files, shards, weight_map, _listed(files, shards))


def look(url: str) -> str:
    """A fingerprint from the listing and the index alone: another one wherever the weights or the config are others.

    It is not `Checkpoint.fingerprint`, which knows the headers; it is what tells cheaply whether anything is new.

    Raises:
        IncompleteError: a shard that the index names is missing.
        NotFoundError, CheckpointError: as `open_checkpoint`.
    """
    url = storage.normalize(url)
    files = {storage.basename(info.url): info for info in storage.list_folder(url)}
    if not files:
        single = storage.stat(url)
        if single is None:
            raise NotFoundError(f"there is no checkpoint at {url}", remedy="see whether it was moved or removed")
        files = {storage.basename(url): single}
    weight_map = _read_index(url, files)
    shards = set(weight_map.values()) if weight_map else {_single_file(url, files)}
    return _listed(files, shards)


def _listed(files: Mapping[str, ObjectInfo], shards: Iterable[str]) -> str:
    seen = [files[name] for name in sorted({*shards} | ({INDEX, "config.json"} & files.keys()))]
    lines = [f"{storage.basename(info.url)} {info.etag} {info.size}" for info in seen]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def open_file(url: str) -> tuple[dict[str, TensorRef], Mapping[str, str]]:
    """One safetensors file of any purpose: its tensors by name, and its metadata.

    Raises:
        NotFoundError: it is not there.
        CheckpointError: it is not a valid safetensors file.
    """
    info = storage.stat(url)
    if info is None:
        raise NotFoundError(f"{url} is not there", remedy="check the path, or write it again")
    header, _ = _read_header(info)
    return {ref.name: ref for ref in _refs(info, header)}, header.metadata


def _single_file(url: str, files: Mapping[str, ObjectInfo]) -> str:
    found = [name for name in files if name.endswith(".safetensors")]
    if "model.safetensors" in found:
        return "model.safetensors"
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(
            f"{url} holds {len(found)} .safetensors files and no {INDEX} that says which belong together",
            remedy="name one file, or add the index",
        )
    pickles = sorted(name for name in files if _PICKLE.match(name))
    if pickles:
        # Of shards none is a checkpoint: the folder is what can be converted.
        raise _pickled(storage.join(url, pickles[0]), url if _PICKLES_INDEX in files else "")
    raise CheckpointError(
        f"{url} is not a checkpoint: it holds no .safetensors file",
        remedy="give a folder with config.json and *.safetensors",
    )


def _pickled(url: str, folder: str = "") -> CheckpointError:
    return CheckpointError(
        f"{url} is a pickle; it is never unpickled here, since that can run any code",
        remedy=f"convert {'all shards' if folder else 'it'} once, in a process of its own: phlora convert {folder or url} OUT",
    )


def _read_index(url: str, files: Mapping[str, ObjectInfo]) -> dict[str, str]:
    """`weight_map`, each shard name confined to this folder; empty where there is no index."""
    if INDEX not in files:
        return {}
    weight_map = _read_json(files[INDEX], _no_duplicates).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{files[INDEX].url} has no weight_map", remedy="download or write it again")
    if len(weight_map) > safetensors_format.MAX_TENSORS:
        raise CheckpointError(
            f"{files[INDEX].url} lists {len(weight_map)} tensors; at most {safetensors_format.MAX_TENSORS} are accepted",
            remedy="do not use this checkpoint before you know who wrote it",
        )
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not _SAFE_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{files[INDEX].url} sends {quoted(tensor)} to {quoted(shard)}, which is not a plain file name in its own folder",
                remedy="do not use this checkpoint before you know who wrote it",
            )
        if shard not in files:
            raise IncompleteError(
                f"{storage.join(url, shard)} is missing: {INDEX} places {quoted(tensor)} there",
                remedy="wait for the upload to finish, or fetch the shard",
            )
    if "model.safetensors" in files and "model.safetensors" not in weight_map.values():
        raise CheckpointError(
            f"{url} holds model.safetensors as well as {INDEX} with other shards: which of the two is stale?",
            remedy="remove the stale one, or name the file itself",
        )
    return weight_map


def _assemble(
    url: str, files: Mapping[str, ObjectInfo], shards: Sequence[str], weight_map: Mapping[str, str], listed: str
) -> Checkpoint:
    tensors: dict[str, TensorRef] = {}
    digests: dict[str, str] = {}
    for shard in shards:
        header, digests[shard] = _read_header(files[shard])
        for ref in _refs(files[shard], header):
            if weight_map.get(ref.name, shard) != shard:
                continue  # the index says that another shard's copy counts
            if ref.name in tensors:
                raise CheckpointError(
                    f"{url} holds {quoted(ref.name)} in two shards: {tensors[ref.name].url} and {ref.url}",
                    remedy="remove the stale shard or the stale index",
                )
            tensors[ref.name] = ref
    for name, shard in weight_map.items():
        if name not in tensors:
            raise CheckpointError(
                f"{storage.join(url, shard)} has no {quoted(name)}, though {INDEX} places it there",
                remedy="fetch the shard and the index from the same version",
            )
    config = _read_config(files["config.json"]) if "config.json" in files else {}
    tensors = _with_scales(url, tensors, config)
    return Checkpoint(url, tensors, config, _fingerprint(files, shards, digests, tensors), listed)


def _with_scales(url: str, tensors: dict[str, TensorRef], config: Mapping[str, Any]) -> dict[str, TensorRef]:
    """The weights, with the scales as parts of those that they belong to.

    Raises:
        CheckpointError: they are stored in a format that is not read, or the scales do not fit.
    """
    if (refused := formats.refusal(tensors, config)) is not None:
        raise CheckpointError(f"{url} is quantised as {refused.format}: {refused.seen}", remedy=refused.remedy)
    try:
        scales = quantised.find_scales(tensors, config)
    except UnfitScaleError as error:
        raise CheckpointError(
            f"{url}: {error}", remedy="fetch or write it again, whole and with its config.json"
        ) from error
    if not scales:
        return tensors
    dropped = {scaling.name for scaling in scales.values()} | quantised.activation_scales(tensors)
    scaled = {
        name: replace(tensors[name], scale=Scale(tensors[scaling.name], scaling, tensors[name].shape or (1,)))
        for name, scaling in scales.items()
    }
    return {name: scaled.get(name, ref) for name, ref in tensors.items() if name not in dropped}


def _read_header(info: ObjectInfo) -> tuple[Header, str]:
    """A file's header, and its digest."""
    prefix = _read(info, 0, min(info.size, _FIRST_READ))
    length = safetensors_format.header_length(prefix, info.size, info.url)
    header = prefix[8 : 8 + length]
    if len(header) < length:
        header += _read(info, len(prefix), 8 + length)
    return safetensors_format.parse_header(header, info.size, info.url), hashlib.sha256(header).hexdigest()


def _refs(info: ObjectInfo, header: Header) -> list[TensorRef]:
    return [
        TensorRef(name, entry.dtype, entry.shape, info.url, entry.start, entry.stop, info.etag)
        for name, entry in header.entries.items()
    ]


def _read(info: ObjectInfo, start: int, stop: int) -> bytes:
    data = bytearray(stop - start)
    if data:
        storage.read_ranges([ByteRange(info.url, info.etag, start, memoryview(data))])
    return bytes(data)


def _read_config(info: ObjectInfo) -> dict[str, Any]:
    config = _read_json(info)
    architectures = config.get("architectures") or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise CheckpointError(
            f"{info.url} has architectures that are not a list of names", remedy="download or write it again"
        )
    return config


def _read_json(info: ObjectInfo, build: Callable[[list[tuple[str, Any]]], dict[str, Any]] = dict) -> dict[str, Any]:
    try:
        document = json.loads(storage.read_object(info, limit=_SMALL_FILE), object_pairs_hook=build)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{info.url} is not JSON: {one_line(error)}", remedy="download or write it again"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{info.url} is not a JSON object", remedy="download or write it again")
    return document


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    built = dict(pairs)
    if len(built) != len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{quoted(twice)} is there more than once")
    return built


def _fingerprint(
    files: Mapping[str, ObjectInfo],
    shards: Sequence[str],
    headers: Mapping[str, str],
    tensors: Mapping[str, TensorRef],
) -> str:
    """What identifies a checkpoint's bytes without reading them: each shard's etag and size, with its header's digest.

    And how scales apply, since `config.json` has a say in that. A checksum file beside the shards has none: one that was
    forgotten when the shards were replaced would let parts of the old ones pass for the new.
    """
    lines = [f"{shard} {files[shard].etag} {files[shard].size} {headers[shard]}" for shard in sorted(shards)]
    lines += [f"{name} {list(ref.scale.scaling.block)}" for name, ref in sorted(tensors.items()) if ref.scale]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
