"""The header: byte for byte what the reference library writes, and read back without loss. Refusals: test_malformed."""

from __future__ import annotations

import json
import math

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline.safetensors_format import (
    DTYPE_BITS,
    MAX_TENSORS,
    Entry,
    build_header,
    header_length,
    parse_header,
    tensor_bytes,
)

ONE_DTYPE = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = [
    "model.embed_tokens.weight",
    "b",
    "a",
    'quo"te\\slash',
    "zeilen\numbruch\t\x01",
    "größe",
    "重み",
    "🤗",
    "a.b",
    "",
]

names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
tensor_maps = st.dictionaries(names, st.tuples(st.sampled_from(sorted(DTYPE_BITS)), shapes), max_size=8)


def values(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    raw = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(seed))
    return raw.to(torch.float32).to(dtype)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"ключ": 'wert "\n'}], ids=["none", "pt", "odd"])
@pytest.mark.parametrize("dtype", ONE_DTYPE)
def test_bytes_are_those_of_the_reference_library(dtype: str, metadata: dict[str, str]) -> None:
    shapes = [(3, 4), (), (0,), (7,), (2, 0, 3), (1, 1, 1, 2), (5, 3), (2, 2), (1,), (8,)]
    tensors = {
        name: values(ONE_DTYPE[dtype], shape, seed)
        for seed, (name, shape) in enumerate(zip(NAMES, shapes, strict=True))
    }
    ordered = sorted(tensors)  # tensors of one dtype lie by name
    header = build_header({name: (dtype, tuple(tensors[name].shape)) for name in ordered}, metadata)
    expected = safetensors.torch.save(tensors, metadata=metadata or None)
    assert header + b"".join(raw_bytes(tensors[name]) for name in ordered) == expected


@settings(deadline=None)
@given(tensors=tensor_maps, metadata=st.dictionaries(names, names, max_size=3))
def test_what_is_built_is_parsed(tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> None:
    whole = {
        name: (dtype, shape)
        for name, (dtype, shape) in tensors.items()
        if math.prod(shape) * DTYPE_BITS[dtype] % 8 == 0
    }
    header = build_header(whole, metadata)
    size = len(header) + sum(tensor_bytes(*tensor) for tensor in whole.values())
    assert len(header) % 8 == 0
    assert header_length(header, size, "x") == len(header) - 8
    parsed = parse_header(header[8:], size, "x")
    assert {name: (entry.dtype, entry.shape) for name, entry in parsed.entries.items()} == whole
    assert parsed.metadata == metadata
    spans = sorted((entry.start, entry.stop) for entry in parsed.entries.values())
    assert [start for start, _ in spans] + [size] == [len(header)] + [stop for _, stop in spans]


@settings(deadline=None)
@given(tensors=tensor_maps, metadata=st.dictionaries(names, names, max_size=3))
def test_the_reference_library_reads_what_is_built(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]
) -> None:
    whole = {
        name: (dtype, shape)
        for name, (dtype, shape) in tensors.items()
        if math.prod(shape) * DTYPE_BITS[dtype] % 8 == 0
    }
    data = bytes(sum(tensor_bytes(*tensor) for tensor in whole.values()))
    read = dict(safetensors.deserialize(build_header(whole, metadata) + data))
    assert {name: (entry["dtype"], tuple(entry["shape"])) for name, entry in read.items()} == whole


def test_entries_point_at_their_tensors_bytes() -> None:
    tensors = {
        "half": torch.arange(6, dtype=torch.float16).reshape(2, 3),
        "long": torch.arange(4),
        "bit": torch.tensor([True, False, True]),
        "single": torch.tensor(2.5),
    }
    file = safetensors.torch.save(tensors, metadata={"format": "pt"})
    parsed = parse_header(file[8 : 8 + header_length(file, len(file), "x")], len(file), "x")
    assert {name: file[entry.start : entry.stop] for name, entry in parsed.entries.items()} == {
        name: raw_bytes(tensor) for name, tensor in tensors.items()
    }
    assert parsed.entries["single"] == Entry("F32", (), parsed.entries["single"].start, parsed.entries["single"].stop)


def test_a_header_of_640_bytes_is_not_taken_for_a_pickle() -> None:
    """Its first two bytes, 80 02, are also those of a pickle of protocol 2."""
    text = b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    file = (640).to_bytes(8, "little") + text.ljust(640)
    assert header_length(file, len(file), "x") == 640


def test_the_largest_number_of_tensors_is_accepted() -> None:
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    text = json.dumps({f"t{number}": entry for number in range(MAX_TENSORS)}, separators=(",", ":")).encode()
    assert len(parse_header(text, 8 + len(text), "x").entries) == MAX_TENSORS


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_is_one_that_the_reference_library_knows(dtype: str) -> None:
    header = build_header({"x": (dtype, (8,))}, {})
    [(name, entry)] = safetensors.deserialize(header + bytes(DTYPE_BITS[dtype]))
    assert (name, entry["dtype"]) == ("x", dtype)
