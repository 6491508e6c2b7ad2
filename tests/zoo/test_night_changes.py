"""What changes while a night reads it: converted as it is in the end, or left for the next night, and never a mixture."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from phlora_pipeline.zoo.standing import Standing
from tests import toys
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo, of, states


@pytest.fixture
def zoo(tmp_path: Path) -> Zoo:
    """Of one base, and no model yet."""
    made = Zoo(tmp_path / "zoo", str(tmp_path / "out"))
    made.add_base()
    return made


def at_task(number: int, happen: Callable[[], object]) -> Watcher:
    """Something happens once, after the nth task."""
    watcher = Watcher()

    def done() -> None:
        if len(watcher.reports) == number:
            happen()

    watcher._done = done
    return watcher


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_checkpoint_replaced_while_it_is_read_is_converted_as_it_is_now(
    zoo: Zoo, tmp_path: Path, number: int
) -> None:
    base = nights.tensors()
    zoo.add("m1", toys.fine_tuned(base))
    zoo.add("m2", toys.fine_tuned(base, seed=2))

    def replace() -> None:
        zoo.add("m2", toys.fine_tuned(base, seed=77))

    watcher = Watcher(planned=replace) if number == 0 else at_task(number, replace)
    result = zoo.night(watcher)
    assert (result.exit_code, states(result)) == (0, {"m1": "committed", "m2": "committed"})
    assert zoo.night().run == ""
    calm = Zoo(zoo.root, str(tmp_path / "calm"))
    calm.night()
    assert nights.left_behind(zoo.out) == nights.left_behind(calm.out)


@pytest.mark.parametrize("which", ["fine-tune", "base"])
def test_the_record_names_what_was_converted_though_it_was_replaced_since_it_was_looked_at(
    zoo: Zoo, which: str
) -> None:
    """Otherwise the former checkpoint, should it come back, would pass for published, with another one's adapter."""
    base = nights.tensors()
    zoo.add("m1", toys.fine_tuned(base))
    place = zoo.root / ("tuned/m1" if which == "fine-tune" else "bases/b")
    moved = {name: tensor + 1e-3 for name, tensor in base.items()}
    watcher = Watcher()
    real = watcher.looked

    def replaced(standings: Sequence[Standing]) -> None:
        real(standings)
        place.rename(zoo.root / "former")
        toys.save(place, toys.fine_tuned(base, seed=5) if which == "fine-tune" else moved)

    watcher.looked = replaced  # type: ignore[method-assign]
    first = zoo.night(watcher)
    assert states(first) == {"m1": "committed"}
    assert zoo.night().run == ""  # what it is now is settled
    shutil.rmtree(place)
    (zoo.root / "former").rename(place)
    again = zoo.night()
    assert states(again) == {"m1": "committed"}
    assert of(again, "m1").version != of(first, "m1").version


def test_a_checkpoint_that_goes_on_changing_is_left_for_the_next_night(zoo: Zoo) -> None:
    base = nights.tensors()
    zoo.add("m1", toys.fine_tuned(base))
    zoo.add("m2", toys.fine_tuned(base, seed=2))
    watcher = Watcher()
    watcher._planned = watcher._done = lambda: zoo.add("m2", toys.fine_tuned(base, seed=100 + len(watcher.reports)))
    result = zoo.night(watcher)
    assert (result.exit_code, states(result)) == (3, {"m1": "committed", "m2": "changed"})
    assert not any(name.startswith(("m2/", "_parts/m2")) for name in nights.names(zoo.out))
    for _ in range(2):  # nobody's failure: it is never quarantined for that
        assert zoo.night(watcher).exit_code == 3
    assert states(zoo.night()) == {"m1": "published", "m2": "committed"}


@pytest.mark.parametrize("what", ["removed", "incomplete", "pickle"])
def test_a_checkpoint_that_goes_away_while_it_is_read_takes_nobody_with_it(zoo: Zoo, what: str) -> None:
    base = nights.tensors()
    zoo.add("m1", toys.fine_tuned(base))
    gone = zoo.add("m2", toys.fine_tuned(base, seed=2), shards=2)

    def go() -> None:
        if what == "removed":
            shutil.rmtree(gone)
        elif what == "incomplete":
            for shard in gone.glob("*.safetensors"):
                shard.unlink()
        else:
            shutil.rmtree(gone)
            gone.mkdir()
            (gone / "pytorch_model.bin").write_bytes(b"\x80\x04")

    result = zoo.night(at_task(1, go))
    assert of(result, "m1").state == "committed"
    assert of(result, "m2").state == ("incomplete" if what == "incomplete" else "changed")
    assert result.exit_code == (0 if what == "incomplete" else 3)


def test_a_base_replaced_while_it_is_read_is_nobodys_failure(zoo: Zoo, tmp_path: Path) -> None:
    base = nights.tensors()
    for seed in (1, 2):
        zoo.add(f"m{seed}", toys.fine_tuned(base, seed=seed))
    moved = {name: tensor + 1e-3 for name, tensor in base.items()}
    result = zoo.night(at_task(1, lambda: toys.save(zoo.root / "bases" / "b", moved)))
    assert (result.exit_code, states(result)) == (0, {"m1": "committed", "m2": "committed"})
    calm = Zoo(zoo.root, str(tmp_path / "calm"))
    calm.night()
    assert nights.left_behind(zoo.out) == nights.left_behind(calm.out)


@pytest.mark.parametrize("damage", [b"", b"not a part", "half"])
@pytest.mark.parametrize("share", ["max", "off"])
def test_a_damaged_part_is_thrown_away_and_made_again(
    zoo: Zoo, tmp_path: Path, share: str, damage: bytes | str
) -> None:
    """Of a night that was stopped; the other models of its task do not even notice."""
    base, run = nights.tensors(), {**nights.PLAIN, "share_base": share}
    for number in range(3):
        zoo.add(f"m{number}", toys.fine_tuned(base, seed=number))
    calm = Zoo(zoo.root, str(tmp_path / "calm"))
    calm.night()
    watcher = Watcher()
    zoo.night(watcher, run=run, stopping=lambda: len(watcher.reports) >= 2)
    part = min((Path(zoo.out) / "_parts").rglob("*.safetensors"))
    part.write_bytes(damage if isinstance(damage, bytes) else part.read_bytes()[: part.stat().st_size // 2])
    again = Watcher()
    result = zoo.night(again, run=run)
    assert (result.exit_code, result.counts) == (0, {"committed": 3})
    assert nights.left_behind(zoo.out) == nights.left_behind(calm.out)
    others = [block for report in again.reports for block in report.blocks if block.model not in str(part)]
    assert len({block.part_url for block in others}) == len(others)  # each once
