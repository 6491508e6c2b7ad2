"""`phlora merge` as it is typed; killed; and on S3."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from phlora_pipeline.cli.merging import weighted
from phlora_pipeline.errors import StorageError
from phlora_pipeline.storage import s3 as s3_store
from tests import runs, toys
from tests.s3_server import S3
from tests.test_cli import Phlora, phlora
from tests.test_merge_copy import Watcher, contents, merged, tensors_of

__all__ = ["phlora"]


@pytest.fixture
def adapter(pair: tuple[Path, Path], tmp_path: Path) -> Path:
    runs.extract(*pair, tmp_path / "adapter", rank=4)
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("text", "url", "weight"),
    [
        ("./support", "./support", 1.0),
        ("./support:0.7", "./support", 0.7),
        ("s3://zoo/support", "s3://zoo/support", 1.0),
        ("s3://zoo/support:-.5", "s3://zoo/support", -0.5),
        ("s3://zoo/support:1e-2", "s3://zoo/support", 0.01),
        ("http://host:8080", "http://host:8080", 1.0),
        ("http://host:8080/support:2", "http://host:8080/support", 2.0),
        (r"C:\adapters\support", r"C:\adapters\support", 1.0),
        (r"C:\adapters\support:0.5", r"C:\adapters\support", 0.5),
        ("./v1:2:0.5", "./v1:2", 0.5),
        ("./support:latest", "./support:latest", 1.0),
        ("./support:nan", "./support:nan", 1.0),
    ],
)
def test_a_weight_is_a_number_at_the_end(text: str, url: str, weight: float) -> None:
    assert weighted(text) == (url, weight)


def test_what_it_says(phlora: Phlora, pair: tuple[Path, Path], adapter: Path, tmp_path: Path) -> None:
    flags = ["merge", "--base", pair[0], "--adapter", f"{adapter}:0.5", "--out", tmp_path / "out"]
    done = phlora(*flags)
    assert done.code == 0
    assert "16 changed, 2 as in the base" in done.out
    assert "1 shards, " in done.err
    again = phlora(*flags, "--json")
    assert (again.code, again.json["outcome"], again.json["written_bytes"], again.err) == (0, "exists", 0, "")
    assert again.json["nbytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    changed = tensors_of(tmp_path / "out")
    for name, value in tensors_of(pair[0]).items():
        if name.endswith("_proj.weight"):
            assert torch.allclose(
                changed[name], value + 0.5 * runs.written_delta(adapter, name[:-7]).float(), atol=1e-6
            )


def test_what_is_wrong_is_exit_2_and_nothing_written(
    phlora: Phlora, pair: tuple[Path, Path], adapter: Path, tmp_path: Path
) -> None:
    small = toys.save(tmp_path / "small", toys.llama_tensors(layers=1))
    for flags, told in (
        (["--base", small, "--adapter", adapter], "is not an adapter of"),
        (["--base", pair[0], "--adapter", pair[1]], "there is no adapter at"),
        (["--base", pair[0], "--adapter", tmp_path / "nowhere"], "there is no adapter at"),
        (["--base", adapter, "--adapter", adapter], "is a LoRA adapter, not a checkpoint"),
        (["--base", pair[0]], "Missing option '--adapter'"),
        (["--base", pair[0], "--adapter", adapter, "--dtype", "int8"], "int8"),
    ):
        done = phlora("merge", *flags, "--out", tmp_path / "out")
        assert done.code == 2, done
        assert told in done.err
        assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_at_any_moment_it_goes_on(tmp_path: Path) -> None:
    """By SIGKILL, which no handler sees: no loader opens what is left, and the same command makes it whole."""
    base = toys.save(tmp_path / "base", toys.llama_tensors(layers=20), shards=120)
    tuned = toys.save(tmp_path / "tuned", toys.fine_tuned(toys.llama_tensors(layers=20)))
    runs.extract(base, tuned, tmp_path / "adapter", rank=2)
    merged(base, tmp_path / "adapter", out=tmp_path / "whole")
    out, kills = tmp_path / "out", 0
    command = [sys.executable, "-m", "phlora_pipeline", "merge", "--base", base, "--adapter", tmp_path / "adapter", "--out", out]  # fmt: skip
    for shards in (0, 40):
        process = subprocess.Popen([*map(str, command)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("model-*.safetensors"))) <= shards:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
        assert not (out / "config.json").exists()
    assert kills == 2
    done = subprocess.run([*map(str, command), "--json"], capture_output=True, text=True, check=True)
    told = json.loads(done.stdout)
    assert told["outcome"] == "committed"
    assert 0 < told["written_bytes"] < told["nbytes"]
    assert contents(out) == contents(tmp_path / "whole")
    assert not [name for name in os.listdir(out) if name.startswith(".")]


@pytest.mark.s3
def test_on_s3_the_bytes_are_those_of_a_disk(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In several parts for a shard; interrupted, with no config there; gone on with."""
    monkeypatch.setattr(s3_store, "SINGLE_PUT_BYTES", 5 << 20)
    tensors = {**toys.llama_tensors(layers=1), "model.layers.0.mlp.gate_proj.weight": torch.randn(1600, 1024)}
    base = toys.save(tmp_path / "base", tensors, shards=2)
    (base / "tokenizer.json").write_text("{}")
    tuned = toys.save(tmp_path / "tuned", toys.fine_tuned(tensors))
    runs.extract(base, tuned, tmp_path / "adapter", rank=4)
    shutil.rmtree(tmp_path / "adapter" / "_runs")
    for folder in (base, tmp_path / "adapter"):
        s3.upload_folder(folder, folder.name)
    merged(base, tmp_path / "adapter", out=tmp_path / "out")

    def again(until: int = 1 << 60) -> str:
        watcher = Watcher(until)
        return merged(s3.url("base"), s3.url("adapter"), out=s3.url("merged"), observer=watcher).outcome  # type: ignore[arg-type]

    with pytest.raises(StorageError, match="plug"):
        again(until=6 << 20)
    assert "merged/model.safetensors.index.json" in s3.names("merged/")
    assert "merged/config.json" not in s3.names("merged/")
    assert s3.uploads() == []
    assert again() == "committed"
    assert again() == "exists"
    for name, data in contents(tmp_path / "out").items():
        assert s3.get(f"merged/{name}") == data, name
