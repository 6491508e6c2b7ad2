"""Publication: what stands, what is refused, in which order things come and go."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from phlora_pipeline import pipeline, reducer, storage
from phlora_pipeline.config import RunConfig
from phlora_pipeline.errors import ConflictError, ModelFailedError
from phlora_pipeline.plan import Plan
from phlora_pipeline.verify import verify
from tests import runs, toys

Pair = tuple[Path, Path]


def test_the_config_goes_first_when_an_adapter_is_removed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is killed in the middle leaves a folder that no loader opens."""
    runs.extract(*pair, tmp_path / "out")
    gone: list[str] = []
    monkeypatch.setattr(storage, "delete", lambda url: gone.append(storage.basename(url)))
    reducer.unpublish(str(tmp_path / "out"))
    assert gone[0] == "adapter_config.json"
    assert set(gone) == set(reducer.PUBLISHED)


def test_a_part_that_was_stored_before_its_worker_died_is_a_part(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given up after two workers, the last of which had done it: nothing failed. Where it is missing, only that is made again."""
    runs.extract(*pair, tmp_path / "undisturbed")
    watcher, computed, missing = runs.Watcher(), pipeline.compute, list[str]()

    def given_up(config: RunConfig, plan: Plan, *others: Any) -> dict[str, str]:
        assert not computed(config, plan, *others)
        for url in missing:
            storage.delete(url)
        return {member.part_url: "its worker died" for task in plan.tasks for member in task.members}

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "compute", given_up)
        runs.extract(*pair, tmp_path / "out", observer=watcher)
        assert watcher.plan is not None
        missing += [member.part_url for task in watcher.plan.tasks for member in task.members][:1]
        missing[0] = missing[0].replace(f"{tmp_path}/out", f"{tmp_path}/again")
        with pytest.raises(ModelFailedError, match="its worker died"):
            runs.extract(*pair, tmp_path / "again")
    resumed = runs.Watcher()
    assert runs.extract(*pair, tmp_path / "again", observer=resumed).outcome == "committed"
    made = [block.part_url for report in resumed.reports for block in report.blocks if not block.reused]
    assert (made, len(resumed.reports)) == (missing, len(watcher.reports))
    assert len(watcher.reports) > 1
    assert (
        runs.contents(tmp_path / "out") == runs.contents(tmp_path / "undisturbed") == runs.contents(tmp_path / "again")
    )


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "energy.parquet", "README.md", "run.json"])
def test_an_adapter_that_lost_a_file_does_not_stand(pair: Pair, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    runs.extract(*pair, out)
    (out / name).unlink()
    with pytest.raises(ConflictError, match="damaged"):
        runs.extract(*pair, out)
    assert runs.extract(*pair, out, overwrite=True).outcome == "committed"
    assert runs.extract(*pair, out).outcome == "exists"


def test_truncated_weights_do_not_stand(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.extract(*pair, out)
    (out / "adapter_model.safetensors").write_bytes(b"short")
    with pytest.raises(ConflictError, match="damaged"):
        runs.extract(*pair, out)


def test_a_manifest_of_another_pair_is_no_result_of_this_one(pair: Pair, tmp_path: Path) -> None:
    """Nothing to adapt is an outcome, too: of one pair of checkpoints, not of any that comes later."""
    out = tmp_path / "out"
    copy = toys.save(tmp_path / "copy", toys.llama_tensors())
    assert runs.extract(pair[0], copy, out).outcome == "nothing_to_adapt"
    assert runs.extract(pair[0], copy, out).outcome == "nothing_to_adapt"
    with pytest.raises(ConflictError):
        runs.extract(*pair, out)


def test_weights_swapped_for_another_adapters_are_found(pair: Pair, tmp_path: Path) -> None:
    """Same keys, same shapes, same config: only the digest in run.json, and the energy, tell."""
    other = toys.save(tmp_path / "other", toys.fine_tuned(toys.llama_tensors(), seed=9))
    runs.extract(*pair, tmp_path / "out")
    runs.extract(pair[0], other, tmp_path / "out-other")
    (tmp_path / "out" / "adapter_model.safetensors").write_bytes(
        (tmp_path / "out-other" / "adapter_model.safetensors").read_bytes()
    )
    found = verify(str(pair[0]), str(pair[1]), str(tmp_path / "out"))
    assert any("run.json" in problem for problem in found.problems)


def test_weights_taken_away_before_the_commit_are_not_committed(
    pair: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another run with --overwrite puts its own weights just before this one writes its config."""
    out, original = tmp_path / "out", storage.put_new

    def meddle(url: str, body: object, *, size: int | None = None) -> object:
        outcome = original(url, body, size=size)  # type: ignore[arg-type]
        if url.endswith("run.json"):
            weights = out / "adapter_model.safetensors"
            data = weights.read_bytes()
            weights.unlink()
            weights.write_bytes(data[:-1] + b"x")
        return outcome

    monkeypatch.setattr(storage, "put_new", meddle)
    with pytest.raises(ConflictError, match="replaced by another run"):
        runs.extract(*pair, out)
    assert not (out / "adapter_config.json").exists()


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_checkpoints_folder_is_no_place_for_an_adapter(pair: Pair, tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / name).write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ConflictError, match="checkpoint's folder"):
            runs.extract(*pair, out, overwrite=overwrite)
    assert [path.name for path in out.iterdir()] == [name]


def test_overwrite_replaces_adapters_and_not_somebodys_readme(pair: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text("my notes")
    with pytest.raises(ConflictError):
        runs.extract(*pair, out, overwrite=True)
    assert (out / "README.md").read_text() == "my notes"


def test_a_link_to_a_checkpoint_is_that_checkpoint(pair: Pair, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(pair[0])
    with pytest.raises(Exception, match="lies inside the base"):
        runs.extract(*pair, tmp_path / "link", overwrite=True)


def test_a_partial_adapter_is_no_whole_one(tmp_path: Path) -> None:
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    tuned["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    folders, out = (toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned)), tmp_path / "out"
    assert runs.extract(*folders, out, allow_partial=True).outcome == "committed"
    assert "partial" in (out / "README.md").read_text()
    with pytest.raises(ConflictError, match="partial"):
        runs.extract(*folders, out)
    assert runs.extract(*folders, out, allow_partial=True).outcome == "exists"


def test_an_excluded_tensor_does_not_fail_the_model(tmp_path: Path) -> None:
    base = toys.llama_tensors() | {"mask": torch.full((4,), float("-inf"))}
    tuned = toys.fine_tuned(base)
    folders = toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned)
    assert runs.extract(*folders, tmp_path / "out", exclude=("mask",)).outcome == "committed"
    assert runs.rows(tmp_path / "out")["mask"].status == "skipped"


def test_what_could_not_be_compared_is_told(pair: Pair, tmp_path: Path) -> None:
    tuned = toys.fine_tuned(toys.llama_tensors()) | {"score.weight": torch.ones(2, 32)}
    result = runs.extract(pair[0], toys.save(tmp_path / "grown", tuned), tmp_path / "out")
    assert result.summary.uncompared == (("score.weight", "not in the base"),)
    assert "`score.weight` could not be compared" in (tmp_path / "out" / "README.md").read_text()


def publish(out: Path, *chunks: bytes) -> None:
    made = reducer.Weights(b"head", lambda: iter(chunks), 4 + sum(map(len, chunks)))
    reducer.publish(str(out), made, [], config={"r": 1}, card="# card", run={"version": "v"}, model="m", base="b")


def test_any_weights_are_published_as_they_come_named_in_run_json_and_never_over_others(tmp_path: Path) -> None:
    for _ in range(2):
        publish(tmp_path, b"one", b"two")
    data = (tmp_path / "adapter_model.safetensors").read_bytes()
    assert data == b"headonetwo"
    told = json.loads((tmp_path / "run.json").read_text())
    assert told == {"version": "v", "weights": {"bytes": 10, "sha256": hashlib.sha256(data).hexdigest()}}
    assert {path.name for path in tmp_path.iterdir()} == set(reducer.PUBLISHED)
    with pytest.raises(ConflictError, match=r"adapter_model\.safetensors is there already"):
        publish(tmp_path, b"one", b"2")


def test_a_refused_pair_leaves_no_parts(pair: Pair, tmp_path: Path) -> None:
    stranger = {name: torch.randn(value.shape) for name, value in toys.llama_tensors().items()}
    with pytest.raises(Exception, match="not a fine-tune"):
        runs.extract(pair[0], toys.save(tmp_path / "stranger", stranger), tmp_path / "out")
    assert not (tmp_path / "out" / "_parts").exists()
