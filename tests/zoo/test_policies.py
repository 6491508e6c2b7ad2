"""Ways to choose ranks, per model of a zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from phlora_pipeline.zoo import latest
from tests import runs, toys
from tests.zoo.nights import Watcher, Zoo, of, states

OVERRIDES: list[dict[str, Any]] = [
    {"match": "auto", "extract": {"rank": "auto"}},
    {"match": "small", "extract": {"budget": "3kB"}},
    {"match": "tiny", "extract": {"budget": "100B"}},
]


def newest(zoo: Zoo, model: str) -> Path:
    pointer = latest.read(zoo.out, model)
    assert pointer is not None
    return Path(zoo.out, model, pointer.version)


def test_each_model_has_its_own_and_a_changed_one_is_due_again(tmp_path: Path) -> None:
    zoo = Zoo(tmp_path / "zoo", str(tmp_path / "out"), {"extract": {"rank": 4, "for": "peft", "dtype": "float32"}})
    base = zoo.add_base()
    for seed, model in enumerate(("auto", "small", "tiny", "plain")):
        zoo.add(model, toys.fine_tuned(base, seed=seed + 1))
    result = zoo.night(overrides=OVERRIDES)
    assert states(result) == {"auto": "committed", "small": "committed", "plain": "committed", "tiny": "failed"}
    assert "a budget of 100 bytes does not hold the smallest adapter" in of(result, "tiny").reason
    small = newest(zoo, "small")
    assert (small / "adapter_model.safetensors").stat().st_size <= 3000
    assert len({row.rank for row in runs.rows(small).values() if row.rank is not None}) > 1
    assert {row.rank for row in runs.rows(newest(zoo, "auto")).values()} >= {
        8,
        16,
    }  # float32: all stands above its noise
    assert {row.rank for row in runs.rows(newest(zoo, "plain")).values() if row.rank is not None} == {4}

    watcher = Watcher()
    changed = [*OVERRIDES[:1], {"match": "small", "extract": {"budget": "4kB"}}, *OVERRIDES[2:]]
    again = zoo.night(watcher, overrides=changed)
    assert states(again)["small"] == "committed"
    assert {model for model, standing in watcher.standings.items() if standing.state == "due"} >= {"small"}
    assert watcher.standings["auto"].state == watcher.standings["plain"].state == "published"
    assert newest(zoo, "small") != small
