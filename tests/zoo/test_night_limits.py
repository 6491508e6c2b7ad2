"""What one night may take, and how it comes to an early end: what is left over is due again, and goes on from its parts."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import storage
from phlora_pipeline.errors import CredentialsError, DeviceError, PhloraError, RequestError, StorageError
from phlora_pipeline.zoo import lead, prepare, state
from phlora_pipeline.zoo.publish import Publish, Published
from phlora_pipeline.zoo.result import STOPPED
from phlora_pipeline.zoo.standing import Standing
from phlora_pipeline.zoofile import ZooConfig
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo, of, states, watched_writes

CHECKPOINT = sum(4 * tensor.numel() for tensor in nights.tensors().values())
"""Bytes of a model's tensors."""

BLOCKS = len({tensor.shape for tensor in nights.tensors().values()})
"""And how many blocks they are in."""


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Five models of one base."""
    made = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    base = made.add_base()
    for seed in range(1, 6):
        made.add(f"m{seed}", toys.fine_tuned(base, seed=seed))
    return made


def alone(**run: object) -> dict[str, object]:
    """One model after another."""
    return {**nights.PLAIN, "share_base": "off", **run}


def test_max_models_are_converted_and_the_rest_waits_its_turn(zoo: Zoo) -> None:
    counts = [zoo.night(limits={"max_models": 2}).counts for _ in range(4)]
    assert counts == [
        {"committed": 2, "deferred": 3},
        {"committed": 2, "deferred": 1, "published": 2},
        {"committed": 1, "published": 4},
        {"published": 5},
    ]


def test_failures_do_not_keep_others_from_their_turn(zoo: Zoo) -> None:
    """With one model a night, one that fails is not tried again before all others had their turn."""
    zoo.add("a-poison", nights.poisoned(nights.tensors()))
    ended = [zoo.night(limits={"max_models": 1}) for _ in range(6)]
    assert [next(model.id for model in night.models if model.state in {"failed", "committed"}) for night in ended] == [
        "a-poison", "m1", "m2", "m3", "m4", "m5"
    ]  # fmt: skip


@pytest.mark.parametrize("share", ["max", "off", "auto"])
@pytest.mark.parametrize("models", [2, 3])
def test_max_bytes_are_not_exceeded(zoo: Zoo, share: str, models: int) -> None:
    """Of the base too, which is read once or for each: for each with `auto`, too, where computing takes so much longer."""
    bases = 1 if share == "max" else models
    limit = (models + bases) * CHECKPOINT
    result = zoo.night(limits={"max_bytes": limit}, run={**nights.PLAIN, "share_base": share})
    assert result.read_bytes <= limit
    assert result.counts == {"committed": models, "deferred": 5 - models}


def test_a_limit_below_one_model_still_converts_one(zoo: Zoo) -> None:
    """Otherwise a large model would wait for ever, and say nothing."""
    assert zoo.night(limits={"max_bytes": 1}).counts == {"committed": 1, "deferred": 4}


def test_a_model_too_large_for_what_is_left_keeps_no_smaller_one_waiting(zoo: Zoo) -> None:
    zoo.add("m2", {name: tensor.double() for name, tensor in toys.fine_tuned(nights.tensors(), seed=8).items()})
    result = zoo.night(limits={"max_bytes": 3 * CHECKPOINT}, run=alone(share_base="max"))
    assert {name for name, ended in states(result).items() if ended == "committed"} == {"m1", "m3"}
    assert result.read_bytes == 3 * CHECKPOINT


def test_after_max_minutes_nothing_begins_and_what_has_begun_ends(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    watcher, now = Watcher(), [0.0]
    monkeypatch.setattr(lead.time, "monotonic", lambda: now[0])

    def done() -> None:
        now[0] = 30.0 if len(watcher.reports) <= BLOCKS else 61.0  # the second model has just begun

    watcher._done = done
    result = zoo.night(watcher, limits={"max_minutes": 1}, run=alone())
    assert len({report.task for report in watcher.reports}) == len(watcher.reports)
    assert (result.exit_code, result.counts) == (0, {"committed": 2, "deferred": 3})
    assert all("max_minutes" in model.reason for model in result.models if model.state == "deferred")
    rest = zoo.night(run=alone())
    assert rest.counts == {"committed": 3, "published": 2}
    nights.require_whole(zoo.out)


def test_what_stands_gets_its_record_though_the_minutes_are_over(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs a moment, and no tensor."""
    zoo.night(limits={"max_models": 1})
    [record] = [name for name in nights.names(zoo.out) if name.endswith("/outcome.json")]
    storage.delete(storage.join(zoo.out, record))
    now = itertools.count(step=100.0)
    monkeypatch.setattr(lead.time, "monotonic", lambda: next(now))
    result = zoo.night(limits={"max_minutes": 1}, run=alone())
    assert (result.counts, result.read_bytes) == ({"committed": 1, "deferred": 4}, 0)


def test_more_than_max_models_due_need_a_yes(zoo: Zoo) -> None:
    with pytest.raises(
        RequestError, match=r"5 models are due, more than limits.max_models_due \(4\): 5 × new"
    ) as refused:
        zoo.night(limits={"max_models_due": 4})
    assert "--yes" in refused.value.remedy
    assert nights.names(zoo.out) == set()
    assert zoo.night(limits={"max_models_due": 4}, yes=True).counts == {"committed": 5}
    assert zoo.night(limits={"max_models_due": 4}).counts == {"published": 5}
    with pytest.raises(RequestError, match=r"5 × changed since .*: settings"):
        zoo.night(limits={"max_models_due": 4}, extract={"rank": 2})
    assert zoo.night(limits={"max_models_due": 5}, extract={"rank": 2}).counts == {"committed": 5}


# ---------------------------------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize(("share", "after"), [("max", 0), ("max", 1), ("max", 3), ("off", 1), ("off", 4), ("off", 6)])
def test_a_night_that_is_stopped_goes_on_from_its_parts(zoo: Zoo, tmp_path: Path, share: str, after: int) -> None:
    run = alone(share_base=share)
    watcher = Watcher()
    with watched_writes() as first:
        stopped = zoo.night(watcher, run=run, stopping=lambda: len(watcher.reports) >= after)
    assert (stopped.exit_code, len(watcher.reports)) == (STOPPED, after)
    assert set(stopped.counts) <= {"committed", "deferred"}
    assert stopped.counts.get("committed", 0) == (1 if share == "off" and after >= 4 else 0)
    [told] = [name for name in nights.names(zoo.out) if name.endswith("/result.json")]
    assert json.loads((Path(zoo.out) / told).read_text())["exit_code"] == STOPPED
    with watched_writes() as second:
        rest = zoo.night(run=run)
    assert (rest.exit_code, stopped.read_bytes + rest.read_bytes) == (0, CHECKPOINT * (6 if share == "max" else 10))
    parts = first.of_parts() + second.of_parts()
    assert len(parts) == 5 * BLOCKS
    assert set(parts.values()) == {1}
    calm = Zoo(zoo.root, str(tmp_path / "calm"))
    calm.night(run=run)
    assert nights.left_behind(zoo.out) == nights.left_behind(calm.out)


def test_one_that_is_stopped_while_it_plans_plans_no_further(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers of thousands of models take longer than Ray waits before it kills."""
    opened: list[str] = []
    monkeypatch.setattr(prepare, "_OPENERS", 1)
    real = prepare.plan_one

    def noted(config: ZooConfig, standing: Standing, *others: Any) -> Any:
        opened.append(standing.entry.id)
        time.sleep(0.1)  # so long the main thread has to say that it is enough
        return real(config, standing, *others)

    monkeypatch.setattr(prepare, "plan_one", noted)
    result = zoo.night(stopping=lambda: bool(opened))
    assert (result.exit_code, result.counts, result.read_bytes) == (STOPPED, {"deferred": 5}, 0)
    assert len(opened) < 5
    assert "before it was planned" in of(result, "m5").reason


def test_one_stopped_before_it_began_converts_nothing_and_blames_nobody(zoo: Zoo) -> None:
    result = zoo.night(stopping=lambda: True)
    assert (result.exit_code, result.counts, result.read_bytes) == (STOPPED, {"deferred": 5}, 0)
    assert zoo.night().counts == {"committed": 5}


# ----------------------------------------------------------------------------------- publications that fail for no good reason


def stumbling(monkeypatch: pytest.MonkeyPatch, model: str, times: int) -> None:
    """Its publication fails as a bug would, so many times."""
    real, left = Publish.run, [None] * times

    def run(job: Publish) -> Published:
        if job.model == model and left:
            left.pop()
            raise RuntimeError("no space in shared memory")
        return real(job)

    monkeypatch.setattr(Publish, "run", run)


@pytest.mark.parametrize("model", ["m1", "m5"])
def test_a_publication_that_fails_once_is_done_again(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Whichever it is: the last one too."""
    stumbling(monkeypatch, model, 1)
    result = zoo.night(run=alone())
    assert (result.exit_code, result.counts) == (0, {"committed": 5})


def test_one_that_fails_twice_is_a_failed_model_with_the_reason(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    stumbling(monkeypatch, "m5", 2)
    result = zoo.night(run=alone())
    assert (result.exit_code, result.counts) == (3, {"committed": 4, "failed": 1})
    assert "its publication failed: RuntimeError: no space in shared memory" in of(result, "m5").reason
    assert state.retry(zoo.out, "m5") == 1
    assert zoo.night().counts == {"committed": 1, "published": 4}


@pytest.mark.parametrize("kind", [CredentialsError, StorageError, DeviceError])
def test_whom_no_model_can_be_blamed_for_ends_the_night(
    zoo: Zoo, monkeypatch: pytest.MonkeyPatch, kind: type[PhloraError]
) -> None:
    """Of a publication alone: the node of its desk may have other credentials than the driver, who could write an attempt."""

    def refused(job: Publish) -> Published:
        raise kind("not here")

    with monkeypatch.context() as patch:
        patch.setattr(Publish, "run", refused)
        with pytest.raises(kind) as stopped:
            zoo.night(run=alone())
    assert json.loads(Path(stopped.value.result).read_text())["exit_code"] == kind.exit_code
    assert not any(name.startswith("_state/") for name in nights.names(zoo.out))
    assert zoo.night(run=alone()).counts == {"committed": 5}


def test_a_checkpoint_that_comes_back_while_it_is_read_needs_only_its_record(zoo: Zoo) -> None:
    """Replaced during the night by one that was converted long ago, whose record was lost: it stands, and is told so."""
    zoo.night(discover=[{"prefix": str(zoo.root / "tuned"), "base": "b", "exclude": ["m[2-5]"]}])
    tuned = zoo.root / "tuned" / "m1"
    other = zoo.root / "old"
    tuned.rename(other)
    zoo.add("m1", toys.fine_tuned(nights.tensors(), seed=50))
    watcher = Watcher()

    def back() -> None:
        if len(watcher.reports) == 1:
            tuned.rename(zoo.root / "new")
            other.rename(tuned)

    watcher._done = back
    [record] = [name for name in nights.names(zoo.out) if name.startswith("_state/m1/")]
    storage.delete(storage.join(zoo.out, record))
    result = zoo.night(watcher, discover=[{"prefix": str(zoo.root / "tuned"), "base": "b", "exclude": ["m[2-5]"]}])
    assert (result.exit_code, states(result)) == (0, {"m1": "committed"})
