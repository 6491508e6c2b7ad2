"""How fast tensors come from an object store: our `read_ranges` beside the clients, at S3's pace.

64 ranges of 8 MiB from `paced`, as a worker reads them: the best of three, all in this process, one after another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import boto3
import s3fs
from botocore.config import Config

from phlora_pipeline import storage
from phlora_pipeline.storage import ByteRange

from . import paced
from .settings import Bench

RANGE = 8 << 20
URL = "s3://bench/object"
_REPEATS = 3


def run(bench: Bench) -> None:
    """Ours first and last, since the machine may change its pace."""
    count = min(bench.sizes.ranges, paced.OBJECT_BYTES // RANGE)
    with paced_server() as endpoint:
        os.environ.update(_environment(endpoint))
        methods: dict[str, Callable[[int], None]] = {
            "ours": ours,
            "boto3, 8 threads": boto(endpoint, 8),
            "boto3, 16 threads": boto(endpoint, 16),
            "s3fs cat_file, 16 threads": s3fs_threads(endpoint),
            "one connection": boto(endpoint, 1),
            "ours, once more": ours,
        }
        for name, read in methods.items():
            bench.say(f"ranges: {name}")
            seconds = min(_timed(read, count) for _ in range(1 if name == "one connection" else _REPEATS))
            bench.save({name: {"bytes": count * RANGE, "seconds": seconds, "rate": count * RANGE / seconds}})


def ours(count: int) -> None:
    """As a worker reads."""
    memory = bytearray(count * RANGE)
    view = memoryview(memory)
    storage.read_ranges(
        [ByteRange(URL, paced.ETAG, i * RANGE, view[i * RANGE : (i + 1) * RANGE]) for i in range(count)]
    )


def boto(endpoint: str, threads: int) -> Callable[[int], None]:
    """The client alone, with nothing checked."""
    client: Any = boto3.client("s3", endpoint_url=endpoint, config=Config(max_pool_connections=threads))

    def read(count: int) -> None:
        memory = memoryview(bytearray(count * RANGE))

        def one(number: int) -> None:
            start = number * RANGE
            body = client.get_object(Bucket="bench", Key="object", Range=f"bytes={start}-{start + RANGE - 1}")["Body"]
            into, done = memory[start : start + RANGE], 0
            while done < RANGE:
                done += body.readinto(into[done:])

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(count)))

    return read


def s3fs_threads(endpoint: str) -> Callable[[int], None]:
    """What reading through fsspec would be at its best."""
    fs: Any = s3fs.S3FileSystem(endpoint_url=endpoint, skip_instance_cache=True)

    def read(count: int) -> None:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda i: fs.cat_file("bench/object", start=i * RANGE, end=(i + 1) * RANGE), range(count)))

    return read


@contextmanager
def paced_server() -> Iterator[str]:
    """Its endpoint."""
    with subprocess.Popen([sys.executable, "-m", "jobs.bench.paced"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{int(server.stdout.readline())}"
        finally:
            server.kill()


def _environment(endpoint: str) -> dict[str, str]:
    keys = {"AWS_ACCESS_KEY_ID": "bench", "AWS_SECRET_ACCESS_KEY": "bench", "AWS_DEFAULT_REGION": "us-east-1"}
    return {**keys, "AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}


def _timed(read: Callable[[int], None], count: int) -> float:
    began = time.perf_counter()
    read(count)
    return time.perf_counter() - began
