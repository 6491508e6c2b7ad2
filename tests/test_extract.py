"""The unit of work without an engine: one task in, one part out."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from phlora_pipeline import extract, lowrank, parts
from phlora_pipeline.checkpoint import open_checkpoint
from phlora_pipeline.errors import DeviceError, SourceChangedError
from phlora_pipeline.extract import Worker
from phlora_pipeline.plan import Plan, PlanSettings, Task, make_plan
from phlora_pipeline.targets import Selection
from tests import fp8, toys


def planned(base: Path, tuned: Path, out: Path, *, rank: int = 4) -> Plan:
    settings = PlanSettings(Selection(), "peft", rank, str(out / "_parts"), lowrank.Settings(rank))
    return make_plan(open_checkpoint(str(base)), open_checkpoint(str(tuned)), settings)


def task_of(plan: Plan, name: str) -> Task:
    return next(task for task in plan.tasks if name in {pair.name for pair in task.block.pairs})


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.layers.1.input_layernorm.weight"


def test_a_part_holds_the_best_factors_of_every_tensor(pair: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of(planned(*pair, tmp_path), Q)
    report = Worker("cpu", 1).run(task)
    part = parts.load(task.members[0].part_url)
    assert set(part.results) == {pair.name for pair in task.block.pairs}
    assert (report.tensors, report.nbytes, report.failed, report.reused) == (
        len(task.block.pairs),
        task.block.nbytes,
        (),
        False,
    )
    base, tuned = toys.llama_tensors(), toys.fine_tuned(toys.llama_tensors())
    for name, result in part.results.items():
        delta = tuned[name] - base[name]
        sigma = torch.linalg.svdvals(delta.double())
        product = parts.read_factor(part, "B", name) @ parts.read_factor(part, "A", name)
        assert float((delta - product).double().square().sum()) == pytest.approx(
            float(sigma[4:].square().sum()), rel=1e-4
        )
        assert result.singular_values == pytest.approx(sigma[:4].tolist(), rel=1e-5)
        assert result.delta_sq == pytest.approx(float(delta.double().square().sum()), rel=1e-7)


def test_a_tensor_that_is_only_measured_has_norms_and_no_factors(pair: tuple[Path, Path], tmp_path: Path) -> None:
    task = task_of(planned(*pair, tmp_path), NORM)
    Worker("cpu", 1).run(task)
    part = parts.load(task.members[0].part_url)
    assert part.results[NORM].status == "measured"
    assert part.results[NORM].delta_sq > 0
    assert not part.factors


@pytest.mark.parametrize("stored", ["bfloat16", "fp8"])
def test_a_fine_tune_that_is_its_base_rounded_has_nothing_above_the_edge(stored: str, tmp_path: Path) -> None:
    """With a scale an entry is no longer its eight bits, and is read as float32: it was rounded as they were."""
    base = toys.llama_tensors()
    tuned = {name: value.bfloat16() for name, value in base.items()}
    saved = (
        toys.save(tmp_path / "t", fp8.checkpoint(base)[0], fp8.config())
        if stored == "fp8"
        else toys.save(tmp_path / "t", tuned)
    )
    Worker("cpu", 1).run(task := task_of(planned(toys.save(tmp_path / "b", base), saved, tmp_path), Q))
    found = parts.load(task.members[0].part_url).results[Q]
    assert found.noise_sq == pytest.approx(found.delta_sq, rel=0.3)
    assert found.changed > 0.9
    assert 0.6 * found.noise_edge < found.singular_values[0] < found.noise_edge


def test_pieces_of_a_tensor_have_the_noise_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = toys.llama_tensors()
    tuned = toys.save(tmp_path / "t", {name: value.bfloat16() for name, value in toys.fine_tuned(base).items()})
    before = toys.save(tmp_path / "b", base)
    whole, pieces = (task_of(planned(before, tuned, tmp_path / out), NORM) for out in ("whole", "pieces"))
    Worker("cpu", 1).run(whole)
    monkeypatch.setattr(extract, "STREAMED_BYTES", 0)
    monkeypatch.setattr(extract, "PIECE", 20)
    Worker("cpu", 1).run(pieces)
    one, other = (parts.load(task.members[0].part_url).results[NORM] for task in (whole, pieces))
    assert (other.noise_sq, other.changed) == pytest.approx((one.noise_sq, one.changed), rel=1e-6)
    assert 0 < one.noise_sq < 0.01 * one.delta_sq
    assert one.noise_edge == other.noise_edge == 0


def test_an_unchanged_tensor_among_changed_ones(tmp_path: Path) -> None:
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    tuned[Q] = base[Q].clone()
    task = task_of(planned(toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned), tmp_path), Q)
    Worker("cpu", 1).run(task)
    part = parts.load(task.members[0].part_url)
    assert part.results[Q].status == "unchanged"
    assert f"A:{Q}" not in part.factors
    others = [result.status for name, result in part.results.items() if name != Q]
    assert others == ["factored"] * (len(task.block.pairs) - 1)


@pytest.mark.parametrize("side", ["base", "fine-tune"])
def test_a_bad_value_fails_its_tensor_alone_and_is_located(tmp_path: Path, side: str) -> None:
    base = toys.llama_tensors()
    tuned = toys.fine_tuned(base)
    sick = base if side == "base" else tuned
    sick[Q] = sick[Q].clone()
    sick[Q][3, 5] = float("nan")
    sick[Q][4, 0] = float("inf")
    task = task_of(planned(toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned), tmp_path), Q)
    report = Worker("cpu", 1).run(task)
    assert report.failed == (Q,)
    results = parts.load(task.members[0].part_url).results
    assert results[Q].reason == f"2 of 1024 entries of the {side} are NaN or infinite, the first at index [3, 5]"
    assert all(result.status == "factored" for name, result in results.items() if name != Q)


def test_a_difference_that_overflows_is_said(tmp_path: Path) -> None:
    base, tuned = {"a.q_proj.weight": torch.full((2, 2), -3e38)}, {"a.q_proj.weight": torch.full((2, 2), 3e38)}
    plan = planned(toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned), tmp_path)
    Worker("cpu", 1).run(plan.tasks[0])
    assert "difference" in parts.load(plan.tasks[0].members[0].part_url).results["a.q_proj.weight"].reason


def test_a_part_that_is_there_is_kept(pair: tuple[Path, Path], tmp_path: Path) -> None:
    task = planned(*pair, tmp_path).tasks[0]
    Worker("cpu", 1).run(task)
    before = os.stat(task.members[0].part_url)
    report = Worker("cpu", 1).run(task)
    assert (report.reused, report.nbytes) == (True, 0)
    assert os.stat(task.members[0].part_url).st_mtime_ns == before.st_mtime_ns


def test_a_hint_changes_no_byte_whether_it_comes_true_or_not(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plain, hinted = planned(*pair, tmp_path / "plain"), planned(*pair, tmp_path / "hinted")
    for task in plain.tasks:
        Worker("cpu", 1).run(task)
    worker = Worker("cpu", 1)
    hints = [*hinted.tasks[2:], None, None]  # every hint is wrong by one task
    for task, hint in zip(hinted.tasks, hints, strict=True):
        worker.run(task, hint)
    for one, other in zip(plain.tasks, hinted.tasks, strict=True):
        assert Path(one.members[0].part_url).read_bytes() == Path(other.members[0].part_url).read_bytes()


def test_a_source_replaced_since_planning_is_an_error_and_leaves_no_part(
    pair: tuple[Path, Path], tmp_path: Path
) -> None:
    plan = planned(*pair, tmp_path)
    worker = Worker("cpu", 1)
    file = pair[1] / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    file.write_bytes(data)  # even the same bytes: nobody can know that without reading all of them
    [block] = worker.run(plan.tasks[0]).blocks
    assert isinstance(block.error, SourceChangedError)
    assert "no longer what was planned" in block.error.what
    assert not Path(plan.tasks[0].members[0].part_url).exists()


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_a_part_tells_the_route_its_certificate_and_what_did_not_do(solver: lowrank.Solver, tmp_path: Path) -> None:
    """Of matrices that are large enough for a basis, one of which a basis cannot certify as asked."""
    base = toys.llama_tensors(hidden=200, kv=200, inner=200)
    tuned = dict(base)
    flat = torch.ones(200, dtype=torch.float64)
    for name, spectrum in ((Q, 0.5 ** torch.arange(200, dtype=torch.float64)), (Q.replace("q_proj", "k_proj"), flat)):
        tuned[name] = base[name] + toys.with_spectrum(200, 200, spectrum).float()
    folders = toys.save(tmp_path / "b", base), toys.save(tmp_path / "t", tuned)
    settings = PlanSettings(Selection(), "peft", 4, str(tmp_path / "_parts"), lowrank.Settings(4, solver, 1e-4))
    plan = make_plan(*(open_checkpoint(str(folder)) for folder in folders), settings)
    task = task_of(plan, Q)
    Worker("cpu", 1).run(task)
    results = parts.load(task.members[0].part_url).results
    steep, level = results[Q], results[Q.replace("q_proj", "k_proj")]
    assert 0 < steep.certificate <= 1e-4
    assert 0 < level.certificate <= 1e-4
    if solver == "krylov":
        assert steep.solver.startswith("krylov ")
        assert level.solver in {"gram", "exact"}
        assert level.notes[0].startswith("krylov ")
        assert level.notes[0].endswith("over 1.0e-04")
    elif solver != "auto":
        assert (steep.solver, level.solver, steep.notes, level.notes) == (solver, solver, (), ())


class TestProfile:
    """A committed profile is the planner's guess at the device; the worker knows its own."""

    @pytest.fixture
    def taken(self, monkeypatch: pytest.MonkeyPatch) -> list[lowrank.Profile]:
        """The profiles that factorisations were done with."""
        found, decompose = [], lowrank.decompose

        def recording(
            pairs: object, names: object, settings: object, profile: lowrank.Profile, *others: object
        ) -> object:
            found.append(profile)
            return decompose(pairs, names, settings, profile, *others)  # type: ignore[arg-type]

        monkeypatch.setattr(lowrank, "decompose", recording)
        return found

    @pytest.mark.parametrize("units", [True, False])
    def test_a_committed_one_gives_way_to_the_devices(
        self, units: bool, pair: tuple[Path, Path], tmp_path: Path, taken: list[lowrank.Profile], monkeypatch: pytest.MonkeyPatch
    ) -> None:  # fmt: skip
        monkeypatch.setattr(extract, "has_bfloat16_units", lambda: units)
        task = replace(task_of(planned(*pair, tmp_path), Q), profile=lowrank.PROFILES["sm90"])
        Worker("cpu", 1).run(task)
        assert taken == [lowrank.PROFILES["cpu-bf16" if units else "cpu"]]

    def test_ones_own_is_kept(self, pair: tuple[Path, Path], tmp_path: Path, taken: list[lowrank.Profile]) -> None:
        own = replace(lowrank.PROFILES["sm90"], name="mine")
        Worker("cpu", 1).run(replace(task_of(planned(*pair, tmp_path), Q), profile=own))
        assert taken == [own]

    @pytest.mark.parametrize(
        ("capability", "name"), [((8, 0), "sm80"), ((9, 0), "sm90"), ((7, 5), "other"), ((12, 0), "other")]
    )
    def test_a_gpus_is_that_of_its_kind(
        self, capability: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        assert extract.profile_of(torch.device("cuda")) is lowrank.PROFILES[name]


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "mps", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(DeviceError):
        extract.checked_device(device)


def test_auto_device_is_the_processor_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert extract.checked_device("auto") == torch.device("cpu")
