"""A night on real files: what is due is converted, what is wrong is told apart, and a settled zoo is left alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import lowrank, storage
from phlora_pipeline.errors import RequestError
from phlora_pipeline.zoo import latest, layout, state
from phlora_pipeline.zoo.result import NightResult
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo, of, states, watched_writes


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Of one base, and no model yet."""
    made = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    made.add_base()
    return made


@pytest.fixture
def shards_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URLs of the weight files that were read, header or tensors."""
    seen: list[str] = []
    real = storage.read_ranges

    def counted(ranges: Any) -> None:
        seen.extend(piece.url for piece in ranges if piece.url.endswith(".safetensors"))
        real(ranges)

    monkeypatch.setattr(storage, "read_ranges", counted)
    return seen


def models_read(tasks: Watcher) -> set[str]:
    return {member.model for task in tasks.tasks for member in task.members}


# ------------------------------------------------------------------------------------------------------------- what is due


def test_a_second_night_reads_and_writes_nothing(zoo: Zoo, shards_read: list[str]) -> None:
    for seed in (1, 2, 3):
        zoo.add(f"m{seed}", toys.fine_tuned(nights.tensors(), seed=seed))
    first = zoo.night(run={**nights.PLAIN, "share_base": "max"})
    assert (first.exit_code, first.counts) == (0, {"committed": 3})
    assert first.read_bytes == 4 * sum(4 * tensor.numel() for tensor in nights.tensors().values())
    nights.require_whole(zoo.out)
    before = nights.names(zoo.out)
    shards_read.clear()
    with watched_writes() as writes:
        second = zoo.night()
    assert (second.exit_code, second.counts, second.run, second.read_bytes) == (0, {"published": 3}, "", 0)
    assert (shards_read, writes.calls) == ([], [])
    assert nights.names(zoo.out) == before
    assert [of(second, "m1").version] == [of(first, "m1").version]


def test_one_new_and_one_replaced_are_exactly_what_is_converted(zoo: Zoo, shards_read: list[str]) -> None:
    base = nights.tensors()
    for seed in (1, 2, 3):
        zoo.add(f"m{seed}", toys.fine_tuned(base, seed=seed))
    zoo.night()
    before = nights.left_behind(zoo.out)
    zoo.add("m2", toys.fine_tuned(base, seed=22))
    zoo.add("m4", toys.fine_tuned(base, seed=4))
    shards_read.clear()
    watcher = Watcher()
    result = zoo.night(watcher)
    assert states(result) == {"m1": "published", "m2": "committed", "m3": "published", "m4": "committed"}
    assert models_read(watcher) == {"m2", "m4"}
    assert {Path(url).parent.name for url in shards_read if "/tuned/" in url} == {"m2", "m4"}
    after = nights.left_behind(zoo.out)
    assert {name: after[name] for name in before if name != "m2/latest.json"} == {
        name: data for name, data in before.items() if name != "m2/latest.json"
    }
    served = latest.read(zoo.out, "m2")
    assert served is not None
    assert served.version == of(result, "m2").version
    assert len(latest.versions(zoo.out, "m2")) == 2


def served(zoo: Zoo, result: NightResult | None = None) -> dict[str, str]:
    """Model → the version that its pointer names, after a night that went well."""
    assert result is None or result.exit_code == 0
    found = {path.parent.name: latest.read(zoo.out, path.parent.name) for path in Path(zoo.out).glob("*/latest.json")}
    return {model: pointer.version for model, pointer in sorted(found.items()) if pointer}


def test_a_checkpoint_that_equals_its_base_is_settled_without_an_adapter(zoo: Zoo) -> None:
    zoo.add("same", nights.tensors())
    first, second = zoo.night(), zoo.night()
    assert (first.exit_code, states(first)) == (0, {"same": "nothing_to_adapt"})
    assert (second.exit_code, states(second), second.run) == (0, {"same": "unchanged"}, "")
    assert not any(name.endswith((layout.CONFIG, layout.LATEST)) for name in nights.names(zoo.out))


def test_other_settings_make_a_model_due_and_the_former_ones_again_serve_what_stands(zoo: Zoo) -> None:
    for seed in (1, 2):
        zoo.add(f"m{seed}", toys.fine_tuned(nights.tensors(), seed=seed))
    first = zoo.night()
    watcher = Watcher()
    second = zoo.night(watcher, overrides=[{"match": "m2", "extract": {"rank": 2}}])
    assert states(second) == {"m1": "published", "m2": "committed"}
    assert "settings" in watcher.standings["m2"].reason
    assert of(second, "m2").version != of(first, "m2").version
    assert served(zoo) == {"m1": of(first, "m1").version, "m2": of(second, "m2").version}
    watcher = Watcher()
    back = zoo.night(watcher)
    assert "another version has been served since" in watcher.standings["m2"].reason
    assert (back.exit_code, back.read_bytes, states(back)) == (0, 0, {"m1": "published", "m2": "committed"})
    assert served(zoo) == {"m1": of(first, "m1").version, "m2": of(first, "m2").version}
    assert zoo.night().run == ""


def test_a_pin_holds_though_another_version_is_asked_for_again(zoo: Zoo) -> None:
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    versions = [of(zoo.night(extract={"rank": rank, "dtype": "float32"}), "m1").version for rank in (4, 2)]
    latest.rollback(zoo.out, "m1", versions[1])
    assert zoo.night().counts == {"committed": 1}
    assert served(zoo) == {"m1": versions[1]}
    assert zoo.night().run == ""
    latest.unpin(zoo.out, "m1")
    assert served(zoo) == {"m1": versions[0]}


def test_a_lost_pointer_is_put_back(zoo: Zoo) -> None:
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    before = served(zoo, zoo.night())
    storage.delete(storage.join(zoo.out, "m1", layout.LATEST))
    again = zoo.night()
    assert (served(zoo, again), again.read_bytes) == (before, 0)
    assert zoo.night().run == ""


def test_a_moved_prefix_makes_nothing_due(zoo: Zoo) -> None:
    """A rename keeps what identifies a local file; where it is has no say."""
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    first = zoo.night()
    (zoo.root / "tuned").rename(zoo.root / "elsewhere")
    second = zoo.night(discover=[{"prefix": str(zoo.root / "elsewhere"), "base": "b"}])
    assert (second.run, states(second), of(second, "m1").version) == ("", {"m1": "published"}, of(first, "m1").version)


def test_models_of_the_same_bytes_are_two_adapters(zoo: Zoo) -> None:
    for name in ("one", "two"):
        zoo.add(name, toys.fine_tuned(nights.tensors()))
    assert states(zoo.night()) == {"one": "committed", "two": "committed"}
    left = nights.left_behind(zoo.out)
    weights = {name: data for name, data in left.items() if name.endswith(layout.WEIGHTS)}
    assert sorted(name.split("/")[0] for name in weights) == ["one", "two"]
    assert len(set(weights.values())) == 1
    nights.require_whole(zoo.out)
    assert not any(name.startswith("_parts/") for name in left)


# ----------------------------------------------------------------------------------------------------------- what is wrong


def wrong_zoo(zoo: Zoo) -> None:
    base = nights.tensors()
    zoo.add("good", toys.fine_tuned(base))
    zoo.add("poison", nights.poisoned(base))
    zoo.add("stranger", nights.tensors(seed=5))
    missing = zoo.add("missing", toys.fine_tuned(base, seed=3), shards=2)
    (missing / "model-00002-of-00002.safetensors").unlink()
    short = zoo.add("short", toys.fine_tuned(base, seed=4)) / "model.safetensors"
    short.write_bytes(short.read_bytes()[:-100])


def test_each_gets_its_reason_and_the_others_are_published(zoo: Zoo) -> None:
    wrong_zoo(zoo)
    result = zoo.night()
    assert result.exit_code == 3
    assert states(result) == {
        "good": "committed", "poison": "failed", "stranger": "failed", "missing": "incomplete", "short": "incomplete"
    }  # fmt: skip
    assert "q_proj" in of(result, "poison").reason
    assert "NaN" in of(result, "poison").reason
    assert "not a fine-tune of this base" in of(result, "stranger").reason
    assert "model-00002-of-00002.safetensors is missing" in of(result, "missing").reason
    assert "model.safetensors" in of(result, "short").reason
    assert all(model.remedy for model in result.models if model.state != "committed")
    nights.require_whole(zoo.out)
    committed = {name.split("/")[0] for name in nights.names(zoo.out) if name.endswith(layout.CONFIG)}
    assert committed == {"good"}


def test_two_failures_are_a_quarantine_until_the_source_or_somebody_says_so(zoo: Zoo) -> None:
    wrong_zoo(zoo)
    assert zoo.night().exit_code == 3
    watcher = Watcher()
    second = zoo.night(watcher)
    assert (second.exit_code, of(second, "poison").state, of(second, "good").state) == (3, "failed", "published")
    assert not {"good", "missing", "short"} & models_read(watcher)
    third = zoo.night()
    assert third.read_bytes == 0
    assert (of(third, "poison").state, of(third, "stranger").state) == ("quarantined", "quarantined")
    assert third.exit_code == 0
    assert "NaN" in of(third, "poison").reason
    assert "phlora retry" in of(third, "poison").remedy
    assert state.retry(zoo.out, "poison") == 2
    fourth = zoo.night()
    assert (of(fourth, "poison").state, of(fourth, "stranger").state) == ("failed", "quarantined")
    zoo.add("stranger", toys.fine_tuned(nights.tensors(), seed=6))
    assert of(zoo.night(), "stranger").state == "committed"


def test_what_failed_is_computed_again_and_nothing_else(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device may be at fault: a second attempt that found the first one's failure in its part would be none."""
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    real = lowrank.decompose

    def faulty(sides: Any, names: Any, *others: Any) -> list[lowrank.Outcome]:
        found = real(sides, names, *others)
        return [replace(one, factors=None, failure="it broke") if "down_proj" in name else one for one, name in zip(found, names, strict=True)]  # fmt: skip

    with monkeypatch.context() as broken:
        broken.setattr(lowrank, "decompose", faulty)
        assert "it broke" in of(zoo.night(), "m1").reason
    watcher = Watcher()
    assert zoo.night(watcher).counts == {"committed": 1}
    again = [report for report in watcher.reports if not report.reused]
    assert [(report.tensors, report.failed) for report in again] == [(1, ())]
    nights.require_whole(zoo.out)


def test_what_was_incomplete_is_converted_once_it_is_whole_and_was_nobodys_failure(zoo: Zoo) -> None:
    wrong_zoo(zoo)
    for _ in range(3):
        zoo.night()
    assert not any(name.startswith(("_state/missing/", "_state/short/")) for name in nights.names(zoo.out))
    for name, seed, shards in (("missing", 3, 2), ("short", 4, 1)):
        zoo.add(name, toys.fine_tuned(nights.tensors(), seed=seed), shards=shards)
    result = zoo.night()
    assert (of(result, "missing").state, of(result, "short").state) == ("committed", "committed")


def test_a_model_without_a_base_is_blocked_and_said_each_night(zoo: Zoo) -> None:
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    zoo.add("orphan", toys.fine_tuned(nights.tensors(), seed=2))
    rules = [{"prefix": str(zoo.root / "tuned"), "rules": [{"match": "m*", "base": "b"}]}]
    for _ in range(2):
        result = zoo.night(discover=rules)
        assert (result.exit_code, of(result, "orphan").state) == (3, "blocked")
        assert "no base found" in of(result, "orphan").reason


def test_a_base_that_is_being_replaced_blocks_nobody_for_ever(zoo: Zoo) -> None:
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    weights = zoo.root / "bases" / "b" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-8])
    waiting = zoo.night()
    assert (states(waiting), waiting.exit_code) == ({"m1": "incomplete"}, 0)
    assert not any(name.startswith("_state/") for name in nights.names(zoo.out))
    weights.write_bytes(whole)
    assert states(zoo.night()) == {"m1": "committed"}


def test_allow_partial_publishes_without_the_failed_tensor_and_says_so(zoo: Zoo) -> None:
    zoo.add("poison", nights.poisoned(nights.tensors()))
    watcher = Watcher()
    result = zoo.night(watcher, run={**nights.PLAIN, "allow_partial": True})
    assert (result.exit_code, states(result)) == (0, {"poison": "committed"})
    version = of(result, "poison").version
    card = (Path(zoo.out) / "poison" / version / layout.CARD).read_text()
    assert "q_proj" in card
    assert zoo.night(run={**nights.PLAIN, "allow_partial": True}).run == ""
    nights.require_whole(zoo.out)


def test_a_refused_request_writes_nothing(zoo: Zoo) -> None:
    zoo.add("m1", toys.fine_tuned(nights.tensors()))
    with pytest.raises(RequestError, match=r"elsewhere"):
        zoo.night(discover=[{"prefix": str(zoo.root / "elsewhere"), "base": "b"}])
    assert nights.names(zoo.out) == set()
