"""What the CronJob's pod does about a night, whatever becomes of its RayJob. KubeRay's part is played by a list of statuses."""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import ipaddress
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from jobs import kuberay
from phlora_pipeline.errors import DeviceError
from tests.cluster import api_server, schemas
from tests.cluster.api_server import ApiServer
from tests.cluster.manifests import ROOT, Document, named, pods, rendered

Status = dict[str, str]
GOOD: Status = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
LOST: Status = {"jobDeploymentStatus": "Failed", "jobStatus": "", "reason": "JobStatusCheckTimeoutExceeded"}
SOME: Status = {
    "jobDeploymentStatus": "Failed",
    "jobStatus": "FAILED",
    "message": "failed with exit code 3, last available logs:\n3 failed\nresult: s3://o/_runs/r/result.json; exit code 3\n",
}


def ends(code: int) -> Status:
    return {**SOME, "message": f"…\nresult: none; exit code {code}"}


@contextlib.contextmanager
def server(*statuses: Status) -> Iterator[ApiServer]:
    """Each RayJob that is created stands so at once."""
    left = list(statuses)
    with api_server.running(
        named(rendered("cpu"), "RayJob"), lambda rayjob: rayjob["status"].update(left.pop(0))
    ) as api:
        yield api


def pod(api: ApiServer, job: str = "phlora-nightly-29384640") -> subprocess.CompletedProcess[str]:
    """The container's command, as Kubernetes starts it."""
    [container] = dict(pods(rendered("cpu")))["phlora-nightly"]["spec"]["containers"]
    python, *arguments = container["command"]
    assert python == "python"
    environment = {item["name"]: "" for item in container["env"]}
    environment |= {"NAMESPACE": "phlora", "JOB_NAME": job, "JOB_UID": "0f0f", "KUBERNETES_API": api.address}
    environment |= {"PHLORA_POLL_SECONDS": "0.01", "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_night_is_a_copy_of_the_pattern_that_goes_with_its_job() -> None:
    with server(GOOD) as api:
        done = pod(api)
    assert (done.returncode, done.stderr) == (0, "")
    assert api.created == ["phlora-nightly-29384640-1"]
    pattern, made = api.rayjobs["phlora-night"], copy.deepcopy(api.rayjobs["phlora-nightly-29384640-1"])
    assert made["spec"] == {**pattern["spec"], "suspend": False}
    [owner] = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "phlora-nightly-29384640", "uid": "0f0f"}
    del made["status"], made["metadata"]["ownerReferences"]
    assert list(schemas.faults([made])) == []


def test_a_pod_that_is_started_again_follows_the_rayjob_that_is_there() -> None:
    with server(GOOD) as api:
        assert [pod(api).returncode for _ in range(3)] == [0, 0, 0]
        assert api.created == ["phlora-nightly-29384640-1"]


@pytest.mark.parametrize(
    ("statuses", "code", "tries"),
    [
        ([SOME], 3, 1),
        ([ends(2)], 2, 1),
        ([ends(11)], 11, 1),
        ([ends(12), GOOD], 0, 2),
        ([ends(14), ends(14), GOOD], 0, 3),
        ([LOST, SOME], 3, 2),
        ([LOST, LOST, LOST], 137, 3),
        ([{**GOOD, "jobStatus": "STOPPED", "message": "Job was intentionally stopped."}], 143, 1),
        ([{"jobDeploymentStatus": "Failed", "reason": "DeadlineExceeded"}], 124, 1),
        ([{"jobDeploymentStatus": "Failed", "reason": "PreRunningDeadlineExceeded"}, GOOD], 0, 2),
        ([{"jobDeploymentStatus": "ValidationFailed", "reason": "ValidationFailed", "message": "no such mode"}], 2, 1),
    ],
)  # fmt: skip
def test_it_ends_with_the_nights_own_code_and_tries_again_what_may_be_mended(
    statuses: Sequence[Status],
    code: int,
    tries: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with server(*statuses) as api:
        given(monkeypatch, api)
        assert kuberay.main("phlora-night") == code
        assert api.created == [f"job-{number}" for number in range(1, tries + 1)]
    assert f"exit code {code}" in capsys.readouterr().out.splitlines()[-1]


def test_it_says_what_changes_and_where_the_log_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[Status] = [
        {"jobDeploymentStatus": "Initializing"},
        {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"},
        {"jobDeploymentStatus": "Running", "jobStatus": "PENDING"},
        GOOD,
    ]

    class Turning(ApiServer):
        def get(self, name: str) -> tuple[int, Document]:
            code, found = super().get(name)
            return code, {**found, "status": stages.pop(0)} if name == "job-1" and code == 200 else found

    monkeypatch.setattr(api_server, "ApiServer", Turning)
    with server({}) as api:
        given(monkeypatch, api)
        assert kuberay.main("phlora-night") == 0
    assert capsys.readouterr().out.splitlines() == [
        "job-1 created",
        "job-1: Initializing",
        "job-1: Running PENDING; its log: kubectl -n phlora logs -f job/job-1",
        "job-1: Complete SUCCEEDED",
        "job-1: exit code 0",
    ]


def test_a_rayjob_that_is_deleted_was_stopped_by_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    with server({}) as api:
        given(monkeypatch, api)
        api.rayjobs["job-1"] = {"metadata": {}, "spec": {"suspend": False}, "status": {}}
        monkeypatch.setattr(kuberay.time, "sleep", lambda _: api.rayjobs.pop("job-1", None))
        assert kuberay.main("phlora-night") == 143


def test_an_api_server_that_does_not_answer_is_waited_for() -> None:
    with server(GOOD) as api:
        api.refusals += [503, 500, 429]
        assert pod(api).returncode == 0


@pytest.mark.parametrize(
    ("refusal", "code", "said"),
    [(403, 11, "see the Role"), (401, 11, "see the Role"), (404, 2, "there is no RayJob phlora-night"), (422, 2, "of the version")],
)  # fmt: skip
def test_what_waiting_does_not_mend_is_told_with_its_remedy(refusal: int, code: int, said: str) -> None:
    with server() as api:
        api.refusals.append(refusal)
        done = pod(api)
    assert (done.returncode, said in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr


def test_a_night_must_have_a_name() -> None:
    with server() as api:
        done = pod(api, job="")
    assert (done.returncode, "JOB_NAME is not set" in done.stderr) == (2, True), done.stderr


def test_two_pods_at_once_have_one_rayjob(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other has created it between our look and our creation."""
    with server(GOOD) as api:
        given(monkeypatch, api)
        api.create({"metadata": {"name": "job-1"}, "spec": {"suspend": False}})
        looked = kuberay.Api.get
        hidden = iter([None])

        def get(self: kuberay.Api, name: str) -> Document | None:
            return next(hidden, looked(self, name)) if name == "job-1" else looked(self, name)

        monkeypatch.setattr(kuberay.Api, "get", get)
        assert kuberay.main("phlora-night") == 0
        assert api.created == ["job-1"]


def test_in_a_pod_it_trusts_the_clusters_authority_and_shows_the_accounts_token(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tls = certified(tmp_path)
    (tmp_path / "token").write_text("first\n")
    monkeypatch.setattr(kuberay, "ACCOUNT", tmp_path)
    pattern = named(rendered("cpu"), "RayJob")

    def operate(rayjob: Document) -> None:
        rayjob["status"].update(GOOD)
        (tmp_path / "token").write_text("second\n")  # Kubernetes replaces it every hour

    with api_server.running(pattern, operate, tls) as api:
        given(monkeypatch, api)
        host, port = api.address.removeprefix("https://").split(":")
        monkeypatch.delenv("KUBERNETES_API")
        monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
        monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
        assert kuberay.main("phlora-night") == 0
        assert api.bearers == ["Bearer first"] * 3 + ["Bearer second"]

        # Another authority's word is not taken.
        certified(tmp_path)
        monkeypatch.setattr(kuberay, "PATIENCE_SECONDS", 0.0)
        with pytest.raises(DeviceError, match="CERTIFICATE_VERIFY_FAILED"):
            kuberay.main("phlora-night")


def certified(folder: Path) -> ssl.SSLContext:
    """A server's certificate for this machine, signed by itself; what a pod trusts goes into ca.crt."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(x509.random_serial_number()).not_valid_before(now - dt.timedelta(days=1)).not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    ).public_bytes(serialization.Encoding.PEM)  # fmt: skip
    (folder / "ca.crt").write_bytes(made)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "server.pem").write_bytes(private + made)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem")
    return context


def given(monkeypatch: pytest.MonkeyPatch, api: ApiServer) -> None:
    for name, value in {"KUBERNETES_API": api.address, "NAMESPACE": "phlora", "JOB_NAME": "job"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(kuberay, "POLL_SECONDS", 0.01)
