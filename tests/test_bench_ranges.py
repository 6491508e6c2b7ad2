"""The paced server speaks enough of S3 for the clients that are timed on it, and keeps its pace."""

from __future__ import annotations

import os
import time
import urllib.request
from collections.abc import Iterator

import pytest

from jobs.bench import paced, ranges


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    with ranges.paced_server() as found:
        yield found
    os.environ.clear()
    os.environ.update(before)


def test_a_range_is_answered_whole_and_not_before_its_time(endpoint: str) -> None:
    asked = urllib.request.Request(f"{endpoint}/bench/object", headers={"Range": f"bytes=100-{100 + ranges.RANGE - 1}"})
    began = time.monotonic()
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.status == 206
        assert answer.headers["Content-Range"] == f"bytes 100-{100 + ranges.RANGE - 1}/{paced.OBJECT_BYTES}"
        assert answer.headers["ETag"] == f'"{paced.ETAG}"'
        assert answer.read() == bytes(ranges.RANGE)
    assert time.monotonic() - began >= paced.FIRST_BYTE_SECONDS + ranges.RANGE / paced.RATE - 0.02


def test_every_client_reads_all_of_it(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ranges._environment(endpoint).items():
        monkeypatch.setenv(name, value)
    for read in (ranges.boto(endpoint, 2), ranges.s3fs_threads(endpoint)):
        read(3)
