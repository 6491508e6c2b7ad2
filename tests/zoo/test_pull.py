"""Pulling: what a server finds is always one whole adapter, the old one or the new one, and nothing is fetched twice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from phlora_pipeline import storage
from phlora_pipeline.errors import PhloraError, RequestError, StorageError
from phlora_pipeline.storage import ByteRange, local
from phlora_pipeline.zoo import latest, layout, pull
from phlora_pipeline.zoo.pull import Pulled
from tests import runs
from tests.zoo import shelf

MODEL = shelf.MODEL


@pytest.fixture
def to(tmp_path: Path) -> Path:
    return tmp_path / "served"


def publish(out: str, number: int, model: str = MODEL) -> None:
    shelf.publish(out, number, model)
    latest.advance(out, model, shelf.version(number), "r", shelf.moment(number))


def served(to: Path, model: str = MODEL) -> int:
    """Which version a server finds; every file is that version's."""
    there = {path.name: path.read_bytes() for path in (to / model).iterdir()}
    [number] = [number for number in range(30) if there == shelf.files(number, model)]
    return number


def outcomes(pulled: list[Pulled]) -> dict[str, str]:
    return {item.model: item.outcome for item in pulled}


def test_adapters_are_laid_flat_one_folder_each(out: str, to: Path) -> None:
    for number, model in enumerate(["a", "org--b", MODEL], start=1):
        publish(out, number, model)
    storage.put_new(f"{out}/_runs/x/result.json", b"{}")
    pulled = pull.pull(out, str(to))
    assert outcomes(pulled) == {"a": "pulled", "org--b": "pulled", MODEL: "pulled"}
    assert sorted(name for name in os.listdir(to) if not name.startswith(".")) == ["a", "org--b", MODEL]
    assert [served(to, model) for model in ("a", "org--b", MODEL)] == [1, 2, 3]
    assert pulled[0] == Pulled(
        "a", shelf.version(1), str(to / "a"), "pulled", sum(map(len, shelf.files(1, "a").values()))
    )


def test_what_is_pulled_is_what_peft_would_load(pair: tuple[Path, Path], tmp_path: Path, to: Path) -> None:
    """A real adapter, made by a real run; the folder may be moved, as into a container."""
    made = runs.extract(*pair, tmp_path / "made")
    version = tmp_path / "out" / MODEL / made.version
    version.parent.mkdir(parents=True)
    (tmp_path / "made").rename(version)
    latest.advance(str(tmp_path / "out"), MODEL, made.version, "r", shelf.moment(1))
    [item] = pull.pull(str(tmp_path / "out"), str(to))
    assert (item.outcome, item.version) == ("pulled", made.version)
    to.rename(tmp_path / "mounted")
    there = load_file(tmp_path / "mounted" / MODEL / "adapter_model.safetensors")
    assert {name: value.tolist() for name, value in there.items()} == {
        name: value.tolist() for name, value in load_file(version / "adapter_model.safetensors").items()
    }


def test_what_is_there_is_not_fetched_again(out: str, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(out, 1)
    pull.pull(out, str(to))
    before = {path: path.stat().st_ino for path in to.rglob("*")}
    largest = 0

    def measured(ranges: list[ByteRange]) -> None:
        nonlocal largest
        largest = max(largest, *(len(wanted.into) for wanted in ranges))
        real(ranges)

    real = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", measured)
    [again] = pull.pull(out, str(to))
    assert (again.outcome, again.fetched, again.version) == ("unchanged", 0, shelf.version(1))
    assert {path: path.stat().st_ino for path in to.rglob("*")} == before
    assert largest < 10_000


def test_a_new_version_takes_the_place_of_the_old_one_which_stays_until_the_next(out: str, to: Path) -> None:
    kept = []
    for number in (1, 2, 3):
        publish(out, number)
        assert outcomes(pull.pull(out, str(to))) == {MODEL: "pulled"}
        assert served(to) == number
        kept.append({int(name, 16) for name in os.listdir(to / ".versions" / MODEL)})
    assert kept == [{1}, {1, 2}, {2, 3}]
    latest.rollback(out, MODEL, shelf.version(2))
    [back] = pull.pull(out, str(to))
    assert (served(to), back.outcome, back.fetched) == (2, "pulled", 0)  # it was still there


def test_only_what_is_asked_for(out: str, to: Path) -> None:
    for number in (1, 2):
        publish(out, number)
        publish(out, number, "another")
    assert outcomes(pull.pull(out, str(to), [MODEL])) == {MODEL: "pulled"}
    assert outcomes(pull.pull(out, str(to), version={MODEL: shelf.version(1)})) == {
        MODEL: "pulled",
        "another": "pulled",
    }
    assert (served(to), served(to, "another")) == (1, 2)
    assert outcomes(pull.pull(out, str(to), ["another"], version={MODEL: shelf.version(2)})) == {
        MODEL: "pulled", "another": "unchanged",
    }  # fmt: skip
    assert served(to) == 2


@pytest.mark.parametrize(
    ("models", "version", "told"),
    [
        (["nobody"], {}, "publishes no adapter of nobody"),
        (["unfinished"], {}, "publishes no adapter of unfinished"),
        (["..", MODEL], {}, r"publishes no adapter of \.\."),
        ((), {MODEL: shelf.version(9)}, "has no published version"),
        ((), {MODEL: ".."}, "has no published version"),
        ((), {"nobody": shelf.version(1)}, "nobody has no published version"),
        ((), {"unfinished": shelf.version(3)}, "has no published version"),
    ],
)
def test_what_is_not_published_is_a_wrong_request(
    out: str, to: Path, models: list[str], version: dict[str, str], told: str
) -> None:
    publish(out, 1)
    shelf.publish(out, 3, "unfinished", without=(layout.CONFIG,))
    with pytest.raises(RequestError, match=told):
        pull.pull(out, str(to), models, version=version)
    assert not to.exists()


def test_a_place_that_is_no_local_folder(out: str, to: Path) -> None:
    publish(out, 1)
    with pytest.raises(RequestError, match="into a local folder"):
        pull.pull(out, "s3://bucket/x")
    to.write_text("a file")
    with pytest.raises(RequestError, match="not a folder"):
        pull.pull(out, str(to))


def test_where_nothing_is_published_nothing_is_pulled(out: str, to: Path) -> None:
    assert pull.pull(out, str(to)) == []


def test_models_that_are_gone_are_told_and_left(out: str, to: Path) -> None:
    publish(out, 1)
    publish(out, 2, "leaves")
    pull.pull(out, str(to))
    (to / "mine").mkdir()
    (to / "link").symlink_to("mine")
    storage.delete(f"{out}/leaves/latest.json")
    assert outcomes(pull.pull(out, str(to))) == {"leaves": "gone", MODEL: "unchanged"}
    assert served(to, "leaves") == 2
    assert outcomes(pull.pull(out, str(to), [MODEL])) == {MODEL: "unchanged"}
    assert (to / "link").is_symlink()


def test_somebodys_folder_of_that_name_is_not_touched(out: str, to: Path) -> None:
    publish(out, 1)
    publish(out, 2, "another")
    (to / MODEL).mkdir(parents=True)
    (to / MODEL / "precious").write_text("x")
    pulled = {item.model: item for item in pull.pull(out, str(to))}
    assert (pulled[MODEL].outcome, pulled["another"].outcome) == ("failed", "pulled")
    assert "was not pulled" in pulled[MODEL].reason
    assert (to / MODEL / "precious").read_text() == "x"


@pytest.mark.parametrize("name", layout.PUBLISHED)
def test_what_was_damaged_here_is_fetched_anew(tmp_path: Path, to: Path, name: str) -> None:
    out = str(tmp_path / "out")
    publish(out, 1)
    pull.pull(out, str(to))
    for damage in (lambda path: path.write_bytes(b"short"), Path.unlink):
        damage(to / MODEL / name)
        assert outcomes(pull.pull(out, str(to))) == {MODEL: "pulled"}
        assert served(to) == 1
        assert outcomes(pull.pull(out, str(to))) == {MODEL: "unchanged"}


@pytest.mark.parametrize("name", layout.PUBLISHED)
def test_what_is_not_whole_there_does_not_replace_what_is_here(out: str, to: Path, name: str) -> None:
    publish(out, 1)
    publish(out, 1, "another")
    pull.pull(out, str(to))
    publish(out, 2)
    storage.delete(f"{out}/{MODEL}/{shelf.version(2)}/{name}")
    pulled = {item.model: item for item in pull.pull(out, str(to))}
    assert (pulled[MODEL].outcome, pulled["another"].outcome) == ("failed", "unchanged")
    assert f"there is no {name}" in pulled[MODEL].reason
    assert served(to) == 1


def test_weights_that_are_not_what_was_promised_are_not_served(out: str, to: Path) -> None:
    publish(out, 1)
    pull.pull(out, str(to))
    publish(out, 2)
    url = f"{out}/{MODEL}/{shelf.version(2)}/{layout.WEIGHTS}"
    weights = bytearray(shelf.files(2)[layout.WEIGHTS])
    weights[7] ^= 1
    storage.delete(url)
    storage.put_new(url, bytes(weights))
    [item] = pull.pull(out, str(to))
    assert (item.outcome, "sha256" in item.reason, served(to)) == ("failed", True, 1)
    assert os.listdir(to / ".versions" / MODEL) == [shelf.version(1)]


def test_a_damaged_pointer_keeps_only_its_own_model_away(out: str, to: Path) -> None:
    publish(out, 1)
    storage.put_new(f"{out}/broken/latest.json", b"{")
    pulled = {item.model: item for item in pull.pull(out, str(to))}
    assert (pulled[MODEL].outcome, pulled["broken"].outcome) == ("pulled", "failed")
    assert "does not name a version" in pulled["broken"].reason


def test_one_that_is_superseded_and_collected_meanwhile_gives_way_to_the_next(
    out: str, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(out, 1)

    def late(ranges: list[ByteRange]) -> None:
        if shelf.version(1) in ranges[0].url and ranges[0].url.endswith(layout.WEIGHTS):
            publish(out, 2)
            storage.delete(ranges[0].url)
        real(ranges)

    real = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", late)
    [item] = pull.pull(out, str(to))
    assert (item.outcome, item.version, served(to)) == ("pulled", shelf.version(2), 2)


def test_a_full_disk_stops_the_pull_and_breaks_nothing(
    tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    publish(out, 1)
    pull.pull(out, str(to))
    publish(out, 2)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(local.os, "fsync", full)
        with pytest.raises(StorageError, match="no space left"):
            pull.pull(out, str(to))
    assert served(to) == 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "symlink", full)
        with pytest.raises(StorageError, match="cannot pull into"):
            pull.pull(out, str(to))
    assert served(to) == 1
    assert outcomes(pull.pull(out, str(to))) == {MODEL: "pulled"}
    assert sorted(os.listdir(to / ".versions" / MODEL)) == [shelf.version(1), shelf.version(2)]


def test_a_store_that_is_down_stops_the_pull(tmp_path: Path, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = str(tmp_path / "out")
    publish(out, 1)

    def down(ranges: list[ByteRange]) -> None:
        if ranges[0].url.endswith(layout.WEIGHTS):
            raise StorageError("storage does not answer")
        real(ranges)

    real = storage.read_ranges
    monkeypatch.setattr(storage, "read_ranges", down)
    with pytest.raises(PhloraError) as caught:
        pull.pull(out, str(to))
    assert caught.value.exit_code == 12
    assert os.listdir(to) == [".versions"]


def test_a_server_that_reads_all_the_while_sees_whole_versions_only(tmp_path: Path, to: Path) -> None:
    """By one open folder, as a loader has it that resolves the link once."""
    out = str(tmp_path / "out")
    publish(out, 1)
    pull.pull(out, str(to))
    stop, seen, torn = threading.Event(), set[int](), []

    def look() -> None:
        whole = {tuple(shelf.files(number).items()): number for number in range(1, 12)}
        while not stop.is_set():
            folder = os.path.realpath(to / MODEL)
            there = tuple((name, Path(folder, name).read_bytes()) for name in layout.PUBLISHED)
            if there in whole:
                seen.add(whole[there])
            else:
                torn.append(folder)

    with ThreadPoolExecutor(2) as pool:
        looking = [pool.submit(look) for _ in range(2)]
        for number in range(2, 12):
            publish(out, number)
            pull.pull(out, str(to))
        stop.set()
        for future in looking:
            future.result()
    assert not torn
    assert seen <= set(range(1, 12))


def test_pulls_at_once_wait_for_each_other(out: str, to: Path) -> None:
    for number in range(1, 5):
        publish(out, number, f"model-{number}")
    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(lambda _: pull.pull(out, str(to)), range(4)))
    for number in range(1, 5):
        assert sorted(outcomes(pulled)[f"model-{number}"] for pulled in told) == ["pulled", *["unchanged"] * 3]
        assert served(to, f"model-{number}") == number


@pytest.mark.slow
def test_a_pull_that_is_killed_anywhere_leaves_whole_adapters_and_the_next_one_cleans_up(
    tmp_path: Path, to: Path
) -> None:
    out = str(tmp_path / "out")
    for model in ("a", "b"):
        publish(out, 1, model)
    pull.pull(out, str(to))
    script = (
        "import os, signal, sys\n"
        "from phlora_pipeline.zoo import pull\n"
        "left = int(sys.argv[3])\n"
        "def counted(real):\n"
        "    def call(*args, **named):\n"
        "        global left\n"
        "        left -= 1\n"
        "        if left < 0:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return real(*args, **named)\n"
        "    return call\n"
        "for verb in ('rename', 'symlink', 'replace', 'link', 'unlink', 'fsync'):\n"
        "    setattr(os, verb, counted(getattr(os, verb)))\n"
        "pull.pull(sys.argv[1], sys.argv[2])\n"
    )
    number, kills = 1, 0
    for step in range(0, 60, 5):
        number += 1
        for model in ("a", "b"):
            publish(out, number, model)
        done = subprocess.run([sys.executable, "-c", script, out, str(to), str(step)], capture_output=True, timeout=60)
        assert done.returncode in {0, -signal.SIGKILL}, done.stderr
        kills += done.returncode != 0
        for model in ("a", "b"):
            assert served(to, model) in {number - 1, number}
        pull.pull(out, str(to))
        for model in ("a", "b"):
            assert served(to, model) == number
        assert sorted(os.listdir(to)) == [".versions", "a", "b"]
        for model in ("a", "b"):
            assert sorted(os.listdir(to / ".versions" / model)) == [shelf.version(number - 1), shelf.version(number)]
        if done.returncode == 0:
            break
    assert kills >= 5


def test_hostile_names_in_the_store_write_nowhere_else(out: str, to: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a bucket a prefix may be called `..`; on a disk that is another folder."""
    publish(out, 1)
    for name in (".hidden", "-x", "a b"):
        publish(out, 1, name)
    real = storage.list_folders
    monkeypatch.setattr(storage, "list_folders", lambda url: [f"{url}/..", f"{url}/.", *real(url)])
    assert outcomes(pull.pull(out, str(to))) == {MODEL: "pulled"}
    assert sorted(os.listdir(to)) == [".versions", MODEL]
    assert set(os.listdir(to.parent)) <= {"served", "out"}
