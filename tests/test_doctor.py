"""The doctor tells a healthy place from two dozen sick ones: each fault is real, and the only thing that is found wrong."""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from phlora_pipeline import doctor, driver
from phlora_pipeline.doctor import Finding, cluster, here
from phlora_pipeline.zoo import gc
from phlora_pipeline.zoofile import RunSettings
from tests import toys
from tests.counting_proxy import Headers, Proxy, running_proxy
from tests.s3_server import ADMIN, READER, S3
from tests.zoo import nights

pytestmark = pytest.mark.s3


@dataclass
class Patient:
    """A zoo on a real S3 server behind a proxy, in which a fault can be planted."""

    s3: S3
    proxy: Proxy
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    stack: contextlib.ExitStack
    address: str = ""

    def __post_init__(self) -> None:
        base = nights.tensors(0)
        for name, tensors, shards in (("bases/b", base, 2), ("tuned/one", toys.fine_tuned(base), 1)):
            here = toys.save(self.folder / name.replace("/", "-"), dict(tensors), shards=shards)
            self.s3.upload_folder(here, name)
        self.write()

    def write(self, **others: object) -> None:
        """The zoo.yaml, with some of it otherwise."""
        plain = {
            "output": self.s3.url("out"),
            "bases": {"b": self.s3.url("bases/b")},
            "discover": [{"prefix": self.s3.url("tuned"), "base": "b"}],
            "run": nights.PLAIN,
        }
        (self.folder / "zoo.yaml").write_text(json.dumps({**plain, **others}))

    def examined(self) -> list[Finding]:
        return list(doctor.examine(str(self.folder / "zoo.yaml"), self.address))


@pytest.fixture
def patient(s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Patient]:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    with running_proxy(s3.server.endpoint) as proxy, contextlib.ExitStack() as stack:
        s3.use(endpoint=proxy.endpoint)
        yield Patient(s3, proxy, tmp_path, monkeypatch, stack)


def without(*names: str, when: Callable[[str], bool] = lambda _path: True) -> Callable[[str, str, Headers, bytes], Headers]:  # fmt: skip
    """A proxy that drops headers, and signs anew what is left: a store that does not know them."""

    def passed_on(verb: str, path: str, headers: Headers, body: bytes) -> Headers:
        if not when(path) or not any(name.lower() in names for name, _ in headers):
            return headers
        kept = [(name, value) for name, value in headers if name.lower() not in {*names, "authorization"}]
        request = AWSRequest(verb, f"http://{dict(headers)['Host']}{path}", dict(kept), body)
        S3SigV4Auth(Credentials(*ADMIN), "s3", "us-east-1").add_auth(request)
        return list(request.headers.items())

    return passed_on


def skewed(seconds: float) -> Callable[[Headers], Headers]:
    """A store whose clock is behind."""
    moment = email.utils.formatdate(time.time() - seconds, usegmt=True)
    return lambda headers: [(name, moment if name.lower() == "date" else value) for name, value in headers]


def nobody() -> int:
    """A port of loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def dashboard(version: str) -> Iterator[str]:
    """Of a cluster of another version: what `phlora submit` asks it first."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            told = json.dumps({"version": "4", "ray_version": version, "ray_commit": "0", "session_name": "s"}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *told: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def full_disk(folder: Path) -> Iterator[Path]:
    """A file system of one megabyte, full."""
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]).returncode:
        pytest.skip("a small file system can be mounted by root alone")
    try:
        with contextlib.suppress(OSError):
            (folder / "ballast").write_bytes(bytes(2 << 20))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def old_boto3(patient: Patient) -> None:
    """As after a `pip install` without the constraints."""
    info = patient.folder / "site" / "boto3-1.20.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: boto3\nVersion: 1.20.0\n")
    patient.monkeypatch.syspath_prepend(str(patient.folder / "site"))


def on_ray(patient: Patient, address: str) -> None:
    patient.monkeypatch.setenv("RAY_ADDRESS", address)
    patient.write(run={**nights.PLAIN, "engine": "ray"})


def cut_short(patient: Patient) -> None:
    whole = patient.s3.get("bases/b/model-00001-of-00002.safetensors")
    patient.s3.put("bases/b/model-00001-of-00002.safetensors", whole[:-100])


def with_profile(patient: Patient, name: str) -> None:
    patient.monkeypatch.setenv("AWS_PROFILE", name)
    patient.s3.forget()


def without_credentials(patient: Patient) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patient.monkeypatch.delenv(name)
    patient.s3.forget()


FAULTS: dict[str, tuple[Callable[[Patient], object], str, int, str, str]] = {
    "an unknown key": (
        lambda it: it.write(discovr=[]), "zoo.yaml", 2, "line 1: unknown key 'discovr'; did you mean 'discover'", "known here",
    ),
    "no zoo.yaml": (lambda it: (it.folder / "zoo.yaml").unlink(), "zoo.yaml", 2, "no zoo file", "phlora init"),
    "a secret in it": (
        lambda it: it.write(bases={"b": "https://user:hunter2@host/b"}), "zoo.yaml", 2, "a secret", "leave it out",
    ),
    "boto3 of another age": (old_boto3, "versions", 2, r"boto3 1\.20\.0 is not", "constraints.txt"),
    "a device that is not there": (
        lambda it: it.write(run={**nights.PLAIN, "device": "cuda:7"}), "device", 14, "cuda:7 is not there", "--device cpu",
    ),
    "a full disk": (
        lambda it: it.monkeypatch.setenv("RAY_TMPDIR", str(it.stack.enter_context(full_disk(it.folder / "full")))),
        "disk", 12, r"0 B of 1\.0 MB are free", "free some space",
    ),
    "a Ray that is not there": (
        lambda it: on_ray(it, f"127.0.0.1:{nobody()}"), "ray", 14, "there is no Ray at 127.0.0.1:.*refused", "RAY_ADDRESS",
    ),
    "a dashboard that is not there": (
        lambda it: setattr(it, "address", f"http://127.0.0.1:{nobody()}"), "ray", 14, "no Ray dashboard", "8265",
    ),
    "another Ray": (
        lambda it: setattr(it, "address", it.stack.enter_context(dashboard("2.9.3"))),
        "ray", 14, r"has Ray 2\.9\.3, this machine", r"ray\[default\]==2\.9\.3",
    ),
    "a wrong secret key": (
        lambda it: it.s3.use((ADMIN[0], "wrong"), endpoint=it.proxy.endpoint), "output: list", 11, "SignatureDoesNotMatch", "credentials",
    ),
    "an unknown access key": (
        lambda it: it.s3.use(("nobody", "wrong"), endpoint=it.proxy.endpoint), "output: list", 11, "InvalidAccessKeyId", "credentials",
    ),
    "a profile that is not there": (lambda it: with_profile(it, "nobody"), "credentials", 11, "profile.*nobody.* could not be found", "AWS_PROFILE"),
    "a clock that S3 takes for a replay": (
        lambda it: setattr(it.proxy, "fault", lambda _: "skewed"), "output: list", 11, "RequestTimeTooSkewed", "NTP",
    ),
    "no credentials": (without_credentials, "credentials", 11, "Unable to locate credentials", "AWS_PROFILE"),
    "expired credentials": (
        lambda it: setattr(it.proxy, "fault", lambda _: "expired"), "output: list", 11, "ExpiredToken", "credentials",
    ),
    "a store that is down": (
        lambda it: setattr(it.proxy, "fault", lambda _: "refuse"), "output: list", 12, "does not answer", "the endpoint",
    ),
    "a bucket that is not there": (
        lambda it: it.write(output="s3://nowhere/out"), "output: list", 2, "no bucket 'nowhere'", "the bucket's name",
    ),
    "no permission to write": (
        lambda it: it.s3.use(READER, endpoint=it.proxy.endpoint), "output: create once", 11, "AccessDenied", "bucket's policy",
    ),
    "a store that overwrites": (
        lambda it: setattr(it.proxy, "passed_on", without("if-none-match", when=lambda path: "uploadId" not in path)),
        "output: create once", 2, r"\(created, then created\).*ignores If-None-Match$", "conditional writes",
    ),
    "a store that overwrites by parts": (
        lambda it: setattr(it.proxy, "passed_on", without("if-none-match", when=lambda path: "uploadId" in path)),
        "output: create once, in parts", 2, "ignores If-None-Match on completing an upload in parts", "conditional writes",
    ),
    "a store that swaps for everybody": (
        lambda it: setattr(it.proxy, "passed_on", without("if-match", when=lambda path: path.endswith("/latest.json"))),
        "output: swap", 2, "had seen an older object was accepted", "latest.json may go back",
    ),
    "another clock": (
        lambda it: setattr(it.proxy, "passed_back", skewed(1200)), "clock", 11, "12[0-9][0-9]\\.[0-9] s ahead of the store's", "NTP",
    ),
    "a base that is not there": (
        lambda it: it.write(bases={"b": it.s3.url("bases/b"), "c": it.s3.url("bases/c")}), "base c", 2, "no checkpoint at", "config.json",
    ),
    "a base that is cut short": (cut_short, "base b", 2, "model-00001-of-00002.safetensors", ""),
    "a prefix that is not there": (
        lambda it: it.write(discover=[{"prefix": it.s3.url("tunde"), "base": "b"}]), "models: list", 2, "tunde", "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_named_alone_with_its_remedy(patient: Patient, fault: str) -> None:
    plant, check, code, told, remedy = FAULTS[fault]
    plant(patient)
    found = patient.examined()
    wrong = [finding for finding in found if finding.state == "wrong"]
    assert [finding.check for finding in wrong] == [check], wrong
    assert re.search(told, wrong[0].told), wrong[0]
    assert re.search(remedy, wrong[0].remedy), wrong[0]
    assert doctor.exit_code(found) == code


def test_a_store_that_ignores_ranges_is_told_by_who_reads_them(patient: Patient) -> None:
    patient.proxy.passed_on = without("range")
    wrong = {finding.check: finding for finding in patient.examined() if finding.state == "wrong"}
    assert {"base b", f"models: read {patient.s3.url('tuned')}"} <= wrong.keys()
    assert "ignores ranges" in wrong["base b"].remedy


def test_a_healthy_place_is_called_so_and_left_as_it_was(patient: Patient) -> None:
    before = patient.s3.names()
    found = patient.examined()
    assert {finding.state for finding in found} == {"ok", "skipped"}, found
    assert [finding.check for finding in found if finding.state == "skipped"] == ["ray"]
    assert doctor.exit_code(found) == 0
    assert (patient.s3.names(), patient.s3.uploads()) == (before, [])
    assert len(patient.proxy.created("/_parts/doctor/")) == 3


def test_what_a_sick_store_was_given_is_taken_back(patient: Patient) -> None:
    before = patient.s3.names()
    patient.proxy.fault = lambda request: "busy" if request.key.endswith("/latest.json") else None
    wrong = [finding.check for finding in patient.examined() if finding.state == "wrong"]
    assert wrong == ["output: swap"]
    assert (patient.s3.names(), patient.s3.uploads()) == (before, [])


def test_what_a_killed_doctor_leaves_is_garbage(patient: Patient) -> None:
    before = patient.s3.names()
    for finding in doctor.examine(str(patient.folder / "zoo.yaml")):
        if finding.check == "output: swap":
            break
    assert len(patient.s3.names() - before) == 3
    assert gc.collect(patient.s3.url("out"), 3) == []  # it may be at work still
    [garbage] = gc.collect(patient.s3.url("out"), 3, min_age_seconds=0, delete=True)
    assert "/_parts/doctor/" in garbage.url
    assert patient.s3.names() == before


def test_a_place_without_fine_tunes_is_worth_a_word_and_no_more(patient: Patient) -> None:
    patient.write(discover=[])
    [finding] = [finding for finding in patient.examined() if finding.state == "warning"]
    assert (finding.check, "under discover" in finding.remedy) == ("models: list", True)


def test_the_worst_decides_and_a_wrong_request_is_the_worst() -> None:
    codes = [Finding("a", "wrong", "", exit_code=code) for code in (3, 14, 12, 11, 2)]
    assert [doctor.exit_code(codes[:number]) for number in range(6)] == [0, 3, 14, 12, 11, 2]


def test_where_others_do_the_work_no_device_is_asked_for_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert cluster.elsewhere("", RunSettings())
    assert not cluster.elsewhere("", RunSettings(engine="local"))
    assert (cluster.dashboard_of(""), cluster.dashboard_of("http://a")) == ("", "http://a")
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    assert cluster.dashboard_of("") == "http://head:8265"


@pytest.mark.parametrize(
    ("device", "gpus", "state", "told"),
    [
        ("auto", 0, "warning", "`auto` would use processors"),
        ("auto", 8, "ok", "8 GPUs"),
        ("cpu", 0, "ok", "4 processors"),
        ("cuda", 0, "wrong", "one worker asks for 1 GPU"),
    ],
)
def test_a_cluster_without_gpus_is_told_to_whom_it_matters(
    device: str, gpus: float, state: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    monkeypatch.setattr(driver, "look", lambda: driver.Seen("2.60.0", 1, gpus, 4, ()))
    [found] = cluster.of_ray("", RunSettings(engine="ray", device=device))
    assert found.state == state
    assert told in found.told


def test_few_descriptors_and_a_missing_folder() -> None:
    assert isinstance(here.descriptors(512), here.Worry)
    assert "any number" in str(here.descriptors(resource.RLIM_INFINITY))
    with pytest.raises(here.StorageError, match="No such file"):
        here.room("/nowhere")


def test_the_command_ends_with_the_code_and_tells_machines_the_same(tmp_path: Path) -> None:
    base = nights.tensors(0)
    toys.save(tmp_path / "bases" / "b", base)
    toys.save(tmp_path / "tuned" / "one", toys.fine_tuned(base))
    zoo = {"output": "out", "bases": {"b": "bases/b", "c": "bases/c"}, "discover": [{"prefix": "tuned", "base": "b"}], "run": nights.PLAIN}  # fmt: skip
    (tmp_path / "zoo.yaml").write_text(json.dumps(zoo))
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-m", "phlora_pipeline", "doctor", "zoo.yaml"]
    folder = {"PYTHONPATH": str(Path(__file__).parents[1])}
    told, as_json = (
        subprocess.run([*command, *flag], cwd=tmp_path, env={**quiet, **folder}, capture_output=True, text=True)
        for flag in ([], ["--json"])
    )
    assert (told.returncode, as_json.returncode) == (2, 2), told.stderr
    assert re.search(r"^wrong +base c: there is no checkpoint at .*\n +fix: ", told.stdout, re.MULTILINE)
    record = json.loads(as_json.stdout)
    assert record["exit_code"] == 2
    assert [item["check"] for item in record["findings"] if item["state"] == "wrong"] == ["base c"]
