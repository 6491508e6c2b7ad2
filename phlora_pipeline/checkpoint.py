"""Read side: a checkpoint is a folder (or one file) of safetensors, known by its headers; tensors come by ranged reads.

Opening reads listings, `config.json`, the index and the headers, never a tensor. What comes out, `TensorRef`, says
where a tensor's bytes are and which content was seen, so that a later read is an error where the object was replaced.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch

from phlora_pipeline import safetensors_format, storage
from phlora_pipeline.errors import CheckpointError, IncompleteError, NotFoundError, one_line, quoted
from phlora_pipeline.safetensors_format import Header
from phlora_pipeline.storage import ByteRange, ObjectInfo

INDEX = "model.safetensors.index.json"
_SMALL_FILE = 64 << 20
_FIRST_READ = 256 << 10
_ALIGNMENT = 64
_PICKLE = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle)$", re.IGNORECASE)
_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +=-]{0,254}")

TORCH_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorRef:
    """A weight in a checkpoint: where its bytes are, and of which content of the shard.

    Attributes:
        name: the tensor's name in the checkpoint.
        dtype: safetensors' name, such as `BF16`.
        shape: dimensions.
        url: the shard.
        start, stop: its bytes in the shard.
        etag: of the shard, when the header was read.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    url: str
    start: int
    stop: int
    etag: str

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return self.stop - self.start

    @property
    def matrix(self) -> TensorRef:
        """The same bytes as a matrix: a convolution's kernel (d, k₁, k₂ …) flattened to (d, k₁k₂…)."""
        return replace(self, shape=(self.shape[0], math.prod(self.shape[1:])))

    def rows(self, count: int) -> TensorRef:
        """Its first rows."""
        return replace(self.entries(0, count * math.prod(self.shape[1:])), shape=(count, *self.shape[1:]))

    def entries(self, start: int, stop: int) -> TensorRef:
        """Some of its entries, in row-major order, as a vector; as many as there are up to `stop`."""
        numel = math.prod(self.shape)
        each, stop = self.nbytes // max(numel, 1), min(stop, numel)
        return replace(self, shape=(stop - start,), start=self.start + each * start, stop=self.start + each * stop)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Attributes:
        url: the folder or file that was asked for.
        tensors: by name.
        config: `config.json`; empty where there is none.
        fingerprint: sha256 (hex) of what identifies its bytes; the URL has no part in it.
    """

    url: str
    tensors: Mapping[str, TensorRef]
    config: Mapping[str, Any] = field(repr=False)
    fingerprint: str

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
        files = {storage.basename(url): single}
        # The model's config lies beside its file; ties and orientations are read there.
        config = storage.stat(storage.join(url.rpartition("/")[0], "config.json"))
        if config is not None:
            files["config.json"] = config
        return _assemble(url, files, [storage.basename(url)], {})
    if "adapter_config.json" in files:
        raise CheckpointError(
            f"{url} is a LoRA adapter, not a checkpoint",
            remedy="give the full fine-tuned weights; an adapter is already what this command makes",
        )
    weight_map = _read_index(url, files)
    shards = sorted(set(weight_map.values())) if weight_map else [_single_file(url, files)]
    return _assemble(url, files, shards, weight_map)


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
    seen = [files[name] for name in sorted(shards | ({INDEX, "config.json"} & files.keys()))]
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


def room_for(refs: Iterable[TensorRef]) -> int:
    """Bytes of memory that `read_tensors` fills for these."""
    return sum(_aligned(ref.nbytes) for ref in refs)


def read_tensors(refs: Sequence[TensorRef], memory: memoryview | None = None) -> list[torch.Tensor]:
    """The tensors themselves, on the CPU in their stored dtypes, read in parallel.

    Args:
        refs: which.
        memory: where to, `room_for(refs)` bytes or more, for as long as the tensors are used; None for memory of their own.

    Raises:
        SourceChangedError: a shard is no longer the one whose header was read.
    """
    if memory is None:
        buffers = [memoryview(bytearray(ref.nbytes)) for ref in refs]
    else:
        ends = list(accumulate((_aligned(ref.nbytes) for ref in refs), initial=0))
        buffers = [memory[start : start + ref.nbytes] for start, ref in zip(ends, refs, strict=False)]
    wanted = [
        ByteRange(ref.url, ref.etag, ref.start, buffer) for ref, buffer in zip(refs, buffers, strict=True) if ref.nbytes
    ]
    storage.read_ranges(wanted)
    return [_as_tensor(ref, buffer) for ref, buffer in zip(refs, buffers, strict=True)]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _as_tensor(ref: TensorRef, buffer: memoryview) -> torch.Tensor:
    dtype = TORCH_DTYPES[ref.dtype]
    if not ref.nbytes:
        return torch.empty(ref.shape, dtype=dtype)
    return torch.frombuffer(buffer, dtype=dtype).reshape(ref.shape)


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
    pickles = [name for name in files if _PICKLE.match(name)]
    if pickles:
        raise _pickled(storage.join(url, pickles[0]))
    raise CheckpointError(
        f"{url} is not a checkpoint: it holds no .safetensors file",
        remedy="give a folder with config.json and *.safetensors",
    )


def _pickled(url: str) -> CheckpointError:
    return CheckpointError(
        f"{url} is a pickle; it is never unpickled here, since that can run any code",
        remedy=f"convert it once, in a process of its own: phlora convert {url} OUT",
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
    url: str, files: Mapping[str, ObjectInfo], shards: Sequence[str], weight_map: Mapping[str, str]
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
    return Checkpoint(url, tensors, config, _fingerprint(files, shards, digests))


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


def _fingerprint(files: Mapping[str, ObjectInfo], shards: Sequence[str], headers: Mapping[str, str]) -> str:
    """What identifies a checkpoint's bytes without reading them: each shard's etag and size, with its header's digest.

    A checksum file beside the shards has no say: one that was forgotten when the shards were replaced would let parts of
    the old ones pass for the new.
    """
    lines = [f"{shard} {files[shard].etag} {files[shard].size} {headers[shard]}" for shard in sorted(shards)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
