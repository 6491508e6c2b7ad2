"""A Ray cluster of fake 8-GPU nodes on this machine, whose nodes and workers can be killed."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phlora_pipeline import submit

GPUS = 8
"""Of each node, in name only."""

ENVIRONMENT: Mapping[str, str] = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on loopback, and nowhere else
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_prestart_worker_first_driver": "0",  # workers that nobody asked for, of 300 MB each
    # An environment that a busy node could not set up is tried again soon, and not in ten minutes.
    "BAD_RUNTIME_ENV_CACHE_TTL_SECONDS": "5",
    # A killed node is gone after some seconds; a busy one has all the time that it needs to answer.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
    "RAY_health_check_timeout_ms": "20000",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}


@dataclass
class FakeCluster:
    """A head without processors, and nodes; `dashboard`: URL to which jobs are submitted, if there is one."""

    cluster: Any
    dashboard: str = ""
    nodes: list[Any] = field(default_factory=list)

    @property
    def address(self) -> str:
        """For `RAY_ADDRESS`."""
        return str(self.cluster.gcs_address)

    def add(self, count: int = 1) -> None:
        """More nodes, of two processors and `GPUS` GPUs."""
        for _ in range(count):
            self.nodes.append(
                self.cluster.add_node(
                    num_cpus=2, num_gpus=GPUS, object_store_memory=80 << 20, dashboard_agent_listen_port=0
                )
            )

    def kill(self, node: Any) -> None:
        """Its raylet at once; its workers follow."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def workers(self, title: str = "ray::_RayWorker") -> list[int]:
        """Processes of actors that do tasks, on all nodes; or of others, by the beginning of their title."""
        raylets = {info.process.pid for node in self.nodes for info in node.all_processes["raylet"]}
        return sorted(pid for pid in _children(raylets) if _title(pid).startswith(title))


@contextlib.contextmanager
def running_cluster(nodes: int, *, dashboard: bool = False) -> Iterator[FakeCluster]:
    """A cluster of so many nodes; nothing is left of it."""
    before = {name: os.environ.get(name) for name in ENVIRONMENT}
    os.environ.update(ENVIRONMENT)
    try:
        from ray._private import ray_constants
        from ray.cluster_utils import Cluster

        ray_constants.ENABLE_RAY_CLUSTER = (
            False  # somebody may have imported Ray before: then it has not read the environment
        )
        # Short, since AF_UNIX paths are.
        with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
            port = _free_port() if dashboard else None
            head = {
                "num_cpus": 0, "num_gpus": 0, "object_store_memory": 80 << 20, "temp_dir": folder,
                "include_dashboard": dashboard, "dashboard_host": "127.0.0.1", "dashboard_port": port,
                "dashboard_agent_listen_port": 0,  # by itself the same for every cluster of a machine
            }  # fmt: skip
            cluster = FakeCluster(
                Cluster(initialize_head=True, head_node_args=head, shutdown_at_exit=True),
                f"http://127.0.0.1:{port}" if dashboard else "",
            )
            try:
                cluster.add(nodes)
                if dashboard:
                    await_jobs(cluster.dashboard)
                yield cluster
            finally:
                cluster.cluster.shutdown()
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def kill(pid: int) -> None:
    """At once, if it is still there."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def await_jobs(dashboard: str, alive: Callable[[], bool] = lambda: True) -> None:
    """Until a cluster takes a job: the agent that starts them is the last to come."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline and alive():
        with contextlib.suppress(Exception):  # refused connections first, half-started answers then
            submit._client(dashboard).submit_job(entrypoint="true")
            return
        time.sleep(0.3)
    raise RuntimeError(f"the cluster at {dashboard} takes no jobs")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _children(parents: set[int]) -> Iterator[int]:
    for path in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(path.name)
            if int((path / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                yield pid


def _title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except OSError:
        return ""
