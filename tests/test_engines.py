"""The queue, and the two engines: the same bytes from a plain loop and from Ray, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline import cli, dispatch, driver, engine, lowrank, reducer
from phlora_pipeline.dispatch import Dispatcher
from phlora_pipeline.errors import DeviceError, ModelFailedError, SourceChangedError
from phlora_pipeline.extract import TaskReport, Worker
from phlora_pipeline.plan import Plan, Task
from tests import runs, toys

# ---------------------------------------------------------------------------------------------------------- the queue


class FakeTask:
    """What the queue needs of a task."""

    def __init__(self, number: int, cost: float) -> None:
        self.members = (SimpleNamespace(part_url=f"{number:03d}"),)
        self.cohort = 0
        self.id = f"{number:03d}"
        self.cost = cost

    def __repr__(self) -> str:
        return f"{self.id}({self.cost:g})"


def tasks_of(costs: list[float]) -> list[Task]:
    return [FakeTask(number, cost) for number, cost in enumerate(costs)]  # type: ignore[misc]


class Bench:
    """Workers at a queue, and an account of all that happened to each task."""

    def __init__(self, costs: list[float], workers: int) -> None:
        self.tasks = tasks_of(costs)
        self.queue: Dispatcher[int] = Dispatcher(self.tasks, workers)
        self.running: dict[int, Task] = {}
        self.told: dict[int, Task | None] = {}
        self.finished: list[str] = []
        self.charged: list[str] = []

    @property
    def waiting(self) -> list[Task]:
        """Tasks that nobody has, and that are neither done nor given up."""
        gone = {*self.finished, *self.queue.lost, *(task.id for task in self.running.values())}
        return [task for task in self.tasks if task.id not in gone]

    def take(self, worker: int) -> None:
        waiting = self.waiting
        assignment = self.queue.take(worker)
        if assignment is None:
            assert waiting == []
            return
        task, forecast = assignment
        assert task in waiting
        work = sum(other.cost for other in waiting)
        far = work > dispatch.FAR_FROM_END * max(other.cost for other in waiting) * self.queue.workers
        as_told = far and task is self.told.get(worker)
        assert as_told or task.cost >= dispatch.ALIKE * max(other.cost for other in waiting)
        self.running[worker] = task
        assert forecast is None or forecast in self.waiting
        self.told[worker] = forecast

    def end(self, worker: int, how: str) -> None:
        task = self.running.pop(worker)
        assert self.queue.works(worker)
        if how == "done":
            assert self.queue.done(worker) is task
            self.finished.append(task.id)
        else:
            assert self.queue.failed(worker, how, died=how == "died") is task
            self.charged.append(task.id)
        assert not self.queue.works(worker)


@settings(deadline=None, max_examples=300)
@given(
    costs=st.lists(st.integers(1, 20).map(float), max_size=12),
    workers=st.integers(1, 4),
    events=st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["done", "done", "failed", "died"])), max_size=40),
)
def test_every_task_is_done_once_or_lost_after_two_charges(
    costs: list[float], workers: int, events: list[tuple[int, str]]
) -> None:
    """Whatever fails and dies, nothing is lost, repeated, held back, or charged to a task that was not running."""
    bench = Bench(costs, workers)
    for number, how in events:
        worker = number % workers
        if worker in bench.running:
            bench.end(worker, how)
        else:
            bench.take(worker)
        assert bench.queue.unfinished == bool(bench.waiting or bench.running)
    while bench.queue.unfinished:
        for worker in range(workers):
            if worker in bench.running:
                bench.end(worker, "done")
            bench.take(worker)
    lost = set(bench.queue.lost)
    assert sorted([*bench.finished, *lost]) == sorted(task.id for task in bench.tasks)
    assert lost == {block for block in bench.charged if bench.charged.count(block) == dispatch.MAX_ATTEMPTS}
    assert all(bench.charged.count(block) < dispatch.MAX_ATTEMPTS for block in bench.finished)
    assert all("2 attempts" in reason for reason in bench.queue.lost.values())


def makespan(
    costs: list[float], workers: int, duration: Callable[[Task], float] = lambda task: task.cost
) -> tuple[float, int, int]:
    """When the last worker ends, and how many forecasts came true and not."""
    bench = Bench(costs, workers)
    clock = [(0.0, worker) for worker in range(workers)]
    right = wrong = 0
    end = 0.0
    while clock:
        clock.sort()
        now, worker = clock.pop(0)
        end = max(end, now)
        if worker in bench.running:
            bench.end(worker, "done")
        told = bench.told.get(worker)
        bench.take(worker)
        if worker in bench.running:
            right, wrong = right + (told is bench.running[worker]), wrong + (told not in {None, bench.running[worker]})
            clock.append((now + duration(bench.running[worker]), worker))
    assert not bench.queue.unfinished
    return end, right, wrong


def best_makespan(costs: list[float], workers: int) -> float:
    """By trying all: the largest first, so that hopeless branches end early."""
    best = sum(costs)

    def place(left: list[float], loads: tuple[float, ...]) -> None:
        nonlocal best
        if max(loads) >= best:
            return
        if not left:
            best = max(loads)
            return
        for load in set(loads):
            rest = list(loads)
            rest.remove(load)
            place(left[1:], (*rest, load + left[0]))

    place(sorted(costs, reverse=True), (0.0,) * workers)
    return best


@settings(deadline=None, max_examples=300)
@given(costs=st.lists(st.integers(1, 12).map(float), min_size=1, max_size=9), workers=st.integers(1, 4))
def test_the_makespan_is_within_grahams_bound(costs: list[float], workers: int) -> None:
    """Longest first: at most 4/3 − 1/(3m) of the best, and 1/ALIKE of that since costs are estimates."""
    bound = (4 / 3 - 1 / (3 * workers)) / dispatch.ALIKE
    assert makespan(costs, workers)[0] <= bound * best_makespan(costs, workers) + 1e-9


def test_a_large_task_is_not_held_back_for_a_busy_worker() -> None:
    """Two large tasks and as much in small ones, as embeddings beside layers: three workers need no longer than one large task."""
    assert makespan([1.0, 1.0, 0.25, 0.25, 0.25, 0.25], 3)[0] == 1.0


@pytest.mark.parametrize("workers", [1, 2, 8])
def test_forecasts_of_equal_tasks_come_true(workers: int) -> None:
    """The layers of a model are alike; whoever is quicker, what was read ahead is used."""
    generator = torch.Generator().manual_seed(1)
    _, right, wrong = makespan([7.0] * 96, workers, lambda _: 1 + float(torch.rand((), generator=generator)))
    assert wrong == 0
    assert right >= 96 - 2 * workers  # at either end there may be nothing to foretell


def test_first_forecasts_go_to_those_who_will_be_free_first() -> None:
    """Whoever got the largest task is the last to be free, and was told the smallest of the next round."""
    assert makespan([20.0, 18.0, 15.0, 13.0, 10.0, 8.0, 6.0, 4.0], 4)[1:] == (4, 0)


def test_a_lone_worker_is_always_told_the_truth() -> None:
    assert makespan([9.0, 7.0, 7.0, 3.0, 1.0], 1)[1:] == (4, 0)


# -------------------------------------------------------------------------------------------------------- local engine


class Stumbling(Worker):
    """Fails at tasks of one shape, as often as it is told."""

    shape = (16, 32)
    times = 1

    def run(self, task: Task, prefetch: Task | None = None) -> TaskReport:
        if task.block.shape == self.shape and type(self).times > 0:
            type(self).times -= 1
            raise RuntimeError("CUDA error: an illegal memory access was encountered\n  at line 3")
        return super().run(task, prefetch)


class TestLocal:
    def test_a_task_that_fails_once_is_repeated(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs.extract(*pair, tmp_path / "calm")
        monkeypatch.setattr(Stumbling, "times", 1)
        monkeypatch.setattr(engine, "Worker", Stumbling)
        runs.extract(*pair, tmp_path / "stumbled")
        assert Stumbling.times == 0
        assert runs.contents(tmp_path / "stumbled") == runs.contents(tmp_path / "calm")

    def test_a_task_that_fails_twice_is_failed_rows_and_the_others_are_done(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(Stumbling, "times", 2)
        monkeypatch.setattr(engine, "Worker", Stumbling)
        watcher = runs.Watcher()
        with pytest.raises(ModelFailedError):
            runs.extract(*pair, tmp_path / "out", observer=watcher)
        assert len(watcher.reports) == len(watcher.plan.tasks) - 1
        [run] = (tmp_path / "out" / "_runs").iterdir()
        failed = {name: row for name, row in runs.rows(run).items() if row.status == "failed"}
        assert {row.shape for row in failed.values()} == {Stumbling.shape}
        assert {row.reason for row in failed.values()} == {
            "RuntimeError: CUDA error: an illegal memory access was encountered at line 3 (2 attempts)"
        }

    def test_threads_are_those_of_the_config(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen, decompose = set(), lowrank.decompose

        def recording(*arguments: Any) -> list[lowrank.Outcome]:
            seen.add(torch.get_num_threads())
            return decompose(*arguments)

        monkeypatch.setattr(lowrank, "decompose", recording)
        before = torch.get_num_threads()
        try:
            runs.extract(*pair, tmp_path / "out", threads=2)
        finally:
            torch.set_num_threads(before)
        assert seen == {2}


# ----------------------------------------------------------------------------------------------------------------- Ray


def test_an_address_without_a_ray_is_said_at_once(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray itself goes on trying for many minutes."""
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(DeviceError, match=r"no Ray at 127\.0\.0\.1:9: ConnectionRefusedError") as raised:
        runs.extract(*pair, tmp_path / "out", engine="ray")
    assert raised.value.exit_code == 14
    assert "RAY_ADDRESS" in raised.value.remedy


def test_a_ray_that_does_not_start_is_no_bug_of_ours(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray = pytest.importorskip("ray")

    def refuse(**_: object) -> None:
        raise ConnectionError("the head's version is another")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(DeviceError, match="no Ray at this machine: ConnectionError: the head's version is another"):
        runs.extract(*pair, tmp_path / "out", engine="ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """One Ray for the tests of this file, of two processors, that speaks to this machine only."""
    ray = pytest.importorskip("ray")
    with (
        pytest.MonkeyPatch.context() as patch,
        tempfile.TemporaryDirectory(
            prefix="r",
            dir="/tmp",
            ignore_cleanup_errors=True,  # short, since AF_UNIX paths are
        ) as folder,
    ):
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        ray.init(
            num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            _temp_dir=folder, object_store_memory=80 << 20,
        )  # fmt: skip
        yield ray
        ray.shutdown()


class Account(Dispatcher[int]):
    """A queue that remembers whom it charged."""

    charges: list[tuple[str, str, bool]]

    def failed(self, worker: int, reason: str, *, died: bool, charged: bool = True) -> Task:
        task = super().failed(worker, reason, died=died, charged=charged)
        self.charges.append((task.id, reason, died))
        return task


@pytest.fixture
def charges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, bool]]:
    """(block id, reason, died) of each charge of the test's run."""
    found: list[tuple[str, str, bool]] = []
    monkeypatch.setattr(Account, "charges", found, raising=False)
    monkeypatch.setattr(driver, "Dispatcher", Account)
    return found


def use_worker(monkeypatch: pytest.MonkeyPatch, before: Callable[[Task], None]) -> None:
    """Actors that do something before each task; the class travels by value, so the package needs no hook."""

    class Meddling(driver._RayWorker):
        def run(self, task: Task, prefetch: Task | None) -> TaskReport:
            before(task)
            return super().run(task, prefetch)

    monkeypatch.setattr(driver, "_RayWorker", Meddling)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
class TestRay:
    def test_it_gives_the_bytes_of_the_local_engine(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """All files. Sums may depend on the number of threads, so what is left to this process uses the config's, too."""
        threads, keep = [], lowrank.rounding_error_sq

        def recording(*factors: torch.Tensor) -> float:
            threads.append(torch.get_num_threads())
            return keep(*factors)

        monkeypatch.setattr(lowrank, "rounding_error_sq", recording)
        try:
            for engine in ("local", "ray"):
                torch.set_num_threads(2)
                runs.extract(*pair, tmp_path / engine, engine=engine, rank=16, dtype="bfloat16")
        finally:
            torch.set_num_threads(1)
        assert set(threads) == {1}
        local, ray = (runs.contents(tmp_path / engine) for engine in ("local", "ray"))
        assert len(local) == len(reducer.PUBLISHED)
        assert ray == local

    def test_killed_actors_change_no_byte(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charges: list[tuple[str, str, bool]]
    ) -> None:  # fmt: skip
        """All that work are shot; others take their places and repeat what was lost."""
        pids = tmp_path / "pids"
        pids.mkdir()

        def slowly(_task: Task) -> None:
            (pids / str(os.getpid())).touch()
            time.sleep(0.3)

        shot: list[int] = []  # on a busy machine the second worker may only join after the first report

        class Killing(runs.Watcher):
            def task_done(self, report: TaskReport) -> None:
                super().task_done(report)
                if len(self.reports) == 1:
                    shot.extend(int(path.name) for path in pids.iterdir())
                    for pid in shot:
                        os.kill(pid, signal.SIGKILL)

        use_worker(monkeypatch, slowly)
        watcher = Killing()
        runs.extract(*pair, tmp_path / "shot", engine="ray", observer=watcher)
        assert charges
        assert all(died and reason.startswith("its worker died: ") for _, reason, died in charges)
        assert shot
        assert {int(path.name) for path in pids.iterdir()} > set(shot)
        assert sorted(report.task for report in watcher.reports) == sorted(task.id for task in watcher.plan.tasks)  # fmt: skip
        runs.extract(*pair, tmp_path / "calm")
        assert runs.contents(tmp_path / "shot") == runs.contents(tmp_path / "calm")

    def test_a_task_that_kills_its_worker_is_lost_alone(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charges: list[tuple[str, str, bool]]
    ) -> None:  # fmt: skip
        def deadly(task: Task) -> None:
            if task.block.shape == (16, 32):
                os._exit(1)

        use_worker(monkeypatch, deadly)
        out = tmp_path / "out"
        flags = [
            "--base",
            str(pair[0]),
            "--tuned",
            str(pair[1]),
            "--out",
            str(out),
            "--engine",
            "ray",
            "--threads",
            "1",
        ]
        monkeypatch.setattr(sys, "argv", ["phlora", "extract", *flags, "--json"])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 3
        [run] = (out / "_runs").iterdir()
        rows = runs.rows(run)
        failed = {name: row for name, row in rows.items() if row.status == "failed"}
        assert set(failed) == {
            f"model.layers.{layer}.self_attn.{leaf}_proj.weight" for layer in (0, 1) for leaf in "kv"
        }
        for row in failed.values():
            assert row.reason.startswith("its worker died: ")
            assert row.reason.endswith("(2 attempts)")
        assert all(row.delta_norm is not None for name, row in rows.items() if name not in failed)
        assert len(charges) == 2
        assert len({block for block, _, _ in charges}) == 1
        assert not (out / "adapter_config.json").exists()

    def test_an_exception_in_a_task_costs_no_worker(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charges: list[tuple[str, str, bool]]
    ) -> None:  # fmt: skip
        stumbled = tmp_path / "stumbled"

        def once(_task: Task) -> None:
            if not stumbled.exists():
                stumbled.touch()
                raise RuntimeError("CUDA error: out of memory")

        use_worker(monkeypatch, once)
        runs.extract(*pair, tmp_path / "out", engine="ray", workers=1)
        assert [(reason, died) for _, reason, died in charges] == [("RuntimeError: CUDA error: out of memory", False)]

    def test_a_typed_error_stays_what_it_is(self, pair: tuple[Path, Path], tmp_path: Path) -> None:
        """The fine-tune is uploaded anew between planning and reading: nobody's attempt, and no mixture."""

        class Replacing(runs.Watcher):
            def planned(self, plan: Plan) -> None:
                super().planned(plan)
                toys.save(pair[1], toys.fine_tuned(toys.llama_tensors(), seed=2))

        with pytest.raises(SourceChangedError, match=r"tuned/model\.safetensors") as raised:
            runs.extract(*pair, tmp_path / "out", engine="ray", observer=Replacing())
        assert raised.value.remedy.startswith("run again once")
        assert raised.value.exit_code == 3
        [run] = (tmp_path / "out" / "_runs").iterdir()
        assert json.loads((run / "result.json").read_text())["exit_code"] == 3

    @pytest.mark.timeout(120)
    def test_a_worker_that_finds_no_place_holds_nothing_up(
        self, pair: tuple[Path, Path], tmp_path: Path, cluster: Any
    ) -> None:
        """Somebody else has one of the two processors: the other does all the work."""
        hog = cluster.remote(num_cpus=1)(Hog).remote()
        cluster.get(hog.there.remote())
        try:
            watcher = runs.Watcher()
            runs.extract(*pair, tmp_path / "out", engine="ray", workers=2, observer=watcher)
        finally:
            cluster.kill(hog)
        assert len(watcher.reports) == len(watcher.plan.tasks)

    def test_workers_that_die_at_once_blame_the_device_and_not_the_model(
        self, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, charges: list[tuple[str, str, bool]]
    ) -> None:  # fmt: skip
        class Stillborn(driver._RayWorker):
            def prepare(self, device: str, threads: int) -> str:
                os._exit(1)

        monkeypatch.setattr(driver, "_RayWorker", Stillborn)
        monkeypatch.setattr(driver.starts, "PATIENCE_SECONDS", 1.0)
        with pytest.raises(DeviceError, match="workers died before their first task"):
            runs.extract(*pair, tmp_path / "out", engine="ray", workers=1)
        assert charges == []

    @pytest.mark.parametrize(
        ("asked", "words"),
        [
            ({"device": "cuda"}, "has 0 GPUs and 2 processors; one worker asks for 1 GPU"),
            ({"threads": 3}, "2 processors; one worker asks for 3"),
            # Not to be waited for: which kind of node it is that will come, `auto` cannot know.
            ({"threads": 3, "workers": 1, "device": "auto"}, "2 processors; one worker asks for 3"),
        ],
    )
    def test_what_the_cluster_cannot_give_is_said_before_any_work(
        self, asked: dict[str, object], words: str, pair: tuple[Path, Path], tmp_path: Path
    ) -> None:
        before = torch.get_num_threads()
        try:
            with pytest.raises(DeviceError, match=words) as raised:
                runs.extract(*pair, tmp_path / "out", engine="ray", **asked)
        finally:
            torch.set_num_threads(before)
        assert raised.value.exit_code == 14
        assert raised.value.remedy

    def test_a_command_joins_the_cluster_of_ray_address(
        self, pair: tuple[Path, Path], tmp_path: Path, cluster: Any
    ) -> None:
        """From a process of its own, as a job does; and leaves no actor behind."""
        flags = ["--base", str(pair[0]), "--tuned", str(pair[1]), "--rank", "8", "--dtype", "float32", "--threads", "1"]
        address = cluster.get_runtime_context().gcs_address
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "phlora_pipeline",
                "extract",
                *flags,
                "--out",
                str(tmp_path / "ray"),
                "--engine",
                "ray",
            ],
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, done.stderr
        runs.extract(*pair, tmp_path / "local")
        assert runs.contents(tmp_path / "ray") == runs.contents(tmp_path / "local")
        deadline = time.monotonic() + 30
        while cluster.available_resources().get("CPU", 0) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.2)


class Hog:
    """An actor that is just there."""

    def there(self) -> bool:
        return True
