"""What no adapter touches: a checkpoint goes through a merge bit for bit, and half of one is never taken for a whole."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from phlora_pipeline import storage
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.errors import ConflictError, IncompleteError, RequestError, StorageError
from phlora_pipeline.merge import MergeResult, folder, merge, shards
from tests import fp8, toys


class Watcher:
    """An observer that remembers, and can be told to end it."""

    def __init__(self, until: int = 1 << 60) -> None:
        self.until, self.written, self.total = until, 0, 0
        self.warnings: list[str] = []

    def planned(self, shards: int, nbytes: int) -> None:
        self.total = nbytes

    def wrote(self, nbytes: int) -> None:
        self.written += nbytes
        if self.written > self.until:
            raise StorageError("the plug was pulled")

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def merged(base: Path, *adapters: Path | tuple[Path, float], out: Path, **others: object) -> MergeResult:
    weighted = [each if isinstance(each, tuple) else (each, 1.0) for each in adapters]
    settings = {"observer": Watcher(), **others}
    return merge(str(base), [(str(url), weight) for url, weight in weighted], str(out), **settings)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """By name, of all shards."""
    return {
        name: tensor for path in sorted(checkpoint.glob("*.safetensors")) for name, tensor in load_file(path).items()
    }


def contents(checkpoint: Path) -> dict[str, bytes]:
    paths = (path for path in checkpoint.rglob("*") if path.is_file() and path.name != "merge.json")
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in paths}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Three shards of many dtypes, and what else lies in a model's folder."""
    tensors = {name: value.bfloat16() for name, value in toys.llama_tensors(layers=1).items()}
    tensors |= {
        "model.rotary.inv_freq": torch.rand(8),
        "model.scale": torch.tensor(2.5, dtype=torch.float16),
        "model.double": torch.rand(3, 2, dtype=torch.float64),
        "model.position_ids": torch.arange(5),
        "model.mask": torch.tensor([True, False]),
        "model.empty": torch.empty(0, 4),
    }
    folder = toys.save(tmp_path / "base", tensors, shards=3)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["metadata"] = {"total_size": sum(value.nbytes for value in tensors.values()), "origin": "here"}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("tokenizer.json", "generation_config.json", "LICENSE", "1_Pooling/config.json", "model.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"{name}\n")
    return folder


def test_without_adapters_every_byte_is_the_bases(base: Path, tmp_path: Path) -> None:
    watcher = Watcher()
    result = merged(base, out=tmp_path / "out", observer=watcher)
    assert contents(tmp_path / "out") == contents(base)
    assert (result.outcome, result.changed, watcher.written) == ("committed", 0, watcher.total)
    assert result.nbytes == sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())


def test_what_would_still_be_the_bases_is_left_behind_and_told(base: Path, tmp_path: Path) -> None:
    """And folders below with weights of their own: checkpoints of the training, exports for other runtimes."""
    stale = [
        "checkpoint-5/config.json",
        "checkpoint-5/model.safetensors",
        "SHA256SUMS",
        "README.md",
        "pytorch_model.bin",
        "onnx/model.onnx",
        "original/params.pth",
        "weights.sha256",
    ]
    for name in stale:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("of the base")
    watcher = Watcher()
    result = merged(base, out=tmp_path / "out", observer=watcher)
    assert set(result.left_out) == set(stale)
    assert contents(tmp_path / "out").keys() == contents(base).keys() - set(stale)
    assert len(watcher.warnings) == 1
    assert "pytorch_model.bin" in watcher.warnings[0]
    assert (tmp_path / "out" / "1_Pooling" / "config.json").exists()


def test_a_file_alone_is_merged_to_a_folder_with_its_config(base: Path, tmp_path: Path) -> None:
    name = "model-00002-of-00003.safetensors"
    merged(base / name, out=tmp_path / "out")
    assert contents(tmp_path / "out") == {each: (base / each).read_bytes() for each in (name, "config.json")}


def test_what_the_index_places_elsewhere_is_dropped(base: Path, tmp_path: Path) -> None:
    """Two shards have the same name: the one that nobody reads is not carried on."""
    first, second = (base / f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    twice = next(iter(load_file(second)))
    save_file({**load_file(first), twice: torch.zeros(2)}, first, metadata={"format": "pt"})
    merged(base, out=tmp_path / "out")
    assert twice not in load_file(tmp_path / "out" / first.name)
    wanted = tensors_of(base)
    assert all(torch.equal(value, wanted[name]) for name, value in tensors_of(tmp_path / "out").items())
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == open_checkpoint(str(base)).tensors.keys()


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_another_dtype_rounds_what_is_in_floating_point(dtype: str, base: Path, tmp_path: Path) -> None:
    (base / "config.json").write_text(
        json.dumps({**toys.LLAMA, "dtype": "bfloat16", "text": {"torch_dtype": "float32"}})
    )
    merged(base, out=tmp_path / "out", dtype=dtype)
    found, kind = tensors_of(tmp_path / "out"), getattr(torch, dtype)
    for name, value in tensors_of(base).items():
        wanted = value.to(kind) if value.is_floating_point() else value
        assert found[name].dtype == wanted.dtype
        assert torch.equal(found[name], wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**toys.LLAMA, "dtype": dtype, "text": {"torch_dtype": dtype}}
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in found.values()), "origin": "here"}
    for path in (tmp_path / "out").glob("*.safetensors"):
        with safe_open(path, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}


def test_what_overflows_is_refused_and_nothing_stays(tmp_path: Path) -> None:
    tensors = toys.llama_tensors(layers=1)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 1e5
    base = toys.save(tmp_path / "base", tensors, shards=2)
    with pytest.raises(RequestError, match=r"up_proj.weight is not finite in float16: first in row 3") as caught:
        merged(base, out=tmp_path / "out", dtype="float16")
    assert "--dtype bfloat16" in caught.value.remedy
    assert contents(tmp_path / "out") == {}
    assert merged(base, out=tmp_path / "out", dtype="bfloat16").outcome == "committed"


def test_fp8_is_refused_with_a_remedy_that_works(tmp_path: Path) -> None:
    stored, meant = fp8.checkpoint(toys.llama_tensors(layers=1))
    base = toys.save(tmp_path / "base", stored, fp8.config(), shards=2)
    with pytest.raises(RequestError, match="is stored in fp8") as caught:
        merged(base, out=tmp_path / "out")
    assert "--dtype bfloat16" in caught.value.remedy
    assert not (tmp_path / "out").exists()
    merged(base, out=tmp_path / "out", dtype="bfloat16")
    found = tensors_of(tmp_path / "out")
    assert found.keys() == meant.keys()
    assert all(torch.equal(found[name], value.float().bfloat16()) for name, value in meant.items())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert open_checkpoint(str(tmp_path / "out")).tensors.keys() == meant.keys()


class TestInterrupted:
    """Cut after any number of bytes: nothing loads, and the same command ends where it would have."""

    @staticmethod
    def states(base: Path, out: Path) -> Iterator[Path]:
        """The folder after each cut, in steps of a part of the whole."""
        total = merged(base, out=out).nbytes
        for cut in range(0, total, total // 9):
            shutil.rmtree(out)
            with pytest.raises(StorageError, match="plug"):
                merged(base, out=out, observer=Watcher(until=cut))
            yield out

    def test_nothing_that_loads_is_left(self, base: Path, tmp_path: Path) -> None:
        from transformers import AutoConfig

        for out in self.states(base, tmp_path / "out"):
            assert not (out / "config.json").exists()
            with pytest.raises((OSError, ValueError)):
                AutoConfig.from_pretrained(out)
            if len(list(out.glob("*.safetensors"))) < 3:
                with pytest.raises(RequestError):
                    open_checkpoint(str(out))

    def test_a_single_shard_is_not_taken_for_a_checkpoint(self, base: Path, tmp_path: Path) -> None:
        seen = 0
        for out in self.states(base, tmp_path / "out"):
            if len(list(out.glob("*.safetensors"))) == 1:
                seen += 1
                with pytest.raises(IncompleteError, match="is missing"):
                    open_checkpoint(str(out))
        assert seen

    def test_the_same_command_goes_on(self, base: Path, tmp_path: Path) -> None:
        for out in self.states(base, tmp_path / "out"):
            before = {
                path: path.stat().st_mtime_ns
                for path in out.rglob("*")
                if path.is_file() and not path.name.startswith(".")
            }
            (out / ".model-00001-of-00003.safetensors.0123456789ab.tmp").write_bytes(b"of a run that was killed")
            result = merged(base, out=out)
            assert result.outcome == "committed"
            assert result.written_bytes + sum(path.stat().st_size for path in before) == result.nbytes
            assert all(path.stat().st_mtime_ns == time for path, time in before.items())
            assert contents(out) == contents(base)  # and nothing hidden beside it

    def test_what_stands_is_not_written_again(self, base: Path, tmp_path: Path) -> None:
        first, second = (merged(base, out=tmp_path / "out") for _ in range(2))
        assert (second.outcome, second.version, second.written_bytes) == ("exists", first.version, 0)


class TestWhatStandsThere:
    """A folder that is somebody's."""

    @pytest.mark.parametrize("overwrite", [False, True])
    def test_other_files_are_never_touched(self, overwrite: bool, base: Path, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        with pytest.raises(ConflictError, match="is not empty"):
            merged(base, out=tmp_path / "out", overwrite=overwrite)
        assert contents(tmp_path / "out") == {"notes.txt": b"mine"}

    def test_another_merge_is_replaced_if_asked(self, base: Path, tmp_path: Path) -> None:
        merged(base, out=tmp_path / "out", dtype="float32")
        with pytest.raises(ConflictError, match="holds another merge"):
            merged(base, out=tmp_path / "out")
        assert merged(base, out=tmp_path / "out", overwrite=True).outcome == "committed"
        assert contents(tmp_path / "out") == contents(base)

    def test_a_record_is_no_leave_to_delete_elsewhere(self, base: Path, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("mine")
        merged(base, out=tmp_path / "out", dtype="float32")
        record = json.loads((tmp_path / "out" / "merge.json").read_text())
        record["files"] |= {"../mine.txt": 4, str(tmp_path / "mine.txt"): 4}
        (tmp_path / "out" / "merge.json").write_text(json.dumps(record))
        merged(base, out=tmp_path / "out", overwrite=True)
        assert (tmp_path / "mine.txt").read_text() == "mine"

    def test_what_others_put_there_stays(self, base: Path, tmp_path: Path) -> None:
        merged(base, out=tmp_path / "out", dtype="float32")
        (tmp_path / "out" / "notes.txt").write_text("mine")
        merged(base, out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == {**contents(base), "notes.txt": b"mine"}

    def test_a_replaced_base_is_another_merge(self, base: Path, tmp_path: Path) -> None:
        merged(base, out=tmp_path / "out")
        shard = base / "model-00001-of-00003.safetensors"
        shard.write_bytes(shard.read_bytes())
        with pytest.raises(ConflictError, match="replaced since"):
            merged(base, out=tmp_path / "out")

    def test_a_file_of_another_size_is_told(self, base: Path, tmp_path: Path) -> None:
        merged(base, out=tmp_path / "out")
        (tmp_path / "out" / "tokenizer.json").write_text("shorter")
        with pytest.raises(ConflictError, match=r"tokenizer.json has 7 bytes, this merge wrote 15"):
            merged(base, out=tmp_path / "out")
        merged(base, out=tmp_path / "out", overwrite=True)
        assert contents(tmp_path / "out") == contents(base)

    @pytest.mark.parametrize("place", ["base", "base/inside", "."])
    def test_not_into_the_base_nor_around_it(self, place: str, base: Path, tmp_path: Path) -> None:
        before = contents(base)
        with pytest.raises(ConflictError, match="lie in one another"):
            merged(base, out=tmp_path / place)
        assert contents(base) == before
        (tmp_path / "link").symlink_to(base)
        with pytest.raises(ConflictError, match="lie in one another"):
            merged(base, out=tmp_path / "link")


def test_a_base_that_changes_meanwhile_is_noticed(base: Path, tmp_path: Path) -> None:
    """Between the plan and a read: nothing of the replaced shard is written."""

    class Replacing(Watcher):
        def planned(self, shards: int, nbytes: int) -> None:
            shard = base / "model-00003-of-00003.safetensors"
            shard.write_bytes(shard.read_bytes())

    with pytest.raises(Exception, match="no longer what was planned"):
        merged(base, out=tmp_path / "out", observer=Replacing())
    assert not (tmp_path / "out" / "config.json").exists()


def test_copies_are_cut_to_pieces(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a piece, the bytes are the same; none is larger than it."""
    shard = base / "model-00001-of-00003.safetensors"
    monkeypatch.setattr(shards, "_CHUNK", 1000)
    [info] = [info for info in storage.list_folder(str(base)) if info.url == str(shard)]
    pieces = list(shards.copied(info, 0, info.size))
    assert max(map(len, pieces)) == 1000
    assert hashlib.sha256(b"".join(pieces)).digest() == hashlib.sha256(shard.read_bytes()).digest()


def test_what_is_read_ahead_comes_in_order_with_its_errors() -> None:
    def pieces() -> Iterator[bytes]:
        yield from (b"a", b"b", b"c")
        raise StorageError("gone")

    found = shards.ahead(pieces())
    assert [next(found) for _ in range(3)] == [b"a", b"b", b"c"]
    with pytest.raises(StorageError, match="gone"):
        next(found)
    assert list(shards.ahead(iter(()))) == []


def test_a_base_behind_fsspec(base: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for name, data in contents(base).items():
        memory.pipe(f"/bases/one/{name}", data)
    try:
        merge("memory://bases/one", [], str(tmp_path / "out"))
    finally:
        memory.rm("/bases", recursive=True)
    assert contents(tmp_path / "out") == contents(base)


def test_the_order_is_the_commit() -> None:
    names = ["config.json", "model-2.safetensors", "tokenizer.json", "merge.json", "model.safetensors.index.json"]
    files = [folder.File(name, 0, lambda: iter(()), weights=name.startswith("model-")) for name in names]
    assert [file.name for file in folder.in_order(files)] == [
        "merge.json", "model.safetensors.index.json", "tokenizer.json", "model-2.safetensors", "config.json",
    ]  # fmt: skip
