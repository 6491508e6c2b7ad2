"""Nights as jobs of a real Ray: the code that comes back is the run's own, not what Ray's client makes of it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from phlora_pipeline import submit
from phlora_pipeline.errors import DeviceError, RequestError
from tests import toys
from tests.ray_cluster import await_jobs
from tests.s3_server import _dies_with_us


@pytest.fixture(scope="module")
def dashboard() -> Iterator[str]:
    """URL of a Ray cluster's dashboard, on loopback."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # its sockets allow paths of a hundred bytes
    client_port, port = free_ports(2)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all of it on loopback
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PHLORA_PROGRESS_INTERVAL": "1",
    }
    # Of its own in everything, or a job would find another cluster of this machine, or none: the address file lies in the
    # temporary folder, the agent that starts jobs has a free port.
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", "--port=0", f"--temp-dir={folder}",
        "--num-cpus=2", "--object-store-memory=100000000", "--disable-usage-stats", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}", "--dashboard-agent-listen-port=0", f"--ray-client-server-port={client_port}",
    ]  # fmt: skip
    with open(Path(folder) / "head.log", "wb") as log:
        head = subprocess.Popen([*_dies_with_us(), *command], env=environment, stdout=log, stderr=log)
    try:
        await_cluster(f"http://127.0.0.1:{port}", head, Path(folder) / "head.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        head.terminate()
        head.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


def await_cluster(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    try:
        await_jobs(address, alive=lambda: head.poll() is None)
    except RuntimeError as error:
        raise RuntimeError(f"{error}:\n{log.read_text(errors='replace')[-4000:]}") from error


class Toy:
    """A zoo whose zoo.yaml lies in a folder of its own, as it is uploaded."""

    def __init__(self, root: Path) -> None:
        self.root, self.out, self.folder = root, root / "out", root / "job"
        self.folder.mkdir(parents=True)
        self.base = toys.llama_tensors(layers=1)

    def write(self, engine: str = "local") -> Path:
        toys.save(self.root / "llama", self.base)
        file = self.folder / "zoo.yaml"
        file.write_text(
            f"output: {self.out}\nbases: {{llama: {self.root / 'llama'}}}\n"
            f"discover: [{{prefix: {self.root / 'tuned'}, base: llama}}]\nextract: {{rank: 8, solver: exact}}\n"
            f"run: {{engine: {engine}, device: cpu, threads: 1, workers: 1, share_base: off}}\n"
        )
        return file

    def add(self, name: str, seed: int = 1, *, poison: bool = False) -> None:
        tensors = toys.fine_tuned(self.base, seed=seed)
        if poison:
            tensors["model.layers.0.self_attn.q_proj.weight"][0, 0] = float("nan")
        toys.save(self.root / "tuned" / name, tensors)

    def add_many(self) -> None:
        """Work for some ten seconds, in many tasks."""
        self.base = toys.llama_tensors(layers=6, hidden=256, inner=512, vocab=512, kv=128)
        for number in range(12):
            self.add(f"m{number}", number)

    def command(self, dashboard: str, *more: str) -> list[str]:
        flags = ["--address", dashboard, "--working-dir", str(self.folder), *more]
        return [sys.executable, "-m", "phlora_pipeline", "submit", str(self.folder / "zoo.yaml"), *flags]


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "zoo")


@pytest.mark.slow
@pytest.mark.ray
class TestOnRay:
    """Submitted, followed, answered for."""

    def test_a_good_night_is_0_and_runs_on_the_cluster(self, toy: Toy, dashboard: str) -> None:
        toy.add("good")
        toy.write(engine="auto")
        done = subprocess.run(toy.command(dashboard), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert re.fullmatch(r"phlora-\S+: SUCCEEDED\nresult: .*/result\.json; exit code 0\n", done.stdout)
        assert "1/1 models" in done.stderr
        [request] = toy.out.glob("_runs/*/request.json")
        assert json.loads(request.read_text())["run"]["engine"] == "ray"
        assert len(list(toy.out.glob("good/*/adapter_config.json"))) == 1

    def test_a_night_with_a_failure_is_3_and_one_with_nothing_to_do_0(self, toy: Toy, dashboard: str) -> None:
        toy.add("bad", poison=True)
        toy.add("good")
        toy.write()
        done = subprocess.run(toy.command(dashboard, "--json"), capture_output=True, text=True, check=False)
        job = json.loads(done.stdout)
        assert (done.returncode, job["exit_code"], job["status"]) == (3, 3, "FAILED"), done.stderr
        assert json.loads(Path(job["result"]).read_text())["counts"] == {"committed": 1, "failed": 1}
        shutil.rmtree(toy.root / "tuned" / "bad")
        again = said_by(toy, dashboard)
        assert (again.exit_code, again.status, again.result) == (0, "SUCCEEDED", "")

    def test_a_night_that_is_stopped_ends_in_order_and_is_143(self, toy: Toy, dashboard: str) -> None:
        from ray.job_submission import JobSubmissionClient

        toy.add_many()
        toy.write(engine="auto")  # ray.init puts a handler of its own in the place of ours
        client = JobSubmissionClient(dashboard)
        with subprocess.Popen(
            toy.command(dashboard, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            while not list(toy.out.glob("_parts/*/*/*.safetensors")) and process.poll() is None:
                time.sleep(0.05)
            [job] = [job for job in client.list_jobs() if job.status == "RUNNING" and job.submission_id]
            client.stop_job(job.submission_id)
            out, err = process.communicate(timeout=120)
        told = json.loads(out)
        assert (process.returncode, told["exit_code"], told["status"]) == (143, 143, "STOPPED"), err
        written = json.loads(Path(told["result"]).read_text())
        assert written["exit_code"] == 143
        assert written["counts"]["deferred"] >= 1
        assert "stopping: what is in flight is finished" in err
        assert said_by(toy, dashboard).exit_code == 0
        assert len(list(toy.out.glob("m*/*/adapter_config.json"))) == 12

    def test_a_night_that_is_killed_is_137(self, toy: Toy, dashboard: str) -> None:
        toy.add_many()
        file = toy.write()
        with subprocess.Popen(
            toy.command(dashboard, "--json"), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            while not list(toy.out.glob("_parts/*/*/*.safetensors")) and process.poll() is None:
                time.sleep(0.05)
            os.kill(driver_of(file.name), signal.SIGKILL)
            out, _ = process.communicate(timeout=120)
        told = json.loads(out)
        assert (process.returncode, told["exit_code"], told["result"]) == (137, 137, "")
        assert "killed by signal 9" in told["reason"]

    def test_not_waited_for(self, toy: Toy, dashboard: str) -> None:
        toy.add("good")
        toy.write()
        job = submit.submit(str(toy.folder / "zoo.yaml"), address=dashboard, working_dir=str(toy.folder), wait=False)
        assert (job.status, job.exit_code) == ("PENDING", None)
        self.await_adapter(toy)

    @staticmethod
    def await_adapter(toy: Toy) -> None:
        deadline = time.monotonic() + 60
        while not list(toy.out.glob("_runs/*/result.json")) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert list(toy.out.glob("good/*/adapter_config.json"))

    def test_an_interrupt_leaves_the_job_alone(self, toy: Toy, dashboard: str) -> None:
        toy.add("good")
        toy.write()
        with subprocess.Popen(toy.command(dashboard), stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("submitted phlora-")
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        assert process.returncode == 130, err
        assert re.search(r"the job goes on: submitted phlora-\S+; ray job stop phlora-", err)
        assert "Traceback" not in err
        self.await_adapter(toy)

    def test_the_job_by_rays_own_command_says_the_code_that_this_flattens(self, toy: Toy, dashboard: str) -> None:
        toy.add("bad", poison=True)
        toy.write()
        (toy.folder / "jobs").mkdir()
        shutil.copy(Path(__file__).parent.parent / "jobs" / "nightly.py", toy.folder / "jobs")
        ray = str(Path(sys.executable).with_name("ray"))
        command = [ray, "job", "submit", "--address", dashboard, "--working-dir", str(toy.folder)]
        job = ["--", "python", "jobs/nightly.py", "zoo.yaml", "--yes"]
        done = subprocess.run([*command, *job], capture_output=True, text=True, check=False)
        assert done.returncode == 1
        url, code = re.findall(r"^result: (.*); exit code (.*)$", done.stdout + done.stderr, re.MULTILINE)[-1]
        assert (code, json.loads(Path(url).read_text())["exit_code"]) == ("3", 3)

    def test_an_address_that_is_said_wins_over_the_environment(
        self, toy: Toy, dashboard: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
        client = submit._client(dashboard)
        assert client.get_address() == dashboard
        assert os.environ["RAY_API_SERVER_ADDRESS"] == "http://127.0.0.1:1"
        with pytest.raises(DeviceError, match=r"there is no Ray dashboard at http://127\.0\.0\.1:1"):
            submit._client("")


def said_by(toy: Toy, dashboard: str) -> submit.Submitted:
    heard: list[str] = []
    file = str(toy.folder / "zoo.yaml")
    job = submit.submit(file, address=dashboard, working_dir=str(toy.folder), say=heard.append)
    log = "".join(heard)
    assert log.count("result: ") == 1  # nothing is shown twice
    assert log.endswith(f"exit code {job.exit_code}\n")
    return job


def driver_of(zoo: str) -> int:
    """The process that runs the night: a job's, not the one that submitted it."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if path.read_bytes().split(b"\0")[1:5] == [b"-m", b"phlora_pipeline", b"run", zoo.encode()]:
                return int(path.parent.name)
    raise AssertionError("no such process")


class TestRefused:
    """Before anything is submitted."""

    def test_no_cluster(self, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
        toy.write()
        with pytest.raises(DeviceError, match=r"there is no Ray dashboard at http://127\.0\.0\.1:1: .*") as caught:
            submit.submit(str(toy.folder / "zoo.yaml"), address="http://127.0.0.1:1", working_dir=str(toy.folder))
        assert "--address http://HEAD:8265" in caught.value.remedy

    def test_a_wrong_zoo(self, toy: Toy) -> None:
        file = toy.write()
        file.write_text(f"{file.read_text()}nonsense: 1\n")
        with pytest.raises(RequestError, match="line 6: unknown key 'nonsense'"):
            submit.submit(str(file), working_dir=str(toy.folder))

    def test_a_zoo_that_the_job_would_not_find(self, toy: Toy, tmp_path: Path) -> None:
        file = toy.write()
        (tmp_path / "elsewhere").mkdir()
        with pytest.raises(RequestError, match=r"zoo\.yaml is not below .*elsewhere"):
            submit.submit(str(file), working_dir=str(tmp_path / "elsewhere"))
        with pytest.raises(RequestError, match="is not a local folder"):
            submit.submit(str(file), working_dir=str(tmp_path / "absent"))

    def test_an_output_that_would_be_lost_with_the_copy(self, toy: Toy) -> None:
        file = toy.write()
        with pytest.raises(RequestError, match="what is written there is lost"):
            submit.submit(str(file), working_dir=str(toy.root))


class TestTheLastWord:
    """What is made of how a job ended: a real log's last lines, and Ray's few words."""

    @staticmethod
    def told(log: str, status: str, code: int | None = None, message: str = "") -> submit.Submitted:
        client = SimpleNamespace(get_job_logs=lambda _: log)
        info = SimpleNamespace(status=SimpleNamespace(value=status), driver_exit_code=code, message=message)
        heard: list[str] = []
        found = submit._Job(client, "job", heard.append)._told(info)
        assert heard == ([log] if log else [])
        return found

    def test_the_runs_own_record_is_believed_before_the_log_and_the_log_before_ray(self, tmp_path: Path) -> None:
        record = tmp_path / "result.json"
        line = f"busy\n{submit.last_line(str(record), 3)}\n"
        absent = self.told(line, "STOPPED")
        assert (absent.exit_code, absent.result) == (3, str(record))
        assert "cannot be read from here" in absent.reason
        record.write_text(json.dumps({"exit_code": 143}))
        assert self.told(line, "FAILED", 1) == submit.Submitted("job", "FAILED", 143, str(record))

    def test_without_a_record(self) -> None:
        assert self.told(f"{submit.last_line('', 11)}\n", "FAILED", 11).exit_code == 11
        assert self.told("", "SUCCEEDED", 0).exit_code == 0
        assert self.told("Usage: …", "FAILED", 2).exit_code == 2
        assert self.told("", "FAILED", -9).exit_code == submit.KILLED

    def test_stopped_without_a_word_is_no_success(self) -> None:
        found = self.told("half a line", "STOPPED")
        assert (found.exit_code, found.result) == (submit.KILLED, "")
        assert "stopped before it could say" in found.reason

    def test_what_never_began(self) -> None:
        with pytest.raises(DeviceError, match="job did not begin: no room"):
            self.told("", "FAILED", None, "no\nroom")

    def test_the_last_of_several_lines_counts(self, tmp_path: Path) -> None:
        name = f"a b;{secrets.token_hex(2)}"  # whatever a path may hold
        log = f"{submit.last_line('', 0)}\nresult: x; exit code 9999\n{submit.last_line(f'{tmp_path}/{name}', 3)}\n"
        assert self.told(log, "FAILED", 3).result == f"{tmp_path}/{name}"


class Flaky:
    """A client whose connection breaks: a log that begins anew, and questions that are not answered."""

    def __init__(self, pieces: list[str], breaks: list[int]) -> None:
        self.log, self._pieces, self._breaks = "".join(pieces), pieces, breaks

    async def tail_job_logs(self, _: str) -> Any:
        for number, piece in enumerate(self._pieces):
            if self._breaks and self._breaks[0] == number:
                self._breaks.pop(0)
                raise RuntimeError("closed")
            yield piece

    def get_job_logs(self, _: str) -> str:
        return self.log

    def get_job_info(self, _: str) -> Any:
        if self._breaks:
            self._breaks.pop(0)
            raise RuntimeError("no answer")
        status = SimpleNamespace(value="FAILED", is_terminal=lambda: True)
        return SimpleNamespace(status=status, driver_exit_code=3, message="")


def test_a_broken_connection_shows_nothing_twice_and_leaves_nothing_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    heard: list[str] = []
    client = Flaky(["one\n", "two\n", "three\n"], [1, 0, 2, 0])
    assert submit._Job(client, "job", heard.append).followed().exit_code == 3
    assert "".join(heard) == client.log


def test_a_head_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(submit, "PATIENCE_SECONDS", 0.05)
    with pytest.raises(DeviceError, match="does not answer any more") as caught:
        submit._Job(Flaky(["x"], [0] * 100_000), "job", lambda _: None).followed()
    assert "phlora status" in caught.value.remedy
