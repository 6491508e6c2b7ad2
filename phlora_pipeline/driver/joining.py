"""A cluster of Ray: joined, left, and looked at."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from phlora_pipeline import __version__
from phlora_pipeline.engine import words
from phlora_pipeline.errors import DeviceError

LOOK_SECONDS = 60.0
"""How long a node is waited for that is asked what it has."""


@dataclass(frozen=True, slots=True)
class Seen:
    """A cluster as it is now.

    Attributes:
        version: its Ray's, which is this process's, or it could not have been joined.
        nodes: how many are alive.
        gpus, processors: of them all.
        strangers: nodes on which this package is missing, or of another version, each in words.
    """

    version: str
    nodes: int
    gpus: float
    processors: float
    strangers: tuple[str, ...]


def version() -> str:
    """Of the Ray that is installed here."""
    import ray

    return str(ray.__version__)


def look() -> Seen:
    """Join the cluster that `run_ray` would, and look at it and its nodes.

    Raises:
        DeviceError: there is none, or it is of another version.
    """
    import ray

    with joined(ray):
        return _seen(ray)


def _seen(ray: Any) -> Seen:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = ray.cluster_resources()
    nodes = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked = ray.remote(num_cpus=0, max_retries=0)(_package)
    calls = {
        node: asked.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
        for node in nodes
    }
    strangers = []
    for node, call in calls.items():
        try:
            found = ray.get(call, timeout=LOOK_SECONDS)
        except ray.exceptions.RayError as error:
            found = words(getattr(error, "cause", None) or error)
        if found != _package():
            strangers.append(f"node {nodes[node]}: {found}, here {_package()}")
    return Seen(version(), len(nodes), there.get("GPU", 0), there.get("CPU", 0), tuple(strangers))


def _package() -> str:
    return f"phlora-pipeline {__version__}, torch {torch.__version__.partition('+')[0]}"


@contextlib.contextmanager
def joined(ray: Any) -> Iterator[None]:
    """In the cluster of `RAY_ADDRESS`, in the one that this process is in already, or in one of this machine's own.

    Raises:
        DeviceError: there is none, or it is of another version.
    """
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = os.environ.get("RAY_ADDRESS", "")
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if port.isdigit():  # Ray itself would go on trying for many minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=20).close()
        with _own_signals():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # Ray has no type of its own for it, and says it in many
        if "Version mismatch" in str(error):
            raise DeviceError(
                f"the Ray at {address} cannot be joined: {words(error)}",
                remedy="use the same version of Ray and Python here and there: rayVersion, the image, this environment",
            ) from error
        raise DeviceError(
            f"there is no Ray at {address or 'this machine'}: {words(error)}",
            remedy="check RAY_ADDRESS, or use --engine local",
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and would end a run at once that was told to end in order."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
