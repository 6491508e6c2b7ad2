"""The command: what it prints, what it writes, and the code it exits with, above all where the request is bad."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from phlora_pipeline import cli, pipeline
from phlora_pipeline.storage import local
from tests import toys
from tests.s3_server import S3

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))


Phlora = Callable[..., Done]


@pytest.fixture
def phlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Phlora:
    """The command in this process: a new one costs two seconds, and few tests need it."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["phlora", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    return run


class Job:
    """`phlora extract` with a pair, an output that is not there yet, and plain settings."""

    def __init__(self, phlora: Phlora, base: Path, tuned: Path, out: Path) -> None:
        self.phlora, self.base, self.tuned, self.out = phlora, base, tuned, out

    def __call__(self, *more: object, **places: object) -> Done:
        where = {"base": self.base, "tuned": self.tuned, "out": self.out} | places
        flags = [item for name, place in where.items() for item in (f"--{name}", place)]
        return self.phlora("extract", *flags, "--rank", 8, "--engine", "local", "--threads", 1, *more)

    def refused(self, told: str, *more: object, code: int = 2, **places: object) -> Done:
        """Two lines on stderr, one object on stdout, and no output folder that was not there."""
        before = sorted(self.out.rglob("*")) if self.out.exists() else None
        done = self("--json", *more, **places)
        assert done.code == code, done
        error, fix = done.err.splitlines()
        assert re.search(told, error), error
        assert error.startswith("error: ")
        assert fix.startswith("  fix: ")
        assert done.json == {"error": error[7:], "remedy": fix[7:], "exit_code": code}
        if code == 2:
            assert (sorted(self.out.rglob("*")) if self.out.exists() else None) == before
        return done


@pytest.fixture
def job(phlora: Phlora, pair: tuple[Path, Path], tmp_path: Path) -> Job:
    """An extraction that would go well."""
    return Job(phlora, *pair, tmp_path / "out")


def published(out: Path) -> dict[str, bytes]:
    """What a reader looks at: every file but the runs' own."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}


class TestGood:
    """What a user sees where all is well."""

    def test_extract_says_what_it_kept(self, job: Job) -> None:
        done = job()
        assert done.code == 0
        assert re.search(rf"{job.out}  \(rank 8, .* of the checkpoint\)", done.out)
        assert "energy of the update kept: " in done.out
        assert "16 adapted" in done.out
        assert "18/18 tensors" in done.err
        names = {"adapter_config.json", "adapter_model.safetensors", "energy.parquet", "README.md", "run.json"}
        assert set(published(job.out)) == names

    def test_extract_as_json_is_one_object_and_nothing_else(self, job: Job) -> None:
        done = job("--json")
        assert (done.code, done.err) == (0, "")
        assert (done.json["outcome"], done.json["rank"], done.json["out"]) == ("committed", 8, str(job.out))

    def test_the_same_command_again_changes_nothing(self, job: Job) -> None:
        job()
        before = published(job.out)
        done = job("--json")
        assert (done.code, done.json["outcome"], done.json["read_bytes"]) == (0, "exists", 0)
        assert published(job.out) == before

    def test_plan_writes_nothing(self, job: Job, tmp_path: Path) -> None:
        before = sorted(tmp_path.rglob("*"))
        done = job.phlora("plan", "--base", job.base, "--tuned", job.tuned)
        assert done.code == 0
        assert "adapt 16 tensors" in done.out
        told = job.phlora("plan", "--base", job.base, "--tuned", job.tuned, "--json").json
        assert {entry["tensor"] for entry in told["adapted"]} >= {Q_PROJ, "lm_head.weight"}
        assert set(told["left_out"]) == {f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1)}
        assert sorted(tmp_path.rglob("*")) == before

    def test_convert_makes_a_pickle_ready(self, job: Job, tmp_path: Path) -> None:
        torch.save({"model": load_file(job.tuned / "model.safetensors"), "epoch": 3}, tmp_path / "last.ckpt")
        done = job.phlora("convert", tmp_path / "last.ckpt", tmp_path / "ready")
        assert done.code == 0
        assert re.match(r"18 tensors, .* → .*/ready/model\.safetensors\n1 entries .* dropped: epoch", done.out)
        assert job(tuned=tmp_path / "ready").code == 0

    def test_version(self, phlora: Phlora) -> None:
        assert phlora("--version") == (0, f"phlora-pipeline {version('phlora-pipeline')}\n", "")


class TestHelp:
    """What the command says of itself."""

    def test_of_the_whole(self, phlora: Phlora) -> None:
        done = phlora("--help")
        assert (done.code, done.err) == (0, "")
        for word in ("extract", "plan", "verify", "convert", "--version", "s3://"):
            assert word in done.out
        assert phlora("-h") == done

    @pytest.mark.parametrize(
        ("command", "words"),
        [
            ("extract", "--base --tuned --out --rank --max-rank --targets --include --exclude --for --dtype --engine --json Example"),
            ("plan", "--base --tuned --rank --json Reads headers only"),
            ("verify", "--base --tuned --adapter --device --json Exit 13"),
            ("convert", "IN OUT --json no credentials"),
        ],
    )  # fmt: skip
    def test_of_each_command(self, phlora: Phlora, command: str, words: str) -> None:
        done = phlora(command, "--help")
        assert (done.code, done.err) == (0, "")
        for word in words.split():
            assert word in done.out

    @pytest.mark.parametrize(
        "arguments",
        [
            ["nope"],
            ["extract"],
            ["extract", "--base", "a", "--tuned", "b"],
            ["extract", "--ranks", "3"],
            ["convert", "x"],
        ],
        ids=" ".join,
    )
    def test_a_wrong_command_line_is_usage_and_exit_2(self, phlora: Phlora, arguments: list[str]) -> None:
        done = phlora(*arguments)
        assert (done.code, done.out) == (2, "")
        assert "Usage: " in done.err
        told = phlora(*arguments, "--json")
        assert (told.code, told.json["exit_code"]) == (2, 2)
        assert told.json["error"]


class TestPlaces:
    """URLs where nothing is, or something else."""

    @pytest.mark.parametrize("place", ["base", "tuned"])
    def test_nothing_there(self, job: Job, place: str, tmp_path: Path) -> None:
        job.refused(f"there is no checkpoint at {tmp_path}/absent", **{place: tmp_path / "absent"})

    def test_an_unknown_kind_of_url(self, job: Job) -> None:
        job.refused("unknown kind of URL: gopher://", tuned="gopher://zoo/model")

    def test_a_url_with_one_slash(self, job: Job) -> None:
        job.refused("not a path or URL: 's3:/zoo/out'", out="s3:/zoo/out")

    def test_a_store_that_cannot_be_written(self, job: Job) -> None:
        job.refused("memory:// can be read but not written", out="memory://zoo/out")

    def test_not_a_checkpoint(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("hello")
        job.refused("not a valid safetensors file", tuned=tmp_path / "notes.txt")

    def test_a_pickle_names_the_command_that_helps(self, job: Job, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(2)}, tmp_path / "m.bin")
        done = job.refused("is a pickle", tuned=tmp_path / "m.bin")
        assert done.json["remedy"].endswith(f"phlora convert {tmp_path}/m.bin OUT")

    def test_the_output_inside_a_checkpoint(self, job: Job) -> None:
        job.refused("lies inside the tuned checkpoint", out=job.tuned / "adapter")

    @pytest.mark.s3
    @pytest.mark.parametrize(
        ("bucket", "told"), [("zoo", "there is no checkpoint at"), ("no-such-bucket", "there is no bucket")]
    )
    def test_nothing_there_on_s3(self, job: Job, s3: S3, bucket: str, told: str) -> None:
        job.refused(told, tuned=f"s3://{bucket}/absent/model")


class TestPairs:
    """Two checkpoints that do not belong together, or that belong together too well."""

    def test_another_model_type(self, job: Job, tmp_path: Path) -> None:
        other = toys.save(tmp_path / "other", toys.llama_tensors(), {"model_type": "bert"})
        job.refused("different architectures: the base is 'bert', the fine-tune 'llama'", base=other)

    def test_other_names(self, job: Job, tmp_path: Path) -> None:
        tensors = {name.replace("model.", "transformer."): value for name, value in toys.llama_tensors().items()}
        job.refused(
            "different architectures: 1 of the fine-tune's 18 tensor names", base=toys.save(tmp_path / "o", tensors)
        )

    def test_other_shapes(self, job: Job, tmp_path: Path) -> None:
        other = toys.save(tmp_path / "other", toys.llama_tensors(inner=64))
        job.refused(r"shapes differ in 6 of 18 tensors: .*base \[32, 64\], fine-tune \[32, 48\]", base=other)

    def test_nothing_that_matches(self, job: Job) -> None:
        job.refused("nothing to adapt: no tensor is a target", "--include", "*.nowhere.*")

    def test_unrelated_checkpoints_publish_nothing(self, job: Job, tmp_path: Path) -> None:
        noise = {name: torch.randn(value.shape) for name, value in toys.llama_tensors().items()}
        done = job("--json", base=toys.save(tmp_path / "noise", noise))
        assert done.code == 2
        assert "not a fine-tune of this base" in done.json["error"]
        assert published(job.out) == {}

    def test_identical_checkpoints_leave_a_manifest_only(self, job: Job) -> None:
        done = job(tuned=job.base)
        assert done.code == 0
        assert done.out.startswith("Nothing to adapt")
        assert set(published(job.out)) == {"energy.parquet"}
        assert job("--json", tuned=job.base).json["outcome"] == "nothing_to_adapt"

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
    def test_a_value_that_is_no_number_fails_its_tensor(self, job: Job, value: float) -> None:
        tensors = load_file(job.tuned / "model.safetensors")
        tensors[Q_PROJ][3, 5] = tensors[Q_PROJ][7, 0] = value
        toys.save(job.tuned, tensors)
        done = job.refused(rf"1 of 18 tensors failed, no adapter is published; {Q_PROJ}: 2 of 1024 entries", code=3)
        assert "the first at index [3, 5]" in done.err
        assert published(job.out) == {}
        assert len(list(job.out.glob("_runs/*/energy.parquet"))) == 1
        result = json.loads(next(job.out.glob("_runs/*/result.json")).read_text())
        assert result["exit_code"] == 3
        assert job("--allow-partial").code == 0
        assert f"base_model.model.{Q_PROJ.removesuffix('.weight')}.lora_A.weight" in load_file(
            job.out / "adapter_model.safetensors"
        )

    @pytest.mark.parametrize("rank", ["0", "-1", "513"])
    def test_a_rank_that_cannot_be(self, job: Job, rank: str) -> None:
        job.refused(f"rank must be between 1 and 512, got {rank}", "--rank", rank)

    @pytest.mark.parametrize("device", ["cuda:99", "tpu"])
    def test_a_device_that_is_not_there(self, job: Job, device: str) -> None:
        job.refused(f"device {device!r}|device {device}", "--device", device, code=14)
        assert not job.out.exists()


class TestOutput:
    """Places that cannot, or must not, be written to."""

    def test_another_adapter_is_kept_unless_told_otherwise(self, job: Job) -> None:
        assert job().code == 0
        before = published(job.out)
        done = job.refused("already holds another adapter", "--rank", 16)
        assert "--overwrite" in done.json["remedy"]
        assert published(job.out) == before
        assert job("--rank", 16, "--overwrite").code == 0
        assert json.loads((job.out / "adapter_config.json").read_text())["r"] == 16
        assert set(published(job.out)) == set(before)

    def test_somebodys_file_of_the_same_name_is_kept(self, job: Job) -> None:
        job.out.mkdir()
        (job.out / "README.md").write_text("mine")
        job.refused(r"already holds .*README\.md")
        assert published(job.out) == {"README.md": b"mine"}

    def test_an_output_under_a_file(self, job: Job, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        job.refused(f"{tmp_path}/file is a file, not a folder", out=tmp_path / "file" / "below" / "out")
        job.refused(f"{tmp_path}/file is a file, not a folder", out=tmp_path / "file")
        assert (tmp_path / "file").read_text() == "mine"

    def test_no_permission(self, job: Job, tmp_path: Path) -> None:
        closed = tmp_path / "closed"
        closed.mkdir(mode=0o500)
        flags = [item for name in ("base", "tuned") for item in (f"--{name}", str(getattr(job, name)))]
        command = [sys.executable, "-m", "phlora_pipeline", "extract", *flags, "--out", str(closed / "out"), "--json"]
        done = subprocess.run([*as_a_mortal(), *command], capture_output=True, text=True)
        assert done.returncode == 2, done
        assert f"no permission to write in {closed}" in json.loads(done.stdout)["error"]
        assert len(done.stderr.splitlines()) == 2
        assert os.listdir(closed) == []

    def test_too_small_a_disk_is_seen_before_anything_is_read(self, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
        # Patched: a disk that is known to be too small, on any machine.
        monkeypatch.setattr(local.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**30, 2**30 - 5000, 5000))
        job.refused(r"no room: parts and adapter need up to .* GB, 0\.00 GB are free")

    @pytest.mark.parametrize("room", [16, 64, 120])
    def test_a_disk_that_fills_up_commits_nothing(
        self, job: Job, small_disk: Callable[[int], Path], room: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        disk = small_disk(room)
        monkeypatch.setattr(local.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(2**40, 0, 2**40))
        done = job("--json", out=disk / "out")
        assert done.code == 12, done
        assert "no space left" in done.json["error"]
        assert published(disk / "out") == {} or "adapter_config.json" not in published(disk / "out")
        assert not list(disk.rglob("*.tmp"))


def as_a_mortal() -> list[str]:
    """What to put before a command so that permissions apply to it, even to root's."""
    if os.geteuid():
        return []
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        pytest.skip("root, and no setpriv to be less")
    without = "-dac_override,-dac_read_search"
    return [setpriv, f"--bounding-set={without}", f"--inh-caps={without}"]


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], Path]]:
    """Makes a disk of so many KiB: a tmpfs where this machine lets us mount one, else writes that are counted."""
    mounted: list[Path] = []

    def make(room: int) -> Path:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={room}k", "tmpfs", str(disk)]
        with contextlib.suppress(OSError):
            if subprocess.run(mount, capture_output=True).returncode == 0:
                mounted.append(disk)
                return disk
        real, left = local.os.fsync, [room // 8]

        def fsync(descriptor: int) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(local.os, "fsync", fsync)
        return disk

    yield make
    for disk in mounted:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_bug_is_called_one(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("whoops")

    monkeypatch.setattr(pipeline, "extract", broken)
    done = job()
    assert (done.code, done.out) == (1, "")
    assert "ZeroDivisionError: whoops" in done.err
    assert done.err.splitlines()[-1].startswith("error: this is a bug in phlora-pipeline")


@pytest.mark.slow
@pytest.mark.parametrize(("by", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)], ids=["INT", "TERM"])
def test_a_run_that_is_stopped_commits_nothing_and_goes_on_later(job: Job, by: signal.Signals, code: int) -> None:
    large = toys.llama_tensors(layers=6, hidden=256, inner=512, vocab=512, kv=128)
    toys.save(job.base, large)
    toys.save(job.tuned, toys.fine_tuned(large))
    flags = [item for name in ("base", "tuned", "out") for item in (f"--{name}", str(getattr(job, name)))]
    command = [
        sys.executable,
        "-m",
        "phlora_pipeline",
        "extract",
        *flags,
        "--rank",
        "8",
        "--engine",
        "local",
        "--threads",
        "1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not list(job.out.glob("_parts/*/*.safetensors")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(by)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, ""), err
    assert "Traceback" not in err
    assert ("interrupted; run the same command again" in err) == (by == signal.SIGINT)
    assert published(job.out) == {}
    parts = len(list(job.out.glob("_parts/*/*.safetensors")))
    assert parts
    done = job()
    assert done.code == 0
    assert f"{parts} tasks reused" in done.err
