"""Where a model stands, and why it is due: told from listings and small files, by what has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import storage
from phlora_pipeline.lowrank import PROFILES
from phlora_pipeline.zoo.catalog import catalog
from phlora_pipeline.zoo.standing import Standing, asked_of, request_id, standings
from phlora_pipeline.zoo.state import Ledger
from phlora_pipeline.zoofile import ExtractSettings, merge
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Zoo


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """One published model."""
    made = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    made.add_base()
    made.add("m", toys.fine_tuned(nights.tensors(), seed=1))
    assert made.night().exit_code == 0
    return made


def stand(zoo: Zoo, **others: Any) -> Standing:
    config = zoo.config(**others)
    [found] = standings(catalog(config), Ledger.read(config.output))
    return found


def new_base(zoo: Zoo) -> None:
    shutil.rmtree(zoo.root / "bases" / "b")
    zoo.add_base(seed=5)


def new_checkpoint(zoo: Zoo) -> None:
    zoo.add("m", toys.fine_tuned(nights.tensors(), seed=2))


def new_config(zoo: Zoo) -> None:
    file = zoo.root / "tuned" / "m" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "note": 1}))


@pytest.mark.parametrize(
    ("change", "told"), [(new_base, ": base"), (new_checkpoint, ": checkpoint"), (new_config, ": checkpoint")]
)
def test_what_has_changed_is_named(zoo: Zoo, change: Callable[[Zoo], None], told: str) -> None:
    before = stand(zoo)
    assert before.state == "published"
    change(zoo)
    after = stand(zoo)
    assert after.state == "due"
    assert after.reason.startswith("changed since 20")
    assert after.reason.endswith(told)
    assert after.request != before.request


def test_other_settings_are_named_and_the_old_ones_are_settled_still(zoo: Zoo) -> None:
    after = stand(zoo, extract={"rank": 2, "dtype": "float32"})
    assert (after.state, after.reason.rpartition(": ")[2]) == ("due", "settings")
    assert stand(zoo).state == "published"


def test_a_base_that_cannot_be_read_blocks_and_one_that_is_being_uploaded_waits(zoo: Zoo) -> None:
    file = zoo.root / "bases" / "b" / "model.safetensors"
    data = file.read_bytes()
    file.unlink()
    blocked = stand(zoo)
    assert (blocked.state, blocked.reason.startswith("its base: ")) == ("blocked", True)
    (file.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "model-1.safetensors"}}))
    waiting = stand(zoo)
    assert waiting.state == "incomplete"
    assert "model-1.safetensors is missing" in waiting.reason
    assert data


def test_no_shard_is_opened(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    real = storage.read_ranges

    def noted(ranges: Any) -> None:
        read.extend(piece.url for piece in ranges)
        real(ranges)

    monkeypatch.setattr(storage, "read_ranges", noted)
    monkeypatch.setattr("phlora_pipeline.storage.verbs.read_ranges", noted)
    stand(zoo)
    assert not [url for url in read if url.endswith(".safetensors")]


def test_a_profile_is_read_once_for_all_models(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zoo.add("n", toys.fine_tuned(nights.tensors(), seed=3))
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({**asdict(PROFILES["cpu"]), "name": "here"}))
    asked: list[str] = []
    real = storage.stat
    monkeypatch.setattr(storage, "stat", lambda url: asked.append(url) or real(url))
    config = zoo.config(extract={"rank": 4, "dtype": "float32", "profile": str(profile)})
    found = standings(catalog(config), Ledger.read(config.output))
    assert [standing.state for standing in found] == ["due", "due"]
    assert asked.count(str(profile)) == 1


def test_a_request_is_what_decides_the_bytes_and_nothing_else() -> None:
    plain = merge([ExtractSettings()])
    one = request_id(asked_of("b", "t", plain, "name", {}))
    assert one == request_id(asked_of("b", "t", merge([ExtractSettings(preset=None)]), "name", {}))
    others = [
        asked_of("x", "t", plain, "name", {}), asked_of("b", "x", plain, "name", {}), asked_of("b", "t", plain, "x", {}),
        asked_of("b", "t", merge([ExtractSettings(rank=8)]), "name", {}),
    ]  # fmt: skip
    assert len({one, *map(request_id, others)}) == 5
