"""A night on four nodes of eight GPUs: the adapters of a plain loop, and nothing left to do."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import toys
from tests.ray_cluster import FakeCluster, kill, running_cluster
from tests.zoo import nights
from tests.zoo.nights import Zoo

pytestmark = [pytest.mark.slow, pytest.mark.ray]

BASES, WORKERS = 3, 8

ON_RAY = {"engine": "ray", "device": "auto", "gpus_per_worker": 0.5, "workers": WORKERS, "threads": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[FakeCluster]:
    with running_cluster(4) as running:
        yield running


def zoo_of(root: Path, out: Path, models: int, run: dict[str, Any]) -> Zoo:
    """Models in turns on three bases."""
    zoo = Zoo(root, str(out), {"run": run})
    rules = [{"match": f"{name}-*", "base": name} for name in "abc"[:BASES]]
    zoo.settings["discover"] = [{"prefix": str(root / "tuned"), "rules": rules}]
    bases = {name: zoo.add_base(name, seed=number) for number, name in enumerate("abc"[:BASES])}
    for number in range(models):
        name = "abc"[number % BASES]
        zoo.add(f"{name}-{number:02d}", toys.fine_tuned(bases[name], seed=number))
    return zoo


def night(zoo: Zoo) -> dict[str, Any]:
    """In a process of its own, as a job does it; what it says at its end."""
    process = nights.process(zoo)
    nights.go(process)
    try:
        told, errors = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    return dict(json.loads(told))


@pytest.mark.timeout(400)
def test_what_is_wrong_is_told_apart_there_too(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    zoo = zoo_of(tmp_path / "zoo", tmp_path / "out", 3, {**ON_RAY, "workers": 2})
    zoo.add("a-poison", nights.poisoned(nights.tensors(0)))
    zoo.add("b-stranger", nights.tensors(seed=9))
    missing = zoo.add("c-missing", toys.fine_tuned(nights.tensors(2)), shards=2)
    (missing / "model-00002-of-00002.safetensors").unlink()
    assert night(zoo) == {"counts": {"committed": 3, "failed": 2, "incomplete": 1}, "exit_code": 3}
    nights.require_whole(zoo.out)


@pytest.mark.timeout(400)
def test_a_publication_is_not_blamed_for_the_processes_that_it_loses(
    cluster: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with nodes that are taken away: twice in a night is bad luck, and no reason to give a model up."""
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    zoo = zoo_of(tmp_path / "zoo", tmp_path / "out", 1, {**ON_RAY, "workers": 2})
    process = nights.process(zoo)
    nights.go(process)
    shot: set[int] = set()
    deadline = time.monotonic() + 150
    while process.poll() is None and time.monotonic() < deadline:
        for pid in cluster.workers("ray::Desk"):
            if pid not in shot and len(shot) < 3:
                shot.add(pid)
                kill(pid)
        time.sleep(0.01)
    told, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert json.loads(told.splitlines()[-1]) == {"counts": {"committed": 1}, "exit_code": 0}, told
    assert len(shot) == 3
    nights.require_whole(zoo.out)
