"""The commands of a zoo: what they print, what they leave, and the codes they end with."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from phlora_pipeline import cli, render, zoofile
from phlora_pipeline.cli import stopping, zoo
from phlora_pipeline.errors import DeviceError, PhloraError
from phlora_pipeline.zoo import latest, status
from tests import toys
from tests.s3_server import S3

OVER = re.compile(r"result: (.+); exit code (\d+)")


class Done(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return dict(json.loads(self.out))

    @property
    def last(self) -> tuple[str, int]:
        """What the last line of a run says."""
        told = OVER.fullmatch(self.out.splitlines()[-1])
        assert told, self.out
        return told[1], int(told[2])


class Zoo:
    """A zoo in a folder, and the commands about it."""

    def __init__(self, root: Path, phlora: Callable[..., Done]) -> None:
        self.root, self.out, self.file, self._phlora = root, root / "out", root / "zoo.yaml", phlora
        self.base = toys.llama_tensors(layers=1)
        toys.save(root / "bases" / "llama", self.base)
        self.write()

    def write(self, more: str = "", out: str = "", tuned: str = "", base: str = "") -> None:
        self.file.write_text(
            f"output: {out or self.out}\nbases: {{llama: {base or self.root / 'bases' / 'llama'}}}\n"
            f"discover: [{{prefix: {tuned or self.root / 'tuned'}, base: llama}}]\nextract: {{rank: 8}}\n"
            f"run: {{engine: local, device: cpu, threads: 1}}\n{more}"
        )

    def add(self, name: str, seed: int = 1, *, shards: int = 1, **others: Any) -> Path:
        return toys.save(self.root / "tuned" / name, toys.fine_tuned(self.base, seed=seed, **others), shards=shards)

    def add_poison(self, name: str = "poison") -> None:
        tensors = toys.fine_tuned(self.base, seed=9)
        tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
        toys.save(self.root / "tuned" / name, tensors)

    def add_one_of_each(self) -> None:
        """One that can be published, and one for each thing that can be wrong."""
        self.add("good")
        self.add_poison()
        toys.save(self.root / "tuned" / "same", self.base)
        next((self.add("partial", seed=3, shards=2)).glob("*-00002-of-*")).unlink()
        toys.save(self.root / "tuned" / "wrong", {name: torch.randn_like(tensor) for name, tensor in self.base.items()})

    def __call__(self, command: str, *more: object) -> Done:
        return self._phlora(command, self.file, *more)

    def written(self) -> set[str]:
        return {str(path.relative_to(self.out)) for path in self.out.rglob("*") if path.is_file()}

    def versions(self, model: str) -> list[str]:
        return [item.version for item in latest.versions(str(self.out), model)]


@pytest.fixture
def phlora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """The command in this process: a new one costs two seconds."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def run(*arguments: object) -> Done:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(argument) for argument in arguments])
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def a_zoo(tmp_path: Path, phlora: Callable[..., Done]) -> Zoo:
    return Zoo(tmp_path / "zoo", phlora)


class TestRun:
    """`phlora run`."""

    def test_the_good_are_published_the_others_told(self, a_zoo: Zoo) -> None:
        a_zoo.add_one_of_each()
        done = a_zoo("run")
        url, code = done.last
        assert done.code == code == 3
        assert json.loads(Path(url).read_text())["exit_code"] == 3
        assert re.search(r"^failed poison: .* NaN or infinite", done.out, re.MULTILINE)
        assert re.search(r"^failed wrong: .* fine-tune", done.out, re.MULTILINE)
        assert re.search(r"^incomplete partial: .* is missing", done.out, re.MULTILINE)
        assert re.search(r"^1 +committed$", done.out, re.MULTILINE)
        assert "5 models in the zoo: 4 due, 1 incomplete" in done.err
        assert re.search(r"^poison: failed: ", done.err, re.MULTILINE)
        assert "4/4 models" in done.err.splitlines()[-1]
        assert latest.read(str(a_zoo.out), "good") is not None

    def test_as_json_is_one_object(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        done = a_zoo("run", "--json")
        assert (done.code, done.err) == (0, "")
        assert (done.json["exit_code"], done.json["counts"]) == (0, {"committed": 1})
        assert json.loads(Path(done.json["result"]).read_text())["run"] == done.json["run"]

    def test_an_error_in_the_middle_names_the_record_that_it_left(
        self, a_zoo: Zoo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object) -> dict[str, str]:
            print("what a library says on its own")
            raise DeviceError("the device is gone")

        a_zoo.add("good")
        monkeypatch.setattr("phlora_pipeline.driver.engine", lambda *_: broken)
        url, code = a_zoo("run").last
        assert code == DeviceError.exit_code
        assert json.loads(Path(url).read_text())["error"] == "the device is gone"
        told = a_zoo("run", "--json").json
        assert json.loads(Path(told["result"]).read_text())["exit_code"] == told["exit_code"] == code

    def test_nothing_due_reads_and_writes_nothing(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        a_zoo("run")
        before = a_zoo.written()
        done = a_zoo("run")
        assert (done.code, done.last) == (0, ("none", 0))
        assert "nothing due" in done.out
        assert a_zoo("run", "--json").json["read_bytes"] == 0
        assert a_zoo.written() == before

    def test_more_than_may_be_due_needs_yes(self, a_zoo: Zoo) -> None:
        a_zoo.add("a", 1)
        a_zoo.add("b", 2)
        a_zoo.write("limits: {max_models_due: 1}\n")
        done = a_zoo("run")
        assert (done.code, done.last) == (2, ("none", 2))
        assert done.err.splitlines()[-2:] == [
            "error: 2 models are due, more than limits.max_models_due (1): 2 × new",
            "  fix: look at phlora plan; if it is meant, pass --yes or raise the limit",
        ]
        assert "warning: 2 models are due, more than limits.max_models_due (1): 2 × new" in a_zoo("plan").out
        assert not a_zoo.out.exists()
        assert a_zoo("run", "--json").json["exit_code"] == 2
        assert a_zoo("run", "--yes").code == 0
        assert a_zoo("plan", "--json").json["needs_yes"] == ""

    @pytest.mark.parametrize("command", ["run", "status", "gc", "plan"])
    def test_a_wrong_zoo_file_is_told_by_line_and_nothing_is_done(self, a_zoo: Zoo, command: str) -> None:
        a_zoo.file.write_text(a_zoo.file.read_text() + "outptu: x\n")
        done = a_zoo(command)
        assert done.code == 2
        assert "line 6: unknown key 'outptu'; did you mean 'output'?" in done.err
        assert not a_zoo.out.exists()

    def test_no_zoo_file(self, a_zoo: Zoo) -> None:
        a_zoo.file.unlink()
        done = a_zoo("status", "--json")
        assert (done.code, done.json["exit_code"]) == (2, 2)
        assert "phlora init" in done.json["remedy"]

    def test_auto_is_ray_where_there_is_a_cluster_to_join(self, a_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
        config = zoofile.loads(a_zoo.file.read_text().replace("engine: local", "engine: auto"))
        assert zoo._on_its_cluster(config) == config
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        assert zoo._on_its_cluster(config).run.engine == "ray"
        local = zoofile.load(str(a_zoo.file))
        assert zoo._on_its_cluster(local) == local

    @pytest.mark.s3
    def test_in_object_storage(self, a_zoo: Zoo, s3: S3, tmp_path: Path) -> None:
        a_zoo.add("good")
        s3.upload_folder(a_zoo.root / "tuned" / "good", "tuned/good")
        s3.upload_folder(a_zoo.root / "bases" / "llama", "bases/llama")
        a_zoo.write(out=s3.url("out"), tuned=s3.url("tuned"), base=s3.url("bases/llama"))
        assert a_zoo("run").last[0].startswith(s3.url("out/_runs/"))
        [model] = a_zoo("status", "--json").json["models"]
        assert (model["id"], model["state"]) == ("good", "published")
        assert a_zoo("pull", "--to", tmp_path / "served").code == 0
        assert (tmp_path / "served" / "good" / "adapter_model.safetensors").exists()
        assert a_zoo("gc", "--json").json["garbage"] == []


class TestStatus:
    """`phlora status`."""

    def test_counts_first_then_every_model(self, a_zoo: Zoo) -> None:
        a_zoo.add_one_of_each()
        before = a_zoo("status").out.splitlines()
        assert before[0] == "5 models: 4 due, 1 waiting"
        assert "due: 4 × new" in before
        a_zoo("run")
        after = a_zoo("status").out.splitlines()
        assert after[0] == "5 models: 1 published, 1 unchanged, 1 waiting, 2 failed"
        assert [row.split()[:2] for row in after[2:7]] == [
            ["good", "published"], ["partial", "waiting"], ["poison", "failed"], ["same", "unchanged"], ["wrong", "failed"],
        ]  # fmt: skip
        a_zoo("run")
        assert a_zoo("status").out.splitlines()[0] == "5 models: 1 published, 1 unchanged, 1 waiting, 2 quarantined"

    def test_as_json(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        a_zoo.write("models: [{url: /nowhere/else, base: llama}]\n")
        a_zoo("run")
        told = a_zoo("status", "--json").json
        assert told["counts"] == {"published": 1, "blocked": 1}
        blocked, good = told["models"]
        assert (blocked["id"], blocked["state"]) == ("else", "blocked")
        assert "/nowhere/else" in blocked["reason"]
        assert (good["serves"], good["pinned"]) == (a_zoo.versions("good")[0], False)
        assert 0 < good["kept"] < 1
        assert good["since"].endswith("+00:00")

    def test_an_empty_zoo(self, a_zoo: Zoo) -> None:
        a_zoo.file.write_text(f"output: {a_zoo.out}\n")
        assert a_zoo("status").out == "there are no models in the zoo\n"
        assert a_zoo("run").last == ("none", 0)

    def test_a_replaced_checkpoint_is_due_and_still_served(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        a_zoo("run")
        a_zoo.add("good", seed=5)
        [model] = a_zoo("status", "--json").json["models"]
        assert (model["state"], model["serves"]) == ("due", a_zoo.versions("good")[0])
        assert "checkpoint" in model["reason"]

    def test_a_model_that_left_the_zoo_is_told(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        a_zoo.add("old", seed=2)
        a_zoo("run")
        shutil.rmtree(a_zoo.root / "tuned" / "old")
        assert a_zoo("status", "--json").json["counts"] == {"published": 1, "gone": 1}
        told = a_zoo("explain", "old")
        assert told.out.startswith("old: gone\n")
        assert a_zoo.versions("old")[0] in told.out

    def test_a_damaged_pointer_hides_nobody_else(self, a_zoo: Zoo) -> None:
        a_zoo.add("bad")
        a_zoo.add("good", seed=2)
        a_zoo("run")
        (a_zoo.out / "bad" / "latest.json").write_text("{")
        bad, good = a_zoo("status", "--json").json["models"]
        assert "does not name a version" in bad["reason"]
        assert (bad["serves"], good["serves"]) == ("", a_zoo.versions("good")[0])

    def test_what_strangers_wrote_does_not_reach_the_terminal(self, capsys: pytest.CaptureFixture[str]) -> None:
        model = status.ModelStatus("x\x1b[31m", "blocked", "a\nb", "c\rd")
        render.show_status(status.ZooStatus("out", (model,), ("p\x07",)))
        assert set("\x1b\r\x07").isdisjoint(capsys.readouterr().out)


class TestExplain:
    """`phlora explain`."""

    def test_state_cause_next_step_and_history(self, a_zoo: Zoo) -> None:
        a_zoo.add_poison()
        a_zoo("run")
        once = a_zoo("explain", "poison")
        assert once.code == 0
        assert once.out.startswith("poison: failed since 20")
        assert re.search(r"cause: .* NaN", once.out)
        assert re.search(r"next: .*tries once more", once.out)
        a_zoo("run")
        twice = a_zoo("explain", "poison", "--json").json
        assert twice["status"]["state"] == "quarantined"
        assert [event["what"] for event in twice["history"]] == ["failed", "failed"]
        assert "phlora retry" in twice["next_step"]

    def test_versions_and_what_waits_behind_a_pin(self, a_zoo: Zoo) -> None:
        first, second = two_versions(a_zoo)
        a_zoo("rollback", "good", first)
        told = a_zoo("explain", "good", "--json").json
        assert {item["version"]: item["served"] for item in told["versions"]} == {first: True, second: False}
        assert (told["status"]["pinned"], told["newest"]) == (True, second)
        assert [event["version"] for event in told["history"]] == [first, second]
        shown = a_zoo("explain", "good").out
        assert f"serves: {first[:12]} (pinned)" in shown
        assert f"waits behind the pin: {second}" in shown

    @pytest.mark.parametrize("command", ["explain", "retry"])
    def test_an_unknown_model_names_the_nearest(self, a_zoo: Zoo, command: str) -> None:
        a_zoo.add("support-bot")
        a_zoo.add("sales", seed=2)
        done = a_zoo(command, "Suport-bot", "--json")
        assert (done.code, done.json["exit_code"]) == (2, 2)
        assert done.json["remedy"].startswith("did you mean support-bot")
        assert a_zoo(command, "zzz", "--json").json["remedy"] == "see phlora status for their ids"

    def test_a_name_of_a_megabyte_is_not_repeated(self, a_zoo: Zoo) -> None:
        a_zoo.add("good")
        done = a_zoo("explain", "g" * 100_000)
        assert done.code == 2
        assert len(done.err) < 500


class TestRetry:
    """`phlora retry`."""

    def test_a_quarantined_model_is_due_again(self, a_zoo: Zoo) -> None:
        a_zoo.add_poison()
        for _ in range(3):
            a_zoo("run")
        assert a_zoo("status", "--json").json["counts"] == {"quarantined": 1}
        assert a_zoo("retry", "poison", "--json").json == {"model": "poison", "forgotten": 2}
        assert a_zoo("status", "--json").json["counts"] == {"due": 1}
        assert a_zoo("retry", "poison").out == "poison: it had no failures\n"


def two_versions(a_zoo: Zoo) -> tuple[str, str]:
    """Of the model `good`, the second one served."""
    a_zoo.add("good")
    a_zoo("run")
    [first] = a_zoo.versions("good")
    a_zoo.add("good", seed=5)
    a_zoo("run")
    [second] = set(a_zoo.versions("good")) - {first}
    return first, second


class TestRollback:
    """`phlora rollback`."""

    def test_pins_and_unpins(self, a_zoo: Zoo) -> None:
        first, second = two_versions(a_zoo)
        done = a_zoo("rollback", "good", first[:8])
        assert done.out == f"good serves {first}, pinned; servers get it by phlora pull\n"
        assert a_zoo("rollback", "good", "--unpin", "--json").json["version"] == second

    def test_works_while_the_checkpoints_cannot_be_looked_at(self, a_zoo: Zoo) -> None:
        first, _ = two_versions(a_zoo)
        shutil.rmtree(a_zoo.root / "tuned")
        assert a_zoo("rollback", "good", first).code == 0

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["good"], "a VERSION or --unpin"),
            (["good", "abc", "--unpin"], "a VERSION or --unpin"),
            (["good", "zz"], "has no published version 'zz'"),
            (["god", "zz"], "there is no model 'god' among 1"),
        ],
    )
    def test_refusals(self, a_zoo: Zoo, arguments: list[str], told: str) -> None:
        a_zoo.add("good")
        a_zoo("run")
        done = a_zoo("rollback", *arguments)
        assert done.code == 2
        assert told in done.err
        pointer = latest.read(str(a_zoo.out), "good")
        assert pointer is not None
        assert not pointer.pinned


class TestPull:
    """`phlora pull`."""

    def test_all_then_nothing_new(self, a_zoo: Zoo, tmp_path: Path) -> None:
        a_zoo.add("a")
        a_zoo.add("b", seed=2)
        assert a_zoo("pull", "--to", tmp_path / "served").out == "no adapter is published yet\n"
        a_zoo("run")
        assert re.search(r"served: 2 pulled; .* fetched", a_zoo("pull", "--to", tmp_path / "served").out)
        assert (tmp_path / "served" / "a" / "adapter_config.json").exists()
        again = a_zoo("pull", "--to", tmp_path / "served", "--json").json
        assert [item["outcome"] for item in again["models"]] == ["unchanged", "unchanged"]

    def test_some_and_unknown(self, a_zoo: Zoo, tmp_path: Path) -> None:
        a_zoo.add("alpha")
        a_zoo.add("beta", seed=2)
        a_zoo("run")
        told = a_zoo("pull", "--to", tmp_path / "served", "alpha", "--json").json
        assert [item["model"] for item in told["models"]] == ["alpha"]
        done = a_zoo("pull", "--to", tmp_path / "served", "alhpa")
        assert (done.code, "did you mean alpha?" in done.err) == (2, True)

    def test_what_cannot_be_fetched_is_exit_3(self, a_zoo: Zoo, tmp_path: Path) -> None:
        a_zoo.add("good")
        a_zoo("run")
        [version] = a_zoo.versions("good")
        (a_zoo.out / "good" / version / "README.md").unlink()
        done = a_zoo("pull", "--to", tmp_path / "served")
        assert done.code == 3
        assert re.search(r"^failed good: .*README\.md", done.out)


class TestGc:
    """`phlora gc`."""

    def test_removes_only_when_told_to(self, a_zoo: Zoo) -> None:
        first, second = two_versions(a_zoo)
        a_zoo.write("keep: 0\n")
        for path in (a_zoo.out / "good" / first).iterdir():
            os.utime(path, (1e9, 1e9))
        for path in (a_zoo.out / "_manifest").rglob(f"{first}.parquet"):
            os.utime(path, (1e9, 1e9))
        told = a_zoo("gc")
        assert told.code == 0
        assert "1 may go" in told.out
        assert "pass --yes" in told.out
        assert set(a_zoo.versions("good")) == {first, second}
        done = a_zoo("gc", "--yes", "--json").json
        assert (done["removed"], len(done["garbage"])) == (True, 1)
        assert a_zoo.versions("good") == [second]
        assert a_zoo("gc").out == "nothing to collect\n"


class TestInitAndPlan:
    """Before the first night."""

    def test_what_init_writes_can_be_run(self, a_zoo: Zoo, phlora: Callable[..., Done]) -> None:
        a_zoo.add("good")
        done = phlora("init", a_zoo.root)
        assert done.code == 0
        assert zoofile.loads(done.out).output
        assert phlora("init", a_zoo.root, "--json").json["zoo"] == done.out
        assert phlora("init", a_zoo.root / "nothing").code == 2

    def test_plan_of_a_zoo(self, a_zoo: Zoo) -> None:
        a_zoo.add("a")
        a_zoo.add("b", seed=2)
        told = a_zoo(
            "plan", "--nodes", 2, "--gpus-per-node", 4, "--gpu-memory", 80, "--price", 30, "--node-read-rate", 1, "--json"
        ).json  # fmt: skip
        assert [model["id"] for model in told["models"]] == ["a", "b"]
        assert told["cluster"] == {
            "nodes": 2, "gpus_per_node": 4, "node_read_rate": 1e9, "price": 30.0, "profile": "sm80", "gpu_memory": 80e9,
        }  # fmt: skip
        assert a_zoo("plan").code == 0
        assert not a_zoo.out.exists()

    @pytest.mark.parametrize(
        ("arguments", "told"),
        [
            (["plan"], "--base and --tuned, or a ZOO"),
            (["plan", "--base", "x"], "--tuned, or a ZOO"),
            (["plan", "zoo.yaml", "--rank", "8"], "are in zoo.yaml, not in --rank"),
            (["plan", "--base", "x", "--tuned", "y", "--nodes", "2"], "--nodes: of a night"),
            (["run"], "Missing argument"),
            (["pull", "zoo.yaml"], "--to"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_usage(self, phlora: Callable[..., Done], arguments: list[str], told: str) -> None:
        done = phlora(*arguments)
        assert (done.code, done.out) == (2, "")
        assert "Usage: " in done.err
        assert told in " ".join(re.sub(r"[│\n]", " ", done.err).split())


HELP = {
    "run": "ZOO --yes --json SIGTERM 143 RAY_ADDRESS Example",
    "submit": "ZOO --address --working-dir --no-wait --yes --json Ctrl-C Example",
    "status": "ZOO --json quarantined waiting blocked",
    "explain": "ZOO MODEL --json Example",
    "retry": "ZOO MODEL --json",
    "rollback": "ZOO MODEL VERSION --unpin --json Examples",
    "pull": "ZOO MODEL --to --json atomically Example",
    "gc": "ZOO --yes --json keep",
    "init": "URL --json zoo.yaml Example",
    "plan": "ZOO --base --tuned --nodes --gpus-per-node --node-read-rate --price --json Examples",
}


@pytest.mark.parametrize("command", HELP)
def test_help_teaches(phlora: Callable[..., Done], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    done = phlora(command, "--help")
    assert (done.code, done.err) == (0, "")
    for word in HELP[command].split():
        assert word in done.out


class TestStop:
    """What SIGTERM does."""

    def test_once_is_heard_twice_interrupts(self, capfd: pytest.CaptureFixture[str]) -> None:
        before = signal.getsignal(signal.SIGTERM)
        with stopping.Stop() as stop:
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before
        assert capfd.readouterr().err.startswith("stopping: ")

    def test_a_handler_that_somebody_else_has_put_there_is_replaced_when_it_is_asked(self) -> None:
        with stopping.Stop() as stop:
            signal.signal(signal.SIGTERM, lambda *_: pytest.fail("not ours"))  # as ray.init does
            assert not stop()
            signal.raise_signal(signal.SIGTERM)
            assert stop()


@pytest.mark.slow
class TestASignal:
    """A night in a process of its own, told to end."""

    @staticmethod
    def begun(a_zoo: Zoo) -> subprocess.Popen[str]:
        a_zoo.base = toys.llama_tensors(layers=4, hidden=256, inner=512, vocab=512, kv=128)
        toys.save(a_zoo.root / "bases" / "llama", a_zoo.base)
        for number in range(6):
            a_zoo.add(f"m{number}", seed=number)
        environment = {**os.environ, "PHLORA_PROGRESS_INTERVAL": "0.2"}
        process = subprocess.Popen(
            [sys.executable, "-m", "phlora_pipeline", "run", str(a_zoo.file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        while not list(a_zoo.out.glob("_parts/*/*/*.safetensors")) and process.poll() is None:
            time.sleep(0.01)
        return process

    def test_sigterm_ends_in_order_and_the_next_night_goes_on(self, a_zoo: Zoo) -> None:
        process = self.begun(a_zoo)
        process.terminate()
        began = time.monotonic()
        out, err = process.communicate(timeout=60)
        assert time.monotonic() - began < 30
        done = Done(process.returncode, out, err)
        assert done.code == 143, err
        url, code = done.last
        assert code == 143
        written = json.loads(Path(url).read_text())
        assert written["exit_code"] == 143
        assert written["counts"]["deferred"] >= 1
        assert "stopping: what is in flight is finished" in err
        assert "Traceback" not in err
        assert list(a_zoo.out.glob("_parts/*/*/*.safetensors"))
        again = a_zoo("run")
        assert again.code == 0
        events = [json.loads(line) for line in Path(again.last[0]).with_name("events.jsonl").read_text().splitlines()]
        assert sum(event.get("reused", 0) for event in events) > 0
        assert a_zoo("status", "--json").json["counts"] == {"published": 6}

    def test_an_interrupt_ends_it_at_once(self, a_zoo: Zoo) -> None:
        process = self.begun(a_zoo)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (130, ""), err
        assert "run the same command again" in err
        assert "Traceback" not in err


def test_errors_of_a_run_come_before_its_last_line(a_zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    from phlora_pipeline.zoo import night

    class DownError(PhloraError):
        exit_code = 12

    def broken(*_: object, **__: object) -> None:
        raise DownError("storage is down", remedy="wait")

    monkeypatch.setattr(night, "night", broken)
    done = a_zoo("run")
    assert (done.code, done.last) == (12, ("none", 12))
    assert done.err == "error: storage is down\n  fix: wait\n"


def test_the_job_of_a_cluster_is_the_same_command(a_zoo: Zoo) -> None:
    a_zoo.add("good")
    job = Path(__file__).parent.parent / "jobs" / "nightly.py"
    done = subprocess.run([sys.executable, str(job), str(a_zoo.file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    url, code = Done(done.returncode, done.stdout, done.stderr).last
    assert (code, json.loads(Path(url).read_text())["counts"]) == (0, {"committed": 1})
