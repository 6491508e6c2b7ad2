"""Checkpoints: the same tensors from one file and from shards, bit for bit, and never those of another content."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import save_file

from phlora_pipeline.checkpoint import INDEX, open_checkpoint, open_file, read_tensors
from phlora_pipeline.errors import CheckpointError, NotFoundError, SourceChangedError
from phlora_pipeline.storage import ByteRange, verbs
from phlora_pipeline.storage.local import LocalStore
from tests import toys

_FIRST_READ = 256 << 10


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    """All there is to a tensor: NaN payloads and negative zeros too."""
    return tensor.dtype, tuple(tensor.shape), tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def read_all(url: str | Path) -> dict[str, torch.Tensor]:
    opened = open_checkpoint(str(url))
    return dict(zip(opened.tensors, read_tensors(list(opened.tensors.values())), strict=True))


def same(left: Mapping[str, torch.Tensor], right: Mapping[str, torch.Tensor]) -> bool:
    return {name: bits(value) for name, value in left.items()} == {name: bits(value) for name, value in right.items()}


def every_dtype() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(5, 7, generator=generator)
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 1e-45, 3.4e38])
    return {
        "bf16": random.bfloat16(), "f16": random.half(), "f32": random, "f64": random.double(), "odd": odd,
        "i64": torch.tensor([-(2**63), 2**63 - 1]), "i32": torch.tensor([-(2**31)], dtype=torch.int32),
        "i16": torch.tensor([-1], dtype=torch.int16), "i8": torch.tensor([-128], dtype=torch.int8),
        "u8": torch.arange(256).to(torch.uint8), "bool": random > 0,
        "f8_e4m3": random.to(torch.float8_e4m3fn), "f8_e5m2": random.to(torch.float8_e5m2),
        "scalar": torch.tensor(1.5), "scalar_half": torch.tensor(1.5).half(),
        "empty": torch.empty(0), "empty_matrix": torch.empty(3, 0, 2), "conv": torch.randn(2, 3, 1, 4, generator=generator),
    }  # fmt: skip


def test_every_dtype_and_shape_is_read_bit_for_bit(tmp_path: Path) -> None:
    tensors = every_dtype()
    assert same(read_all(toys.save(tmp_path / "m", tensors)), tensors)


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_are_one_checkpoint(tmp_path: Path, shards: int) -> None:
    tensors = every_dtype()
    assert same(read_all(toys.save(tmp_path / "m", tensors, shards=shards)), tensors)


def test_one_file_is_a_checkpoint_under_any_name(tmp_path: Path) -> None:
    tensors = toys.llama_tensors()
    folder = toys.save(tmp_path / "m", tensors)
    file = shutil.copy(folder / "model.safetensors", tmp_path / "weights of mine.safetensors")
    assert same(read_all(file), tensors)
    assert same(read_all(f"file://{file}"), tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_lora_not.safetensors")
    assert same(read_all(folder), tensors)


def test_another_store_gives_the_same_tensors(tmp_path: Path) -> None:
    tensors = every_dtype()
    memory = fsspec.filesystem("memory")
    verbs._store.cache_clear()
    memory.put(str(toys.save(tmp_path / "m", tensors, shards=3)), "/zoo/m", recursive=True)
    try:
        assert same(read_all("memory://zoo/m"), tensors)
    finally:
        memory.store.clear()


def test_what_the_headers_say(tmp_path: Path) -> None:
    opened = open_checkpoint(
        str(toys.save(tmp_path / "m", {"a": torch.ones(2, 3).half(), "b": torch.ones(4)}, shards=2))
    )
    assert opened.model_type == "llama"
    assert opened.nbytes == 12 + 16
    ref = opened.tensors["a"]
    assert (ref.name, ref.dtype, ref.shape, ref.nbytes) == ("a", "F16", (2, 3), 12)
    assert ref.url.endswith("model-00001-of-00002.safetensors")


def test_without_a_config_there_is_no_model_type(tmp_path: Path) -> None:
    folder = toys.save(tmp_path / "m", {"a": torch.ones(2)})
    (folder / "config.json").unlink()
    assert open_checkpoint(str(folder)).model_type == ""


def test_the_index_decides_which_copy_counts(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.ones(2)}, tmp_path / "one.safetensors")
    save_file({"a": torch.full((2,), 7.0)}, tmp_path / "two.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "two.safetensors", "b": "one.safetensors"}}))
    assert read_all(tmp_path)["a"].tolist() == [7, 7]


def test_opening_reads_no_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = toys.save(tmp_path / "m", {"big": torch.zeros(1 << 22), "b": torch.zeros(1 << 22)}, shards=2)
    read: list[int] = []

    def counted(store: LocalStore, piece: ByteRange) -> None:
        read.append(len(piece.into))
        real(store, piece)

    real = LocalStore.read_into
    monkeypatch.setattr(LocalStore, "read_into", counted)
    opened = open_checkpoint(str(folder))
    assert sum(read) < 2 * _FIRST_READ + 10_000
    read.clear()
    read_tensors([opened.tensors["b"]])
    assert sum(read) == opened.tensors["b"].nbytes


@pytest.mark.parametrize(
    "length", [_FIRST_READ - 9, _FIRST_READ - 8, _FIRST_READ - 7, _FIRST_READ, 5 * _FIRST_READ + 3]
)
def test_a_header_longer_than_the_first_read_is_whole(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]}}).encode().ljust(length)
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"xyz")
    assert bytes(read_all(tmp_path / "m.safetensors")["a"].tolist()) == b"xyz"


def test_a_file_of_any_purpose_has_tensors_and_metadata(tmp_path: Path) -> None:
    save_file({"A": torch.ones(2)}, tmp_path / "part.safetensors", metadata={"who": "me"})
    tensors, metadata = open_file(str(tmp_path / "part.safetensors"))
    assert read_tensors([tensors["A"]])[0].tolist() == [1, 1]
    assert metadata == {"who": "me"}
    with pytest.raises(NotFoundError):
        open_file(str(tmp_path / "absent.safetensors"))


def replace(path: Path) -> None:
    tensors = {name: value + 1 for name, value in toys.llama_tensors().items()}
    save_file(tensors, path.with_name("new"), metadata={"format": "pt"})
    path.with_name("new").replace(path)


def edit(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\0\0\0\0")


@pytest.mark.parametrize("change", [replace, edit], ids=["replaced", "edited"])
def test_tensors_of_another_content_are_never_returned(tmp_path: Path, change: Callable[[Path], None]) -> None:
    file = toys.save(tmp_path / "m", toys.llama_tensors()) / "model.safetensors"
    os.utime(file, (0, 0))
    opened = open_checkpoint(str(tmp_path / "m"))
    change(file)
    with pytest.raises(SourceChangedError):
        read_tensors(list(opened.tensors.values()))


def test_a_fingerprint_is_the_contents_not_the_places(tmp_path: Path) -> None:
    folder = toys.save(tmp_path / "m", toys.llama_tensors(), shards=2)
    before = open_checkpoint(str(folder)).fingerprint
    assert open_checkpoint(str(folder)).fingerprint == before
    folder.rename(tmp_path / "moved")
    assert open_checkpoint(str(tmp_path / "moved")).fingerprint == before
    shard = tmp_path / "moved" / "model-00002-of-00002.safetensors"
    os.utime(shard, (0, 0))  # as far as can be told without reading, it may be another one
    assert open_checkpoint(str(tmp_path / "moved")).fingerprint != before


def test_a_forgotten_checksum_file_does_not_vouch_for_new_weights(tmp_path: Path) -> None:
    """Retrained in place, with the same headers: parts of the old weights must not pass for the new ones'."""
    tensors = toys.llama_tensors()
    folder = toys.save(tmp_path / "m", tensors)
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (folder / "SHA256SUMS").write_text(f"{digest}  model.safetensors\n")
    before = open_checkpoint(str(folder)).fingerprint
    toys.save(folder, {name: value + 1 for name, value in tensors.items()})
    assert open_checkpoint(str(folder)).fingerprint != before


def test_the_config_beside_a_single_file_counts(tmp_path: Path) -> None:
    folder = toys.save(tmp_path / "m", toys.llama_tensors())
    assert open_checkpoint(str(folder / "model.safetensors")).model_type == "llama"


def test_a_stale_single_file_beside_an_index_is_not_guessed_about(tmp_path: Path) -> None:
    """Loaders disagree here: transformers takes the single file, vLLM the index's shards."""
    folder = toys.save(tmp_path / "m", toys.llama_tensors(), shards=2)
    toys.save(folder, toys.llama_tensors())
    with pytest.raises(CheckpointError, match="which of the two is stale"):
        open_checkpoint(str(folder))
    assert same(read_all(folder / "model.safetensors"), toys.llama_tensors())
