"""A small zoo to spend nights in: checkpoints of a few kilobytes, what a night was told, and what it left behind."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from phlora_pipeline import storage, zoofile
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.plan import Task
from phlora_pipeline.zoo import layout, night
from phlora_pipeline.zoo.result import ModelResult, NightResult
from phlora_pipeline.zoo.standing import Standing
from phlora_pipeline.zoofile import ZooConfig
from tests import toys

PLAIN = {"engine": "local", "device": "cpu", "threads": 1}


def tensors(seed: int = 0) -> dict[str, Tensor]:
    """A base: five matrices in three shapes, and a norm."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"q_proj": (16, 16), "k_proj": (8, 16), "v_proj": (8, 16), "o_proj": (16, 16)}
    made = {
        f"model.layers.0.self_attn.{leaf}.weight": torch.randn(shape, generator=generator)
        for leaf, shape in shapes.items()
    }
    made["model.layers.0.mlp.down_proj.weight"] = torch.randn((16, 24), generator=generator)
    made["model.layers.0.input_layernorm.weight"] = torch.randn((16,), generator=generator)
    return made


def poisoned(base: Mapping[str, Tensor], seed: int = 9) -> dict[str, Tensor]:
    """A fine-tune with one NaN."""
    bad = toys.fine_tuned(base, seed=seed)
    bad["model.layers.0.self_attn.q_proj.weight"][3, 2] = float("nan")
    return bad


class Watcher:
    """An observer that remembers, and can be told to interfere."""

    def __init__(
        self, *, planned: Callable[[], object] = lambda: None, done: Callable[[], object] = lambda: None
    ) -> None:
        self._planned, self._done = planned, done
        self.standings: dict[str, Standing] = {}
        self.tasks: list[Task] = []
        self.reports: list[TaskReport] = []
        self.models: list[tuple[str, str, str]] = []
        self.warnings: list[str] = []

    def looked(self, standings: Sequence[Standing]) -> None:
        self.standings = {standing.entry.id: standing for standing in standings}

    def planned(self, tasks: Sequence[Task], models: int) -> None:
        self.tasks = list(tasks)
        self._planned()

    def task_done(self, report: TaskReport) -> None:
        self.reports.append(report)
        self._done()

    def model_done(self, model: str, state: str, reason: str) -> None:
        self.models.append((model, state, reason))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Zoo:
    """A folder of bases and fine-tunes, and an output beside it.

    Attributes:
        root: where the checkpoints are.
        out: URL of the output.
        settings: of the zoo.yaml, beside the places.
    """

    root: Path
    out: str
    settings: dict[str, Any] = field(default_factory=dict)

    def add_base(self, name: str = "b", seed: int = 0) -> dict[str, Tensor]:
        """Write a base; its tensors."""
        toys.save(self.root / "bases" / name, tensors(seed))
        return tensors(seed)

    def add(self, name: str, weights: Mapping[str, Tensor], *, shards: int = 1, under: str = "tuned") -> Path:
        """Write a fine-tune, or replace it."""
        folder = self.root / under / name
        if folder.exists():
            shutil.rmtree(folder)
        return toys.save(folder, dict(weights), shards=shards)

    def config(self, **others: Any) -> ZooConfig:
        """As the zoo.yaml of tonight says."""
        plain: dict[str, Any] = {
            "output": self.out,
            "bases": {path.name: str(path) for path in sorted((self.root / "bases").iterdir())},
            "discover": [{"prefix": str(self.root / "tuned"), "base": "b"}],
            "extract": {"rank": 4, "dtype": "float32"},
            "run": PLAIN,
        }
        return zoofile.loads(json.dumps({**plain, **self.settings, **others}))

    def night(self, watcher: Watcher | None = None, *, yes: bool = False, stopping: Callable[[], bool] = lambda: False, **others: Any) -> NightResult:  # fmt: skip
        """Spend one."""
        return night.night(self.config(**others), watcher or Watcher(), yes=yes, stopping=stopping)


def states(result: NightResult) -> dict[str, str]:
    return {model.id: model.state for model in result.models}


def of(result: NightResult, model: str) -> ModelResult:
    return next(found for found in result.models if found.id == model)


def names(out: str, under: str = "") -> set[str]:
    """Every object of an output, relative to it."""
    return {info.url.removeprefix(f"{out}/") for info in storage.list_tree(storage.join(out, under) if under else out)}


def left_behind(out: str) -> dict[str, Any]:
    """What a night leaves for others: all but its diary, and without the moments at which records were made."""
    found: dict[str, Any] = {}
    for info in storage.list_tree(out):
        name = info.url.removeprefix(f"{out}/")
        if name.startswith("_runs/"):
            continue
        data: Any = storage.read_object(info, limit=1 << 30)
        if storage.basename(name) in {layout.LATEST, "outcome.json"} or "/attempt-" in name:
            data = {key: value for key, value in json.loads(data).items() if key not in {"began", "ended", "run"}}
        found[name] = data
    return found


def require_whole(out: str) -> None:
    """Whatever a reader could come across is whole: adapters, pointers, and records of what is done."""
    there = {info.url.removeprefix(f"{out}/"): info for info in storage.list_tree(out)}

    def text(name: str) -> dict[str, Any]:
        return dict(json.loads(storage.read_object(there[name], limit=1 << 20)))

    committed = {name.rpartition("/")[0] for name in there if storage.basename(name) == layout.CONFIG}
    for folder in committed:
        assert {f"{folder}/{name}" for name in layout.PUBLISHED} <= there.keys(), folder
        weights = there[f"{folder}/{layout.WEIGHTS}"]
        told = text(f"{folder}/{layout.RUN}")["weights"]
        data = storage.read_object(weights, limit=1 << 30)
        assert (len(data), hashlib.sha256(data).hexdigest()) == (told["bytes"], told["sha256"])
    for name in there:
        model, _, rest = name.partition("/")
        if rest == layout.LATEST:
            assert f"{model}/{text(name)['version']}" in committed
        if name.startswith("_state/") and name.endswith("/outcome.json"):
            model, told = name.split("/")[1], text(name)
            assert any(copy.endswith(f"/model={model}/{told['version']}.parquet") for copy in there)
            if told["outcome"] == "committed":
                assert f"{model}/{told['version']}" in committed
                assert f"{model}/{layout.LATEST}" in there


_PROCESS = """
import json, sys
import torch
from pathlib import Path
from tests.zoo.nights import Zoo
torch.set_num_threads(1)
zoo = Zoo(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
print("ready", flush=True)
sys.stdin.readline()
result = zoo.night()
print(json.dumps({"counts": result.counts, "exit_code": result.exit_code}), flush=True)
"""


def process(zoo: Zoo) -> subprocess.Popen[str]:
    """A night in a process of its own, which begins when it is told to."""
    started = subprocess.Popen(
        [sys.executable, "-c", _PROCESS, str(zoo.root), zoo.out, json.dumps(zoo.settings)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert started.stdout is not None
    assert started.stdout.readline() == "ready\n"
    return started


def go(*waiting: subprocess.Popen[str]) -> None:
    """All at once."""
    for one in waiting:
        assert one.stdin is not None
        one.stdin.write("go\n")
        one.stdin.flush()


class Stopped(BaseException):
    """The process is gone: nobody handles it."""


@dataclass
class Writes:
    """Every call that changes the store, in order; one of them can be made the last thing that never happened."""

    calls: list[tuple[str, str]] = field(default_factory=list)
    before: Callable[[int], object] = lambda number: None

    def of_parts(self) -> Counter[str]:
        """How often each part was put."""
        return Counter(url for verb, url in self.calls if verb == "put_new" and "/_parts/" in url)


@contextlib.contextmanager
def watched_writes(before: Callable[[int], object] = lambda number: None) -> Iterator[Writes]:
    """Count the store's writes, and do something before each: raise `Stopped`, for example."""
    seen = Writes(before=before)
    with pytest.MonkeyPatch.context() as patch:
        for verb in ("put_new", "swap", "delete"):
            patch.setattr(storage, verb, _counted(getattr(storage, verb), verb, seen))
        yield seen


def _counted(real: Callable[..., Any], verb: str, seen: Writes) -> Callable[..., Any]:
    def call(url: str, *arguments: Any, **named: Any) -> Any:
        seen.before(len(seen.calls))
        seen.calls.append((verb, url))
        return real(url, *arguments, **named)

    return call
