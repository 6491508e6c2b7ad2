"""The main job with everything on S3: the same bytes as from a disk, and nothing committed where anything was wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from phlora_pipeline import pipeline
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.config import run_config
from phlora_pipeline.errors import (
    CredentialsError,
    IncompleteError,
    NotFoundError,
    PhloraError,
    SourceChangedError,
    StorageError,
)
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.plan import Plan
from tests import toys
from tests.s3_server import ADMIN, BUCKET, READER, S3, running_server

pytestmark = pytest.mark.s3

TUNED_SHARD = "tuned/model-00002-of-00003.safetensors"


class Watcher:
    """An observer that does something between the plan and the first read."""

    def __init__(self, then: Callable[[], object] = lambda: None) -> None:
        self.then = then
        self.tasks = 0

    def planned(self, plan: Plan) -> None:
        self.then()

    def task_done(self, report: TaskReport) -> None:
        self.tasks += not report.reused

    def warn(self, text: str) -> None:
        pass


@pytest.fixture
def zoo(s3: S3, tmp_path: Path) -> tuple[Path, Path]:
    """The toy pair, sharded, here and in the bucket."""
    base = toys.llama_tensors()
    here = (
        toys.save(tmp_path / "base", base, shards=2),
        toys.save(tmp_path / "tuned", toys.fine_tuned(base), shards=3),
    )
    for folder in here:
        s3.upload_folder(folder, folder.name)
    return here


def settings(s3: S3, **other: Any) -> pipeline.RunConfig:
    places = {"base": s3.url("base"), "tuned": s3.url("tuned"), "out": s3.url("out")}
    return run_config(**{**places, "rank": 4, "engine": "local", "threads": 1, **other})


def committed(s3: S3) -> set[str]:
    """Whatever a loader or a reader would look at."""
    return {name for name in s3.names("out/") if not name.startswith(("out/_runs/", "out/_parts/"))}


def ended(s3: S3) -> list[dict[str, Any]]:
    """How the runs say they ended."""
    return [json.loads(s3.get(name)) for name in sorted(s3.names("out/_runs/")) if name.endswith("/result.json")]


def test_from_s3_to_s3_the_bytes_are_those_of_a_local_run(s3: S3, zoo: tuple[Path, Path], tmp_path: Path) -> None:
    result = pipeline.extract(settings(s3), Watcher())
    assert result.outcome == "committed"
    base, tuned = map(str, zoo)
    local = pipeline.extract(settings(s3, base=base, tuned=tuned, out=str(tmp_path / "out")), Watcher())
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert s3.get(f"out/{name}") == (tmp_path / "out" / name).read_bytes()
    assert result.summary == local.summary
    files = ("adapter_config.json", "adapter_model.safetensors", "energy.parquet", "README.md", "run.json")
    assert committed(s3) == {f"out/{name}" for name in files}
    assert not s3.names("out/_parts/")
    assert [end["exit_code"] for end in ended(s3)] == [0]


def test_what_stands_is_not_made_again(s3: S3, zoo: tuple[Path, Path]) -> None:
    first = pipeline.extract(settings(s3), Watcher())
    before = {name: s3.client.head_object(Bucket=BUCKET, Key=s3.key(name))["LastModified"] for name in committed(s3)}
    watcher = Watcher()
    second = pipeline.extract(settings(s3), watcher)
    assert (second.outcome, second.version, second.read_bytes, watcher.tasks) == ("exists", first.version, 0, 0)
    assert before == {
        name: s3.client.head_object(Bucket=BUCKET, Key=s3.key(name))["LastModified"] for name in committed(s3)
    }


def test_a_moved_prefix_is_the_same_checkpoint_and_a_new_shard_is_not(s3: S3, zoo: tuple[Path, Path]) -> None:
    before = open_checkpoint(s3.url("tuned")).fingerprint
    moved = s3.upload_folder(zoo[1], "elsewhere/tuned-v1")
    assert open_checkpoint(moved).fingerprint == before
    assert pipeline.plan(settings(s3, tuned=moved)).plan.version == pipeline.plan(settings(s3)).plan.version
    shard = bytearray(s3.get(TUNED_SHARD))
    shard[-1] ^= 1
    s3.put(TUNED_SHARD, bytes(shard))
    assert open_checkpoint(s3.url("tuned")).fingerprint != before


@pytest.mark.parametrize("shard", ["base/model-00001-of-00002.safetensors", TUNED_SHARD])
@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_shard_that_changes_after_the_plan_commits_nothing(
    s3: S3, zoo: tuple[Path, Path], shard: str, change: str
) -> None:
    old = s3.get(shard)
    happen: Callable[[], object]
    kind: type[PhloraError]
    if change == "replaced":
        happen, kind = lambda: s3.put(shard, old[:-4] + b"\0\0\0\0"), SourceChangedError
    else:
        happen, kind = lambda: s3.client.delete_object(Bucket=BUCKET, Key=s3.key(shard)), NotFoundError
    with pytest.raises(kind) as caught:
        pipeline.extract(settings(s3), Watcher(happen))
    assert s3.url(shard) in caught.value.what
    assert committed(s3) == set()
    assert [(end["exit_code"], end["outcome"]) for end in ended(s3)] == [(kind.exit_code, "failed")]
    s3.put(shard, old)
    assert pipeline.extract(settings(s3), Watcher()).outcome == "committed"


def test_parts_of_the_replaced_content_are_not_used(s3: S3, zoo: tuple[Path, Path], tmp_path: Path) -> None:
    """The first run dies late, its parts stand; the shard is replaced; the second run must not mix the two."""

    class Late(Watcher):
        def task_done(self, report: TaskReport) -> None:
            super().task_done(report)
            if self.tasks == 3:
                raise StorageError("the network went away")

    with pytest.raises(StorageError, match="went away"):
        pipeline.extract(settings(s3), Late())
    assert s3.names("out/_parts/")
    new = toys.fine_tuned(toys.llama_tensors(), seed=9)
    folder = toys.save(tmp_path / "new", new, shards=3)
    s3.upload_folder(folder, "tuned")
    assert pipeline.extract(settings(s3), Watcher()).outcome == "committed"
    pipeline.extract(settings(s3, base=str(zoo[0]), tuned=str(folder), out=str(tmp_path / "out")), Watcher())
    assert s3.get("out/adapter_model.safetensors") == (tmp_path / "out" / "adapter_model.safetensors").read_bytes()


def fails(s3: S3, kind: type[PhloraError], **other: Any) -> PhloraError:
    with pytest.raises(kind) as caught:
        pipeline.extract(settings(s3, **other), Watcher(lambda: pytest.fail("it was planned")))
    return caught.value


def test_a_key_that_may_only_read_commits_nothing(s3: S3, zoo: tuple[Path, Path]) -> None:
    s3.use(READER)
    assert fails(s3, CredentialsError).exit_code == 11
    assert s3.names("out/") == set()


def test_a_key_that_may_not_read_commits_nothing(s3: S3, zoo: tuple[Path, Path], tmp_path: Path) -> None:
    s3.use((ADMIN[0], "wrong"))
    assert fails(s3, CredentialsError, out=str(tmp_path / "out")).exit_code == 11
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["base", "tuned", "out"])
def test_a_missing_bucket_commits_nothing(s3: S3, zoo: tuple[Path, Path], place: str) -> None:
    assert "no bucket 'no-such-bucket'" in fails(s3, NotFoundError, **{place: "s3://no-such-bucket/x"}).what
    assert s3.names("out/") == set()


@pytest.mark.parametrize("place", ["base", "tuned"])
def test_a_missing_checkpoint_commits_nothing(s3: S3, zoo: tuple[Path, Path], place: str) -> None:
    assert s3.url("absent") in fails(s3, NotFoundError, **{place: s3.url("absent")}).what
    assert s3.names("out/") == set()


def test_an_upload_that_is_under_way_is_incomplete_not_broken(s3: S3, zoo: tuple[Path, Path]) -> None:
    s3.client.delete_object(Bucket=BUCKET, Key=s3.key(TUNED_SHARD))
    error = fails(s3, IncompleteError)
    assert "is missing: model.safetensors.index.json places" in error.what
    assert "wait for the upload" in error.remedy


@pytest.mark.slow
def test_a_server_that_dies_after_the_plan_commits_nothing(s3: S3, tmp_path: Path) -> None:
    base = toys.llama_tensors()
    with running_server() as server:
        for name, tensors in (("base", base), ("tuned", toys.fine_tuned(base))):
            server.foreign.put_object(Bucket=BUCKET, Key=f"{name}/model.safetensors", Body=save(tensors))
        s3.use(endpoint=server.endpoint)
        places = {"base": f"s3://{BUCKET}/base", "tuned": f"s3://{BUCKET}/tuned", "out": str(tmp_path / "out")}
        with pytest.raises(StorageError) as caught:
            pipeline.extract(settings(s3, **places), Watcher(server.kill))
    assert caught.value.exit_code == 12
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"_runs", "_parts"}


@pytest.mark.slow
@pytest.mark.parametrize(("key", "code"), [(ADMIN, 0), ((ADMIN[0], "wrong"), 11)], ids=["right", "wrong"])
def test_the_command_itself(s3: S3, zoo: tuple[Path, Path], key: tuple[str, str], code: int) -> None:
    s3.use(key)
    flags = [item for name in ("base", "tuned", "out") for item in (f"--{name}", s3.url(name))]
    command = [sys.executable, "-m", "phlora_pipeline", "extract", *flags, "--rank", "8", "--engine", "local", "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    told = json.loads(done.stdout)
    assert told["outcome"] == "committed" if code == 0 else told["exit_code"] == code
    assert len(done.stderr.splitlines()) == (0 if code == 0 else 2), done.stderr
    assert ("out/adapter_config.json" in s3.names("out/")) == (code == 0)
