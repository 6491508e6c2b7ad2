"""Nights on a real S3 server, seen from between: what is read, what is written, and what happens when storage does not behave."""

from __future__ import annotations

import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import stamina
import torch

from phlora_pipeline import storage
from phlora_pipeline.errors import CredentialsError, StorageError
from phlora_pipeline.storage import s3, s3_errors
from phlora_pipeline.zoo import layout
from tests import toys
from tests.counting_proxy import Fault, Headers, Proxy, Request, running_proxy
from tests.s3_server import S3
from tests.zoo import nights
from tests.zoo.nights import Watcher, Zoo, of, states

pytestmark = pytest.mark.s3


@pytest.fixture
def proxy(s3: S3) -> Iterator[Proxy]:
    """Before the server; the package's store goes through it."""
    with running_proxy(s3.server.endpoint) as running:
        s3.use(endpoint=running.endpoint)
        yield running


class S3Zoo(Zoo):
    """Made on the disk, uploaded by somebody else."""

    def __init__(self, root: Path, s3: S3, place: str = "zoo") -> None:
        super().__init__(root, s3.url("out"))
        self.s3, self.place = s3, place

    def upload(self) -> S3Zoo:
        """Put all that is on the disk in its place, and look for it there from now on."""
        for folder in [*(self.root / "bases").iterdir(), *(self.root / "tuned").iterdir()]:
            self.s3.upload_folder(folder, f"{self.place}/{folder.parent.name}/{folder.name}")
        bases = {path.name: self.s3.url(f"{self.place}/bases/{path.name}") for path in (self.root / "bases").iterdir()}
        self.settings |= {"bases": bases, "discover": [{"prefix": self.s3.url(f"{self.place}/tuned"), "base": "b"}]}
        return self


@pytest.fixture
def zoo(s3: S3, tmp_path: Path) -> S3Zoo:
    """Four small models of one base, one of them the base itself."""
    made = S3Zoo(tmp_path / "zoo", s3)
    base = made.add_base()
    for seed in (1, 2, 3):
        made.add(f"m{seed}", toys.fine_tuned(base, seed=seed))
    made.add("same", base)
    return made.upload()


def adapters(left: dict[str, Any]) -> dict[str, Any]:
    """The files that do not name a place: weights, configs and cards."""
    chosen = (layout.WEIGHTS, layout.CONFIG, layout.CARD)
    found = {name: data for name, data in left.items() if name.endswith(chosen)}
    return {re.sub(r"/[0-9a-f]{32}/", "/", name): data for name, data in found.items()}


def test_from_s3_to_s3_the_adapters_are_those_of_a_disk_and_a_second_night_reads_no_weights(
    zoo: S3Zoo, proxy: Proxy, tmp_path: Path
) -> None:
    assert zoo.night().counts == {"committed": 3, "nothing_to_adapt": 1}
    nights.require_whole(zoo.out)
    here = Zoo(zoo.root, str(tmp_path / "out"))
    here.night()
    assert adapters(nights.left_behind(zoo.out)) == adapters(nights.left_behind(here.out))
    proxy.clear()
    second = zoo.night()
    assert (second.exit_code, second.run, second.counts) == (0, "", {"published": 3, "unchanged": 1})
    assert (proxy.tensor_bytes, proxy.header_bytes) == ({}, {})
    assert {request.verb for request in proxy.requests} == {"GET"}


def test_a_moved_prefix_makes_nothing_due(zoo: S3Zoo, proxy: Proxy) -> None:
    first = zoo.night()
    moved = S3Zoo(zoo.root, zoo.s3, "elsewhere").upload()
    proxy.clear()
    second = moved.night()
    assert (second.run, second.counts) == ("", {"published": 3, "unchanged": 1})
    assert not proxy.tensor_bytes
    assert [model.version for model in second.models] == [model.version for model in first.models]


def test_one_new_and_one_replaced_are_all_that_is_read(zoo: S3Zoo, proxy: Proxy) -> None:
    zoo.night()
    zoo.add("m2", toys.fine_tuned(nights.tensors(), seed=22))
    zoo.add("m4", toys.fine_tuned(nights.tensors(), seed=4))
    for name in ("m2", "m4"):
        zoo.s3.upload_folder(zoo.root / "tuned" / name, f"zoo/tuned/{name}")
    proxy.clear()
    result = zoo.night()
    assert {name for name, state in states(result).items() if state == "committed"} == {"m2", "m4"}
    assert {key.split("/")[-2] for key in proxy.tensor_bytes} == {"b", "m2", "m4"}
    assert {key.split("/")[-2] for key in proxy.header_bytes} == {"b", "m2", "m4", *(of(result, m).version for m in ("m2", "m4"))}  # fmt: skip


def test_the_dataset_is_listed_once_a_night_and_what_is_missing_there_is_all_that_is_put(
    zoo: S3Zoo, proxy: Proxy
) -> None:
    zoo.night()
    before = nights.left_behind(zoo.out)
    tables = sorted(name for name in before if name.startswith("_manifest/"))
    assert len(tables) == 4
    asked: Counter[str] = Counter()

    def counted(verb: str, path: str, headers: Headers, _: bytes) -> Headers:
        asked[verb] += "_manifest" in unquote(path)
        return headers

    proxy.passed_on = counted
    for gone in (tables[:1], tables, []):
        for name in gone:
            storage.delete(storage.join(zoo.out, name))
        proxy.clear()
        asked.clear()
        assert zoo.night().run == ""
        assert {key.partition("/out/")[2]: n for key, n in proxy.created().items()} == dict.fromkeys(gone, 1)
        assert +asked == +Counter({"GET": 1 + len(gone), "PUT": len(gone)})  # one lists, the others look once more
        assert proxy.tensor_bytes == {}
    assert nights.left_behind(zoo.out) == before


# ------------------------------------------------------------------------------------------------- what is read, at the server


def large_tensors(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of 4 MiB and more."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"self_attn.q_proj": (1024, 1024), "self_attn.o_proj": (1024, 1024), "mlp.up_proj": (1536, 1024)}
    return {f"model.layers.0.{leaf}.weight": torch.randn(shape, generator=generator) for leaf, shape in shapes.items()}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three fine-tunes of one base and two of another, on the disk."""
    root = tmp_path_factory.mktemp("large")
    for name, models in (("b", 3), ("c", 2)):
        base = large_tensors(len(name) + models)
        toys.save(root / "bases" / name, base)
        for number in range(models):
            toys.save(root / "tuned" / f"{name}{number}", toys.fine_tuned(base, seed=number), shards=1 + number % 2)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("share", ["max", "auto", "off"])
def test_bytes_at_the_server_are_those_of_the_plan(large: Path, s3: S3, proxy: Proxy, share: str) -> None:
    zoo = S3Zoo(large, s3).upload()
    zoo.settings["discover"] = [{"prefix": s3.url("zoo/tuned"), "rules": [{"match": f"{b}*", "base": b} for b in "bc"]}]
    watcher = Watcher()
    proxy.clear()
    result = zoo.night(watcher, run={**nights.PLAIN, "share_base": share})
    assert result.counts == {"committed": 5}
    seen = sum(size for key, size in proxy.tensor_bytes.items() if "/zoo/" in key)
    planned = sum(task.nbytes for task in watcher.tasks)
    assert seen == pytest.approx(planned, rel=0.01)
    assert result.read_bytes == planned
    checkpoint = sum(tensor.nbytes for tensor in large_tensors(0).values())
    assert min(tensor.nbytes for tensor in large_tensors(0).values()) >= 4 << 20
    wanted = {"max": 5 + 2, "off": 2 * 5}.get(share)
    assert wanted is None or seen == pytest.approx(wanted * checkpoint, rel=0.03)
    assert share != "auto" or 7 * checkpoint * 0.97 <= seen <= 10 * checkpoint * 1.03
    headers = sum(size for key, size in proxy.header_bytes.items() if "/zoo/" in key)
    assert headers < 0.03 * seen + 7 * 2 * (256 << 10)


# ------------------------------------------------------------------------------------------------------- storage that misbehaves


class From:
    """A fault that begins with the nth tensor read, and goes on until somebody mends it."""

    def __init__(self, fault: Fault, number: int) -> None:
        self.fault, self.left, self.mended = fault, number, False

    def __call__(self, request: Request) -> Fault | None:
        if self.mended:
            return None
        if self.left and request.verb == "GET" and "/zoo/tuned/" in request.key and request.start > 8:
            self.left -= 1
        return None if self.left else self.fault


def blamed(out: str) -> set[str]:
    return {name for name in nights.names(out) if "/attempt-" in name}


@pytest.mark.parametrize("number", [1, 4, 7])
def test_credentials_that_expire_stop_the_night_and_blame_nobody(zoo: S3Zoo, proxy: Proxy, number: int) -> None:
    fault = proxy.fault = From("expired", number)
    with pytest.raises(CredentialsError) as stopped:
        zoo.night()
    assert stopped.value.exit_code == 11
    fault.mended = True
    assert blamed(zoo.out) == set()
    nights.require_whole(zoo.out)
    stood = {name for name in nights.names(zoo.out) if name.startswith("_parts/")}
    proxy.clear()
    assert zoo.night().exit_code == 0
    assert not {key.partition("/out/")[2] for key in proxy.created("/_parts/")} & stood
    assert len(proxy.created("/_parts/")) == 4 * 4 - len(stood)


def test_credentials_that_may_not_write_stop_it_before_anything_is_read(zoo: S3Zoo, proxy: Proxy) -> None:
    proxy.fault = lambda request: "expired" if request.verb == "PUT" else None
    with pytest.raises(CredentialsError):
        zoo.night()
    assert not proxy.tensor_bytes
    assert nights.names(zoo.out) == set()


def hurried(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The retries as they are, in a hundredth of the time."""
    real = stamina.retry_context

    def quicker(**settings: Any) -> Any:
        times = {name: settings[name] * factor for name in ("timeout", "wait_initial", "wait_max")}
        return real(**{**settings, **times})

    monkeypatch.setattr(s3_errors.stamina, "retry_context", quicker)
    monkeypatch.setitem(s3._CONFIG, "read_timeout", 30 * factor)


@pytest.mark.parametrize("fault", ["refuse", "busy", "hang"])
def test_storage_that_is_down_ends_the_night_in_bounded_time(
    zoo: S3Zoo, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    """Retries take two minutes at most, for one request after another: the parallel ones, the run's record, and no more."""
    hurried(monkeypatch, 0.01)
    zoo.s3.forget()
    down = proxy.fault = From(fault, 5)
    proxy.clear()
    with stamina.set_testing(False):
        began = time.monotonic()
        with pytest.raises(StorageError) as stopped:
            zoo.night()
        took = time.monotonic() - began
    assert stopped.value.exit_code == 12
    assert took < 10
    down.mended = True
    assert blamed(zoo.out) == set()
    nights.require_whole(zoo.out)
    assert zoo.night().exit_code == 0


def test_a_store_that_is_down_from_the_start_is_told(zoo: S3Zoo, proxy: Proxy) -> None:
    proxy.fault = lambda _: "refuse"
    with pytest.raises(StorageError, match="storage does not answer"):
        zoo.night()


@pytest.mark.parametrize("seed", [1, 2])
def test_faults_here_and_there_change_no_byte(zoo: S3Zoo, proxy: Proxy, seed: int) -> None:
    """A tenth of all answers do not come; what was put nonetheless is found there, and counts as put."""
    dice = random.Random(seed)
    faults: list[Fault] = ["lost", "busy", "refuse"]
    proxy.fault = lambda _: dice.choice(faults) if dice.random() < 0.1 else None
    with stamina.set_testing(True, attempts=12, cap=False):
        result = zoo.night()
    assert (result.exit_code, result.counts) == (0, {"committed": 3, "nothing_to_adapt": 1})
    assert set(proxy.created("/out/").values()) == {1}
    proxy.fault = lambda _: None
    left = nights.left_behind(zoo.out)
    nights.require_whole(zoo.out)
    calm = S3Zoo(zoo.root, zoo.s3).upload()
    calm.out = zoo.s3.url("calm")
    calm.night()
    assert left == nights.left_behind(calm.out)


def test_every_answer_to_a_first_put_is_lost_and_each_counts_once(zoo: S3Zoo, proxy: Proxy) -> None:
    seen: set[str] = set()

    def lose(request: Request) -> Fault | None:
        first = request.verb == "PUT" and request.key not in seen
        seen.add(request.key)
        return "lost" if first and request.verb == "PUT" else None

    proxy.fault = lose
    result = zoo.night()
    assert result.counts == {"committed": 3, "nothing_to_adapt": 1}
    assert set(proxy.created("/out/").values()) == {1}
    nights.require_whole(zoo.out)
    attempts = [name for name in nights.names(zoo.out) if "/attempt-" in name]
    assert attempts == []
    told = [name for name in nights.names(zoo.out) if name.endswith("/result.json")]
    assert json.loads(zoo.s3.get(f"out/{told[0]}"))["exit_code"] == 0


@pytest.mark.slow
def test_two_nights_racing_create_every_object_once(zoo: S3Zoo, proxy: Proxy) -> None:
    racers = [nights.process(zoo) for _ in range(2)]
    nights.go(*racers)
    told = [racer.communicate(timeout=120) for racer in racers]
    for racer, (out, err) in zip(racers, told, strict=True):
        assert racer.returncode == 0, err
        assert json.loads(out)["exit_code"] == 0
    assert len(proxy.created("/result.json$")) == 2
    adapters = proxy.created(r"/out/(m\d|same|_manifest|_state)/")
    assert set(adapters.values()) == {1}
    left = nights.left_behind(zoo.out)
    nights.require_whole(zoo.out)
    calm = S3Zoo(zoo.root, zoo.s3).upload()
    calm.out = zoo.s3.url("calm")
    calm.night()
    assert {name: data for name, data in left.items() if not name.startswith("_parts/")} == nights.left_behind(calm.out)
