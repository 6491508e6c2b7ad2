"""The safetensors header, strictly: parsed and written without allocating what it merely claims.

A file is eight bytes of header length `n` (little-endian), `n` bytes of JSON, and the tensors' bytes. The reference
library accepts duplicate keys (the last one wins, the shape silently changes) and a million empty tensors; a model zoo
meets both by accident or malice, so the parser here is our own. Pure: bytes in, names and offsets out.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from phlora_pipeline.errors import CheckpointError, IncompleteError, one_line, quoted

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 200_000

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_NOT_WEIGHTS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the weights", "fetch the weights: git lfs pull"),
    (b"<!doctype", "an HTML page, not weights", "download it again: an error or login page was saved in its place"),
    (b"<html", "an HTML page, not weights", "download it again: an error or login page was saved in its place"),
    (b"<?xml", "an XML document, not weights", "download it again: a store's error message was saved in its place"),
    (b"<error", "an XML document, not weights", "download it again: a store's error message was saved in its place"),
    (
        b"pk\x03\x04",
        "a PyTorch pickle (zip), not safetensors; it is never unpickled here",
        "convert it: phlora convert IN OUT",
    ),
    *(
        (
            bytes((0x80, protocol)),
            "a pickle, not safetensors; it is never unpickled here",
            "convert it: phlora convert IN OUT",
        )
        for protocol in range(2, 6)
    ),
    (b"gguf", "a GGUF file, not safetensors", "use the checkpoint that it was made from"),
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a header.

    Attributes:
        dtype: safetensors' name, such as `BF16`.
        shape: dimensions.
        start, stop: its bytes, counted from the beginning of the *file*.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Header:
    """What a file says of itself: its tensors by name, and its `__metadata__`."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]


def header_length(prefix: bytes, file_size: int, url: str) -> int:
    """Length of the JSON header, from a file's first bytes.

    Args:
        prefix: the file's first bytes: eight at least, more make for a better message.
        file_size: in bytes.
        url: for messages.

    Raises:
        CheckpointError: this is not the beginning of a safetensors file, or the length cannot be true.
    """
    head = prefix[:64].lstrip().lower()
    # The brace first: a header of 640 bytes begins with the same two bytes as a pickle.
    if prefix[8:9] != b"{":
        for magic, what, remedy in _NOT_WEIGHTS:
            if head.startswith(magic):
                raise CheckpointError(f"{url} is {what}", remedy=remedy)
    if file_size < 8 or len(prefix) < 8:
        raise _cut_short(url, f"it has {file_size} bytes; even an empty one has ten")
    length = int.from_bytes(prefix[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise _broken(url, f"its header claims {length} bytes; at most {MAX_HEADER_BYTES} are accepted")
    if 8 + length > file_size:
        raise _cut_short(url, f"its header claims {length} bytes but the file ends after {file_size}: it is truncated")
    if length < 2:
        raise _broken(url, f"its header has {length} bytes; '{{}}' is the shortest one")
    return length


def parse_header(header: bytes, file_size: int, url: str) -> Header:
    """A header, checked: unique names, known dtypes, and bytes that follow each other to the file's end.

    Args:
        header: the JSON bytes, without the eight of their length.
        file_size: of the whole file, in bytes.
        url: for messages.

    Raises:
        CheckpointError: anything about it is not as the format demands.
    """
    document = _load_json(header, url)
    if len(document) > MAX_TENSORS:
        raise _broken(url, f"it lists {len(document)} tensors; at most {MAX_TENSORS} are accepted")
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _broken(url, "its __metadata__ is not a map from strings to strings")
    data_start = 8 + len(header)
    entries = {name: _entry(name, value, data_start, url) for name, value in document.items()}
    _require_seamless(entries, data_start, file_size, url)
    return Header(entries, metadata)


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """The first bytes of a file that holds `tensors` in the mapping's order: length and padded JSON.

    Args:
        tensors: name → (dtype, shape); the data follow in this order without gaps.
        metadata: goes under `__metadata__`; left out where it is empty.

    Returns:
        Bytes as the reference library writes them: compact JSON, padded with spaces to a multiple of eight.
    """
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        size = tensor_bytes(dtype, shape)
        document[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes that a tensor takes in a file."""
    return math.prod(shape) * DTYPE_BITS[dtype] // 8


def _load_json(header: bytes, url: str) -> dict[str, object]:
    if not header.startswith(b"{"):
        raise _broken(url, f"its header begins with {header[:1]!r}, not with '{{'")
    try:
        document = json.loads(
            header.decode("utf-8"), object_pairs_hook=_unique(url), parse_constant=_no_constants, parse_int=_integer
        )
        if b"\\u" in header:
            json.dumps(document, ensure_ascii=False).encode()  # half a surrogate pair can be spelt, but not written
    except UnicodeDecodeError as error:
        raise _broken(url, f"its header is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise _broken(url, f"its header is not JSON: {one_line(error)}") from error
    if not isinstance(document, dict):
        raise _broken(url, "its header is not a JSON object")
    return document


def _unique(url: str) -> Callable[[list[tuple[str, object]]], dict[str, object]]:
    def build(pairs: list[tuple[str, object]]) -> dict[str, object]:
        built = dict(pairs)
        if len(built) != len(pairs):
            [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
            raise _broken(url, f"its header holds {quoted(twice)} more than once")
        return built

    return build


def _no_constants(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _integer(text: str) -> float:
    return int(text) if text != "-0" else -0.0  # the reference library takes it for a float


def _entry(name: str, value: object, data_start: int, url: str) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _broken(url, f"the entry of {quoted(name)} must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise _broken(url, f"{quoted(name)} has the unknown dtype {quoted(dtype)}")
    if not isinstance(shape, list) or not all(_is_count(size) for size in shape) or not _is_countable(shape):
        raise _broken(url, f"{quoted(name)} has the impossible shape {quoted(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_count(offset) for offset in offsets):
        raise _broken(url, f"{quoted(name)} has the impossible data_offsets {quoted(offsets)}")
    start, stop = offsets
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    if bits % 8 or stop - start != bits // 8:
        raise _broken(
            url,
            f"{quoted(name)} of shape {quoted(shape)} in {dtype} needs {bits / 8:.15g} bytes, its data_offsets {offsets} span {stop - start}",
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + stop)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_countable(shape: list[int]) -> bool:
    """Whether no product on the way exceeds 63 bits: a header can spell a number of a million digits."""
    count = 1
    for size in shape:
        count *= size
        if count >= 2**63:
            return False
    return True


def _require_seamless(entries: Mapping[str, Entry], data_start: int, file_size: int, url: str) -> None:
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != position:
            fault = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _broken(url, f"{quoted(name)} {fault}: it starts at byte {entry.start}, expected {position}")
        position = entry.stop
    if position != file_size:
        told = f"its tensors end at byte {position}, the file at {file_size}"
        if position > file_size:
            raise _cut_short(url, f"{told}: it is truncated")
        raise _broken(url, f"{told}: something follows them")


def _broken(url: str, why: str) -> CheckpointError:
    return CheckpointError(f"{url} is not a valid safetensors file: {why}", remedy="download or write it again")


def _cut_short(url: str, why: str) -> IncompleteError:
    return IncompleteError(
        f"{url} is not a valid safetensors file: {why}", remedy="wait for the upload to finish, or download it again"
    )
