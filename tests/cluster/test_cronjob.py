"""The CronJob's own container command, for real: a Ray head, an S3 server, and the environment and zoo.yaml of the manifests.

What is played is KubeRay: the stand-in starts the RayJob's entrypoint on the Ray cluster that is there, and tells its status.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline import storage, submit
from phlora_pipeline.zoo import layout
from tests import toys
from tests.cluster import api_server
from tests.cluster.api_server import ApiServer
from tests.cluster.manifests import ROOT, Document, named, pods, rendered
from tests.ray_cluster import running_cluster
from tests.s3_server import S3

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.s3]

MODELS, ADAPTERS = "phlora-models", "phlora-adapters"
OUT = f"s3://{ADAPTERS}/zoo"
JOB = "phlora-nightly-29384640"


class Cluster:
    """The overlay without GPUs, as far as it can stand on this machine."""

    def __init__(self, folder: Path, s3: S3, dashboard: str) -> None:
        self.documents = rendered("cpu")
        self.dashboard = dashboard
        self._s3, self._folder = s3, folder
        self._config = folder / "etc" / "phlora"  # what the pods have at /etc/phlora
        self._config.mkdir(parents=True)
        for name, text in named(self.documents, "ConfigMap", "phlora-zoo")["data"].items():
            (self._config / name).write_text(text)

    @property
    def client(self) -> Any:
        return submit._client(self.dashboard)

    def upload(self, name: str, tensors: dict[str, Any]) -> None:
        here = toys.save(self._folder / name, tensors)
        for path in here.iterdir():
            self._s3.client.put_object(Bucket=MODELS, Key=f"{name}/{path.name}", Body=path.read_bytes())

    def operate(self, rayjob: Document) -> None:
        """What KubeRay does with a RayJob, but for its cluster: start the entrypoint under its id, and tell how it stands."""
        spec, status = rayjob["spec"], rayjob["status"]
        client = self.client
        with contextlib.suppress(RuntimeError):  # each night has a cluster of its own, and there the id is free
            client.delete_job(spec["jobId"])
        entrypoint = spec["entrypoint"].replace("/etc/phlora", str(self._config))
        client.submit_job(entrypoint=entrypoint, submission_id=spec["jobId"])
        status["jobDeploymentStatus"] = "Running"

        def look() -> None:
            while status["jobDeploymentStatus"] == "Running":
                info = client.get_job_info(spec["jobId"])
                status.update(jobStatus=str(info.status.value), message=info.message or "")
                if info.status.is_terminal():
                    status["jobDeploymentStatus"] = "Failed" if status["jobStatus"] == "FAILED" else "Complete"
                time.sleep(0.3)

        threading.Thread(target=look, daemon=True).start()

    def pod(self, api: ApiServer, job: str = JOB) -> subprocess.Popen[str]:
        """The container, with what Kubernetes fills in."""
        [container] = dict(pods(self.documents))["phlora-nightly"]["spec"]["containers"]
        told = {"NAMESPACE": "phlora", "JOB_NAME": job, "JOB_UID": "0f0f"}
        assert {item["name"] for item in container["env"]} == set(told)
        python, *arguments = container["command"]
        assert python == "python"
        environment = {**told, "KUBERNETES_API": api.address, "PHLORA_POLL_SECONDS": "0.3", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen(
            [sys.executable, *arguments], env={"PATH": os.environ["PATH"], **environment}, cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def stop_head(self) -> subprocess.Popen[str]:
        """The head's preStop, without `ray stop`: on this machine there may be others."""
        hook = dict(pods(self.documents))["head"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        night, ray = hook[-1].split("; ")
        assert ray == "ray stop"
        environment = {**os.environ, "RAY_ADDRESS": self.dashboard}
        return subprocess.Popen([*hook[:-1], night], env=environment, stdout=subprocess.DEVNULL, text=True)

    def names(self, end: str) -> list[str]:
        return sorted(info.url.removeprefix(f"{OUT}/") for info in storage.list_tree(OUT) if info.url.endswith(end))


@pytest.fixture
def cluster(tmp_path: Path, s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Ray's processes have the head's environment from the manifests, and the credentials that a Secret would bring."""
    documents = rendered("cpu")
    head = dict(pods(documents))["head"]["spec"]["containers"][0]
    shared = named(documents, "ConfigMap", "phlora-environment")["data"]
    for name, value in {**shared, **{item["name"]: item["value"] for item in head["env"]}}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for bucket in (MODELS, ADAPTERS):
        s3.client.create_bucket(Bucket=bucket)
    with running_cluster(2, dashboard=True) as ray:
        yield Cluster(tmp_path, s3, ray.dashboard)
    for bucket in (MODELS, ADAPTERS):
        for page in s3.client.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            for entry in page.get("Contents", []):
                s3.client.delete_object(Bucket=bucket, Key=entry["Key"])
        s3.client.delete_bucket(Bucket=bucket)


def test_nights_of_the_manifests(cluster: Cluster) -> None:
    base = toys.llama_tensors(layers=1)
    cluster.upload("bases/llama-3.1-8b", base)
    for number in range(2):
        cluster.upload(f"finetunes/m{number}", toys.fine_tuned(base, seed=number))
    with api_server.running(named(cluster.documents, "RayJob"), cluster.operate) as api:
        # The pod's node is drained: the pod ends, the night does not, and the next pod follows it.
        first = cluster.pod(api)
        await_that(lambda: api.created)
        first.terminate()
        first.communicate(timeout=10)
        assert first.returncode == -signal.SIGTERM
        second = cluster.pod(api)
        told, _ = second.communicate(timeout=180)
        assert (second.returncode, api.created) == (0, [f"{JOB}-1"]), told + log(cluster)
        assert len(cluster.names(f"/{layout.CONFIG}")) == 2

        # The head is told to go in the middle of a night: it ends in order, and says so.
        large = toys.llama_tensors(layers=6, hidden=256, inner=512, vocab=512, kv=128)
        cluster.upload("bases/llama-3.1-8b", large)
        for number in range(12):
            cluster.upload(f"finetunes/l{number}", toys.fine_tuned(large, seed=number))
        third = cluster.pod(api, "phlora-nightly-29386080")
        await_that(lambda: cluster.names(".safetensors")[2:] or third.poll() is not None)
        began = time.monotonic()
        hook = cluster.stop_head()
        told, _ = third.communicate(timeout=60)
        assert third.returncode == 143, told + log(cluster)
        assert time.monotonic() - began < 30
        assert hook.wait(30) == 0
        results = [json.loads(storage.read_object(info, limit=1 << 20)) for info in results_of(cluster)]
        assert sorted(result["exit_code"] for result in results) == [0, 143]
        assert sum(result["counts"].get("deferred", 0) for result in results) >= 1


def results_of(cluster: Cluster) -> list[Any]:
    return [storage.stat(f"{OUT}/{name}") for name in cluster.names("/result.json")]


def log(cluster: Cluster) -> str:
    with contextlib.suppress(RuntimeError):
        return str(cluster.client.get_job_logs("night"))
    return ""


def await_that(happened: Any) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)
