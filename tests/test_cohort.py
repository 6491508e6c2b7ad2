"""Cohorts: every block of every model once, the base shared where it can be, and the same parts as alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline import extract, lowrank, parts, storage
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.errors import SourceChangedError
from phlora_pipeline.extract import Worker
from phlora_pipeline.plan import Plan, PlanSettings, Share, Task, in_cohorts, make_plan
from phlora_pipeline.targets import Selection
from tests import toys


def planned(base: Path, tuned: Path, out: Path, model: str, *, rank: int = 4, dialect: str = "peft") -> Plan:
    selection = Selection(exclude=("*up_proj*",)) if model.endswith("x") else Selection()
    wanted = PlanSettings(selection, dialect, rank, str(out), lowrank.Settings(rank), model=model)  # type: ignore[arg-type]
    return make_plan(open_checkpoint(str(base)), open_checkpoint(str(tuned)), wanted)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two bases; three fine-tunes of the first, one of the second."""
    folder = tmp_path_factory.mktemp("zoo")
    bases = {"a": toys.llama_tensors(), "b": toys.llama_tensors(hidden=48)}
    for name, tensors in bases.items():
        toys.save(folder / name, tensors)
    for name, base, seed in (("a1", "a", 1), ("a2", "a", 2), ("a3x", "a", 3), ("b1", "b", 4)):
        toys.save(folder / name, toys.fine_tuned(bases[base], seed=seed))
    return folder


def plans(zoo: Path, out: Path) -> dict[str, Plan]:
    return {name: planned(zoo / name[0], zoo / name, out, name) for name in ("a1", "a2", "a3x", "b1")}


def tasks(zoo: Path, out: Path) -> dict[str, tuple[Task, ...]]:
    return {name: plan.tasks for name, plan in plans(zoo, out).items()}


@settings(max_examples=20, deadline=None)
@given(
    share=st.sampled_from(["auto", "max", "off"]),
    workers=st.integers(1, 64),
    names=st.sets(st.sampled_from(["a1", "a2", "a3x", "b1"])),
)
def test_every_block_of_every_model_is_in_one_task(zoo: Path, share: Share, workers: int, names: set[str]) -> None:
    models = {name: found for name, found in tasks(zoo, zoo / "out").items() if name in names}
    made = in_cohorts(models, share, workers)
    alone = [member for found in models.values() for task in found for member in task.members]
    together = [member for task in made for member in task.members]
    assert sorted(member.part_url for member in together) == sorted(member.part_url for member in alone)
    for task in made:
        assert len({(member.block.id, *(pair.base for pair in member.block.pairs)) for member in task.members}) == 1
        assert len({member.model for member in task.members}) == len(task.members)
    assert len({task.id for task in made}) == len(made)
    assert list(made) == sorted(made, key=lambda task: (task.cohort, -task.cost, task.id))
    assert in_cohorts(dict(reversed(models.items())), share, workers) == made


def test_the_base_is_read_once_for_all_of_its_models(zoo: Path, tmp_path: Path) -> None:
    """N fine-tunes cost N + 1 checkpoints, but for blocks that only some of them have."""
    models = {name: found for name, found in tasks(zoo, tmp_path).items() if name in {"a1", "a2"}}
    shared, off = in_cohorts(models, "max", 1), in_cohorts(models, "off", 1)
    once = open_checkpoint(str(zoo / "a")).nbytes
    assert sum(task.nbytes for task in shared) == 3 * once
    assert sum(task.nbytes for task in off) == 4 * once
    assert {task.cohort for task in shared} == {0}
    assert {task.cohort for task in off} == {0, 1}


def test_another_selection_makes_other_blocks_which_are_not_shared(zoo: Path, tmp_path: Path) -> None:
    models = {name: found for name, found in tasks(zoo, tmp_path).items() if name in {"a1", "a3x"}}
    made = in_cohorts(models, "max", 1)
    sizes = {task.block.id: [member.model for member in task.members] for task in made}
    assert ["a1", "a3x"] in [sorted(found) for found in sizes.values()]
    assert ["a3x"] in sizes.values()


def run_all(found: tuple[Task, ...]) -> list[extract.TaskReport]:
    worker = Worker("cpu", 1)
    return [worker.run(task, following) for task, following in zip(found, [*found[1:], None], strict=True)]


@pytest.mark.parametrize("streamed", [False, True])
def test_parts_are_those_of_each_model_alone(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    if streamed:
        monkeypatch.setattr(extract, "STREAMED_BYTES", 0)
        monkeypatch.setattr(extract, "PIECE", 100)
    alone, together = tasks(zoo, tmp_path / "alone"), tasks(zoo, tmp_path / "together")
    for found in alone.values():
        run_all(found)
    made = in_cohorts(together, "max", 2)
    reports = run_all(made)
    assert [report.nbytes for report in reports] == [task.nbytes for task in made]
    for one, other in zip(alone.values(), together.values(), strict=True):
        for left, right in zip(one, other, strict=True):
            assert Path(left.members[0].part_url).read_bytes() == Path(right.members[0].part_url).read_bytes()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("lost", ["a", "a1", "a2"])
def test_a_replaced_checkpoint_is_an_error_of_its_own_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str, streamed: bool
) -> None:
    if streamed:
        monkeypatch.setattr(extract, "STREAMED_BYTES", 0)
        monkeypatch.setattr(extract, "PIECE", 64)
    base = toys.llama_tensors()
    toys.save(tmp_path / "a", base)
    names = ("a1", "a2", "a3")
    for seed, name in enumerate(names):
        toys.save(tmp_path / name, toys.fine_tuned(base, seed=seed))
    made = in_cohorts(
        {name: planned(tmp_path / "a", tmp_path / name, tmp_path / "out", name).tasks for name in names}, "max", 1
    )
    file = tmp_path / lost / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)
    gone = set(names) if lost == "a" else {lost}
    for report in run_all(made):
        for block in report.blocks:
            assert (block.model in gone) == isinstance(block.error, SourceChangedError)
            assert (block.model in gone) != Path(block.part_url).exists()


def test_a_part_that_stands_is_not_computed_again_and_the_others_are(zoo: Path, tmp_path: Path) -> None:
    models = {name: found for name, found in tasks(zoo, tmp_path).items() if name in {"a1", "a2"}}
    made = in_cohorts(models, "max", 1)
    task = next(task for task in made if len(task.members) == 2 and task.block.purpose == "factor")
    Worker("cpu", 1).run(task.alone()[1])
    report = Worker("cpu", 1).run(task)
    assert [block.reused for block in report.blocks] == [False, True]
    assert report.nbytes == task.base_bytes + task.members[0].tuned_bytes
    assert set(parts.load(task.members[0].part_url).results) == {pair.name for pair in task.block.pairs}
    again = Worker("cpu", 1).run(task)
    assert (again.reused, again.nbytes) == (True, 0)


def test_a_models_factors_do_not_depend_on_who_was_before_it(zoo: Path, tmp_path: Path) -> None:
    """The base stays as it is while one model after another is taken from it."""
    models = {name: found for name, found in tasks(zoo, tmp_path).items() if name in {"a1", "a2"}}
    task = next(
        task for task in in_cohorts(models, "max", 1) if len(task.members) == 2 and task.block.purpose == "factor"
    )
    Worker("cpu", 1).run(task)
    base = toys.llama_tensors()
    for member, seed in zip(task.members, (1, 2), strict=True):
        tuned = toys.fine_tuned(base, seed=seed)
        part = parts.load(member.part_url)
        for name, result in part.results.items():
            assert result.delta_sq == pytest.approx(float((tuned[name] - base[name]).double().square().sum()), rel=1e-6)
    assert torch.get_num_threads() >= 1


def test_a_part_that_another_run_removes_just_now_is_made_anew(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other run has published the model meanwhile; this one need not fail of it."""
    task = tasks(zoo, tmp_path)["a1"][0]
    worker = Worker("cpu", 1)
    worker.run(task)
    part, whole = Path(task.members[0].part_url), storage.read_ranges
    before = part.read_bytes()

    def removed_first(ranges: Sequence[storage.ByteRange]) -> None:
        if ranges[0].url == str(part):
            part.unlink(missing_ok=True)
        whole(ranges)

    monkeypatch.setattr(storage, "read_ranges", removed_first)
    report = worker.run(task)
    assert not report.reused
    assert part.read_bytes() == before
