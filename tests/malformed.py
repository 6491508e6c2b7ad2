"""A corpus of inputs that are not checkpoints, each wrong in its own way, with what must be said of it.

`CORPUS` maps a name to a `Case`: how to lay the input out in an empty folder, and a pattern of its error.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

INDEX = "model.safetensors.index.json"
CANARY = "canary-was-here"
"""A file beside the input that a pickle of the corpus makes when it is unpickled."""


class Case(NamedTuple):
    """One input.

    Attributes:
        build: lays it out in an empty folder; may return what is to be opened instead of the folder.
        told: what its error says, as a pattern.
        file: whom its error names.
    """

    build: Callable[[Path], Path | None]
    told: str
    file: str = "model.safetensors"


class Canary:
    """Touches a file where it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CANARY

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def safetensors_file(header: bytes, data: bytes = bytes(4), *, length: int | None = None) -> bytes:
    """A file with this header, of truthful length unless another is given."""
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: object = "U8", shape: object = (4,), offsets: object = (0, 4)) -> bytes:
    """One tensor's entry as JSON."""
    return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets}).encode()


GOOD = entry()


def _file(content: bytes, told: str) -> Case:
    return Case(lambda folder: _write(folder / "model.safetensors", content), told)


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _header(header: bytes, told: str, data: bytes = bytes(4)) -> Case:
    return _file(safetensors_file(header, data), told)


def _tensor(told: str, data: bytes = bytes(4), **fields: object) -> Case:
    return _header(b'{"a":%b}' % entry(**fields), told, data)


HEADERS = {
    "header cut off": _header(b'{"a":', "not JSON"),
    "header is an array": _header(b"[]", r"begins with b'\['"),
    "header is a string": _header(b'"a"', "begins with"),
    "leading space": _header(b' {"a":%b}' % GOOD, r"begins with b' '"),
    "leading newline": _header(b'\n{"a":%b}' % GOOD, "begins with"),
    "leading zero byte": _header(b'\0{"a":%b}' % GOOD, "begins with"),
    "byte order mark": _header(b'\xef\xbb\xbf{"a":%b}' % GOOD, "begins with"),
    "UTF-16": _header('{"a":1}'.encode("utf-16-le"), "not JSON"),
    "trailing zero bytes": _header(b'{"a":%b}\0\0' % GOOD, "not JSON: Extra data"),
    "two objects": _header(b'{"a":%b}{}' % GOOD, "not JSON: Extra data"),
    "single quotes": _header(b"{'a':1}", "not JSON"),
    "trailing comma": _header(b'{"a":%b,}' % GOOD, "not JSON"),
    "comment": _header(b'{"a":%b/**/}' % GOOD, "not JSON"),
    "NaN": _header(b'{"__metadata__":{"x":NaN},"a":%b}' % GOOD, "NaN is not JSON"),
    "infinity": _header(b'{"a":{"dtype":"U8","shape":[Infinity],"data_offsets":[0,4]}}', "Infinity is not JSON"),
    "not UTF-8": _header(b'{"\xff":%b}' % GOOD, "not UTF-8"),
    "overlong UTF-8": _header(b'{"\xc0\x80":%b}' % GOOD, "not UTF-8"),
    "UTF-8 cut in a character": _header(b'{"\xe2\x82":%b}' % GOOD, "not UTF-8"),
    "control character in a name": _header(b'{"a\x01":%b}' % GOOD, "not JSON: Invalid control character"),
    "half a surrogate pair in a name": _header(b'{"\\ud800":%b}' % GOOD, "surrogates not allowed"),
    "half a surrogate pair in metadata": _header(b'{"__metadata__":{"x":"\\uDFFF"},"a":%b}' % GOOD, "surrogates"),
    "nested arrays": _header(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}", "recursion depth"),
    "nested objects": _header(b'{"a":' * 300_000 + b"1" + b"}" * 300_000, "recursion depth"),
    "tensor twice": _header(b'{"a":%b,"a":%b}' % (GOOD, GOOD), "'a' more than once"),
    "tensor twice, spelt differently": _header(b'{"a":%b,"\\u0061":%b}' % (GOOD, GOOD), "'a' more than once"),
    "a million names, one twice": _header(
        b'{%b,"x":0,"x":0}' % b",".join(b'"%d":0' % number for number in range(1_000_000)), "'x' more than once"
    ),
    "field twice": _header(b'{"a":{"dtype":"U8",%b}' % GOOD[1:], "'dtype' more than once"),
    "metadata twice": _header(b'{"__metadata__":{},"__metadata__":{},"a":%b}' % GOOD, "'__metadata__' more than once"),
    "metadata key twice": _header(b'{"__metadata__":{"x":"1","x":"2"},"a":%b}' % GOOD, "'x' more than once"),
    "metadata is a list": _header(b'{"__metadata__":[],"a":%b}' % GOOD, "__metadata__ is not a map"),
    "metadata is null": _header(b'{"__metadata__":null,"a":%b}' % GOOD, "__metadata__ is not a map"),
    "metadata with a number": _header(b'{"__metadata__":{"x":1},"a":%b}' % GOOD, "__metadata__ is not a map"),
    "metadata with a map": _header(b'{"__metadata__":{"x":{}},"a":%b}' % GOOD, "__metadata__ is not a map"),
    "metadata is a tensor": _header(b'{"__metadata__":%b}' % GOOD, "__metadata__ is not a map"),
    "entry is null": _header(b'{"a":null}', "must have dtype, shape and data_offsets"),
    "entry is a list": _header(b'{"a":["U8",[4],[0,4]]}', "must have dtype, shape and data_offsets"),
    "entry is empty": _header(b'{"a":{}}', "must have dtype, shape and data_offsets"),
    "no dtype": _header(b'{"a":{"shape":[4],"data_offsets":[0,4]}}', "must have dtype"),
    "no shape": _header(b'{"a":{"dtype":"U8","data_offsets":[0,4]}}', "must have dtype"),
    "no offsets": _header(b'{"a":{"dtype":"U8","shape":[4]}}', "must have dtype"),
    "extra field": _header(b'{"a":{"strides":[1],%b}' % GOOD[1:], "and nothing else"),
    "misspelt field": _header(b'{"a":{"dtype":"U8","Shape":[4],"data_offsets":[0,4]}}', "must have dtype"),
    "200,001 tensors": _header(
        b"{%b}" % b",".join(b'"%d":0' % number for number in range(200_001)), "200001 tensors; at most 200000"
    ),
}

TENSORS = {
    "dtype unknown": _tensor("unknown dtype 'F33'", dtype="F33"),
    "dtype in lower case": _tensor("unknown dtype 'u8'", dtype="u8"),
    "dtype in torch's spelling": _tensor("unknown dtype 'torch.uint8'", dtype="torch.uint8"),
    "dtype is empty": _tensor("unknown dtype ''", dtype=""),
    "dtype is a number": _tensor("unknown dtype 8", dtype=8),
    "dtype is null": _tensor("unknown dtype None", dtype=None),
    "dtype is a list": _tensor("unknown dtype", dtype=["U8"]),
    "dtype of a megabyte": _tensor("unknown dtype 'XXXX", dtype="X" * (1 << 20)),
    "shape negative": _tensor("impossible shape", shape=[-4]),
    "shape twice negative": _tensor("impossible shape", shape=[-2, -2]),
    "shape minus zero": _header(b'{"a":{"dtype":"U8","shape":[-0],"data_offsets":[0,0]}}', "impossible shape", b""),
    "shape beyond 63 bits": _tensor("impossible shape", shape=[2**63]),
    "shape product beyond 63 bits": _tensor("impossible shape", shape=[2**32, 2**32]),
    "shape product beyond all floats": _tensor("impossible shape", shape=[2**62] * 20),
    "shape overflows before a zero": _tensor("impossible shape", b"", shape=[2**62, 2**62, 0], offsets=[0, 0]),
    "shape of 5,000 digits": _header(
        b'{"a":{"dtype":"U8","shape":[%b],"data_offsets":[0,4]}}' % (b"9" * 5000), "not JSON: Exceeds the limit"
    ),
    "shape a bool": _tensor("impossible shape", shape=[True, 4]),
    "shape a float": _tensor("impossible shape", shape=[4.0]),
    "shape a string": _tensor("impossible shape", shape=["4"]),
    "shape nested": _tensor("impossible shape", shape=[[4]]),
    "shape not a list": _tensor("impossible shape", shape=4),
    "shape null": _tensor("impossible shape", shape=None),
    "offsets negative": _tensor("impossible data_offsets", offsets=[-4, 0]),
    "offsets beyond 64 bits": _tensor("impossible data_offsets", offsets=[0, 2**64 + 4]),
    "offsets wrapping around": _tensor("impossible data_offsets", offsets=[2**64 - 4, 0]),
    "offsets floats": _tensor("impossible data_offsets", offsets=[0.0, 4.0]),
    "offsets bools": _tensor("impossible data_offsets", b"\0", shape=[1], offsets=[False, True]),
    "offsets strings": _tensor("impossible data_offsets", offsets=["0", "4"]),
    "one offset": _tensor("impossible data_offsets", offsets=[4]),
    "three offsets": _tensor("impossible data_offsets", offsets=[0, 4, 4]),
    "offsets null": _tensor("impossible data_offsets", offsets=None),
    "offsets reversed": _tensor("needs 4 bytes, its data_offsets .* span -4", offsets=[4, 0]),
    "offsets too near": _tensor("needs 16 bytes, its data_offsets .* span 4", shape=[4, 4]),
    "offsets too far": _tensor("needs 2 bytes, its data_offsets .* span 4", shape=[2]),
    "offsets beyond the file": _tensor("it is truncated", shape=[2**40], offsets=[0, 2**40]),
    "half a byte": _tensor("needs 1.5 bytes", b"\0", dtype="F4", shape=[3], offsets=[0, 1]),
    "dtype wider than its bytes": _tensor("needs 32 bytes", dtype="F64"),
    "overlap, whole": _header(b'{"a":%b,"b":%b}' % (GOOD, GOOD), "'b' overlaps"),
    "overlap, in part": _header(b'{"a":%b,"b":%b}' % (GOOD, entry(offsets=[2, 6])), "'b' overlaps", bytes(6)),
    "hole at the start": _tensor("'a' leaves a hole", bytes(6), offsets=[2, 6]),
    "hole between": _header(b'{"a":%b,"b":%b}' % (GOOD, entry(offsets=[5, 9])), "'b' leaves a hole", bytes(9)),
    "bytes after the last tensor": _tensor("something follows", bytes(5)),
    "bytes and no tensor": _header(b"{}", "something follows"),
    "last byte missing": _tensor("it is truncated", bytes(3)),
    "all data missing": _tensor("it is truncated", b""),
}

_WHOLE = b'{"a":%b}' % GOOD
LENGTHS = {
    "length 0": _file(safetensors_file(_WHOLE, length=0), "header has 0 bytes"),
    "length 1": _file(safetensors_file(_WHOLE, length=1), "header has 1 bytes"),
    "length one too short": _file(safetensors_file(_WHOLE, length=len(_WHOLE) - 1), "not JSON"),
    "length reaching into the data": _file(safetensors_file(_WHOLE, length=len(_WHOLE) + 2), "not JSON"),
    "length one beyond the file": _file(safetensors_file(_WHOLE, b"", length=len(_WHOLE) + 1), "it is truncated"),
    "length just above the cap": _file(safetensors_file(_WHOLE, length=(16 << 20) + 1), "at most 16777216"),
    "length 2**63": _file(safetensors_file(_WHOLE, length=2**63), "at most 16777216"),
    "length 2**64 - 1": _file(safetensors_file(_WHOLE, length=2**64 - 1), "at most 16777216"),
    "length big-endian": _file(len(_WHOLE).to_bytes(8, "big") + _WHOLE + bytes(4), "at most 16777216"),
    "length and nothing else": _file(struct.pack("<Q", 60), "it is truncated"),
    "a header of spaces": _header(b"{" + b" " * (1 << 20), "not JSON"),
}


def _zip_pickle() -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.ones(3)}, file)
    return file.getvalue()


def _pickled(folder: Path, name: str, protocol: int = 2) -> None:
    (folder / name).write_bytes(pickle.dumps({"a": Canary(folder)}, protocol=protocol))


NOT_WEIGHTS = {
    "HTML": _file(b"<!DOCTYPE html><html><body>404</body></html>", "an HTML page"),
    "HTML without doctype": _file(b"<html><head></head></html>", "an HTML page"),
    "HTML after blank lines": _file(b"\r\n\n  <HTML><body>sign in</body></HTML>", "an HTML page"),
    "Git LFS pointer": _file(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4096\n", "Git LFS pointer"
    ),
    "XML error": _file(b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "an XML document"),
    "XML error, undeclared": _file(b"<Error><Code>AccessDenied</Code></Error>", "an XML document"),
    "JSON error": _file(b'{"error":"Repository not found"}', "not a valid safetensors file"),
    "plain text": _file(b"Entry not found\n", "not a valid safetensors file"),
    "GGUF": _file(b"GGUF\x03\0\0\0" + bytes(100), "a GGUF file"),
    "zip pickle": _file(_zip_pickle(), "a PyTorch pickle"),
    **{f"pickle, protocol {p}": _file(pickle.dumps({"a": [1] * p}, protocol=p), "a pickle") for p in (2, 3, 4, 5)},
    **{f"pickle, protocol {p}": _file(pickle.dumps({"a": [1] * 9}, protocol=p), "not a valid") for p in (0, 1)},
    "empty file": _file(b"", "it has 0 bytes"),
    "3 bytes": _file(b"abc", "it has 3 bytes"),
    "8 zero bytes": _file(bytes(8), "header has 0 bytes"),
    "a megabyte of zeros": _file(bytes(1 << 20), "header has 0 bytes"),
    "gzip": _file(gzip.compress(safetensors_file(_WHOLE)), "at most 16777216"),
    "NumPy": _file(b"\x93NUMPY\x01\x00v\x00{'descr': '<f4'}", "at most 16777216"),
    "HDF5": _file(b"\x89HDF\r\n\x1a\n" + bytes(100), "at most 16777216"),
}


def _sharded(folder: Path, shard: object = "model-1.safetensors", **index: object) -> None:
    """Two tensors in one shard, and an index that places `b` where the case says."""
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, folder / "model-1.safetensors")
    document = {"weight_map": {"a": "model-1.safetensors", "b": shard}} | index
    (folder / INDEX).write_text(json.dumps(document))


def _shard(name: object, told: str = "not a plain file name in its own folder", file: str = INDEX) -> Case:
    return Case(lambda folder: _sharded(folder, name), told, file)


def _index(content: bytes, told: str) -> Case:
    def build(folder: Path) -> None:
        _sharded(folder)
        (folder / INDEX).write_bytes(content)

    return Case(build, told, INDEX)


def _broken_shard(content: bytes, told: str) -> Case:
    def build(folder: Path) -> None:
        _sharded(folder, "model-2.safetensors")
        (folder / "model-2.safetensors").write_bytes(content)

    return Case(build, told, "model-2.safetensors")


def _escape(folder: Path) -> None:
    """The place that a traversal wants exists, and is a good shard."""
    save_file({"b": torch.ones(3)}, folder.parent / "outside.safetensors")
    _sharded(folder, "../outside.safetensors")


def _in_two_shards(folder: Path) -> None:
    save_file({"a": torch.ones(3), "x": torch.ones(3)}, folder / "1.safetensors")
    save_file({"b": torch.ones(3), "x": torch.ones(3)}, folder / "2.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))


def _too_large(folder: Path, name: str) -> None:
    _sharded(folder)
    with (folder / name).open("wb") as file:
        file.truncate((64 << 20) + 1)  # sparse


INDEXES = {
    "shard above the folder": Case(_escape, "not a plain file name in its own folder", INDEX),
    "shard in a subfolder": _shard("sub/model-1.safetensors"),
    "shard with an absolute path": _shard("/etc/passwd"),
    "shard with a URL": _shard("s3://elsewhere/model.safetensors"),
    "shard with a drive": _shard("C:model-1.safetensors"),
    "shard with a backslash": _shard("..\\model-1.safetensors"),
    "shard with a zero byte": _shard("model-1.safetensors\0.txt"),
    "shard with an escaped dot": _shard("%2e%2e%2fmodel-1.safetensors"),
    "shard with a newline": _shard("model-1\n.safetensors"),
    "shard with a turned text": _shard("model-\u202e1.safetensors"),
    "shard is a dot": _shard("."),
    "shard is two dots": _shard(".."),
    "shard is hidden": _shard(".model-1.safetensors"),
    "shard is empty": _shard(""),
    "shard of 300 characters": _shard("x" * 300),
    "shard of a megabyte": _shard("x" * (1 << 20)),
    "shard is a number": _shard(1),
    "shard is null": _shard(None),
    "shard is a list": _shard(["model-1.safetensors"]),
    "shard is missing": _shard("model-2.safetensors", f"is missing: {INDEX} places 'b' there", "model-2.safetensors"),
    "shard is a pickle": _broken_shard(pickle.dumps({"a": 1}, protocol=4), "a pickle"),
    "shard is an LFS pointer": _broken_shard(b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "shard is truncated": _broken_shard(safetensors_file(b'{"b":%b}' % GOOD, bytes(3)), "it is truncated"),
    "shard lacks the tensor": _broken_shard(safetensors_file(b"{}", b""), "has no 'b', though"),
    "tensor in two shards": Case(_in_two_shards, "holds 'x' in two shards", "2.safetensors"),
    "tensor placed twice": _index(
        b'{"weight_map":{"a":"model-1.safetensors","a":"model-1.safetensors"}}', "'a' is there more than once"
    ),
    "no weight_map": _index(b'{"metadata":{}}', "no weight_map"),
    "weight_map is a list": _index(b'{"weight_map":["a"]}', "no weight_map"),
    "weight_map is empty": _index(b'{"weight_map":{}}', "no weight_map"),
    "weight_map is null": _index(b'{"weight_map":null}', "no weight_map"),
    "weight_map of 200,001": Case(
        lambda folder: _sharded(folder, weight_map={str(n): "model-1.safetensors" for n in range(200_001)}),
        "200001 tensors; at most 200000",
        INDEX,
    ),
    "index is an array": _index(b"[]", "not a JSON object"),
    "index is empty": _index(b"", "not JSON"),
    "index is HTML": _index(b"<!doctype html>", "not JSON"),
    "index is not UTF-8": _index(b'{"weight_map":{"\xff":"model-1.safetensors"}}', "not JSON"),
    "index is nested deeply": _index(b"[" * 100_000, "not JSON: maximum recursion depth"),
    "index is above the cap": Case(lambda folder: _too_large(folder, INDEX), "at most 67108864 were expected", INDEX),
}


def _with_config(content: bytes, told: str) -> Case:
    def build(folder: Path) -> None:
        save_file({"a.weight": torch.ones(3, 3)}, folder / "model.safetensors")
        (folder / "config.json").write_bytes(content)

    return Case(build, told, "config.json")


def _single(name: str, content: bytes, told: str) -> Case:
    def build(folder: Path) -> Path:
        _write(folder / name, content)
        return folder / name

    return Case(build, told, name)


def _pickles_only(name: str) -> Case:
    return Case(lambda folder: _pickled(folder, name), "is a pickle; it is never unpickled", name)


def _pickled_shards(folder: Path) -> None:
    names = [f"pytorch_model-{number:05d}-of-00002.bin" for number in (1, 2)]
    for name in names:
        _pickled(folder, name)
    _write(folder / "pytorch_model.bin.index.json", json.dumps({"weight_map": {"a": names[0], "b": names[1]}}).encode())


def _two_files(folder: Path) -> None:
    for name in ("a", "b"):
        save_file({name: torch.ones(3)}, folder / f"{name}.safetensors")


def _stale_index(folder: Path) -> None:
    _sharded(folder)
    save_file({"a": torch.ones(3), "b": torch.ones(3)}, folder / "model.safetensors")


def _adapter(folder: Path) -> None:
    save_file({"base_model.model.a.lora_A.weight": torch.ones(3, 3)}, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')


FOLDERS = {
    "nothing there": Case(lambda folder: folder / "absent", "there is no checkpoint", "absent"),
    "empty folder": Case(lambda _: None, "there is no checkpoint", ""),
    "only a config": Case(lambda folder: _write(folder / "config.json", b"{}"), "no .safetensors file", ""),
    "a folder named like a file": Case(
        lambda folder: (folder / "model.safetensors").mkdir(), "there is no checkpoint", ""
    ),
    "a dangling link": Case(
        lambda folder: (folder / "model.safetensors").symlink_to("absent"), "there is no checkpoint", ""
    ),
    "two files and no index": Case(_two_files, "2 .safetensors files and no", ""),
    "a stale index": Case(_stale_index, "which of the two is stale", ""),
    "a LoRA adapter": Case(_adapter, "is a LoRA adapter", ""),
    "only GGUF": Case(lambda folder: _write(folder / "m.gguf", b"GGUF"), "no .safetensors file", ""),
    **{
        f"only {name}": _pickles_only(name)
        for name in ("pytorch_model.bin", "model.pt", "model.PTH", "last.ckpt", "weights.pkl")
    },
    "shards of pickles": Case(
        _pickled_shards, "is a pickle; it is never unpickled", "pytorch_model-00001-of-00002.bin"
    ),
    "one pickle by name": Case(
        lambda folder: _pickled(folder, "x.bin") or folder / "x.bin", "is a pickle; it is never unpickled", "x.bin"
    ),
    "one text file by name": _single("README.md", b"# A model\n", "not a valid safetensors file"),
    "one config by name": _single("config.json", b'{"model_type": "llama"}', "not a valid safetensors file"),
    "config is not JSON": _with_config(b"{", "not JSON"),
    "config is empty": _with_config(b"", "not JSON"),
    "config is a list": _with_config(b"[]", "not a JSON object"),
    "config is null": _with_config(b"null", "not a JSON object"),
    "config is binary": _with_config(b"\xff\xfe\x00\x01", "not JSON"),
    "config is nested deeply": _with_config(b'{"a":' * 100_000, "not JSON: maximum recursion depth"),
    "config names no list of architectures": _with_config(b'{"architectures": 7}', "not a list of names"),
    "config names architectures by number": _with_config(b'{"architectures": [7]}', "not a list of names"),
    "config is above the cap": Case(
        lambda folder: _too_large(folder, "config.json"), "at most 67108864 were expected", "config.json"
    ),
}

CORPUS: dict[str, Case] = {**HEADERS, **TENSORS, **LENGTHS, **NOT_WEIGHTS, **INDEXES, **FOLDERS}
