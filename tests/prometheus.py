"""A real Prometheus on loopback, and promtool, for tests of what is asked of metrics."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.s3_server import _dies_with_us

OBSERVABILITY = Path(__file__).parents[1] / "cluster" / "observability"
RULES = OBSERVABILITY / "prometheus-rules.yaml"
DASHBOARD = OBSERVABILITY / "grafana-dashboard.json"


def required(name: str) -> str:
    """Path of a program; without it the test is left out."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed (Debian has it in the package prometheus)")
    return found


def alerts() -> dict[str, dict[str, Any]]:
    """By name."""
    document = yaml.safe_load(RULES.read_text())
    return {rule["alert"]: rule for group in document["groups"] for rule in group["rules"]}


def panel_queries() -> list[tuple[str, str]]:
    """(panel, expression) of all that the dashboard shows."""
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [(panel["title"], target["expr"]) for panel in panels for target in panel["targets"]]


@dataclass
class Prometheus:
    """One that scrapes every second."""

    url: str
    log: Path

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Series, as of now."""
        return list(self._get("query", query=expression)["result"])

    def value(self, expression: str) -> float:
        """Of the only series that there is."""
        [series] = self.query(expression)
        return float(series["value"][1])

    def rules(self) -> dict[str, dict[str, Any]]:
        """Alert → how it stands."""
        return {rule["name"]: rule for group in self._get("rules")["groups"] for rule in group["rules"]}

    def until(self, there: Callable[[], object], seconds: float = 60) -> None:
        """Wait for something."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):  # it starts
                if there():
                    return
            time.sleep(0.2)
        raise AssertionError(f"it did not come:\n{self.log.read_text()[-3000:]}")

    def _get(self, what: str, **arguments: str) -> dict[str, Any]:
        url = f"{self.url}/api/v1/{what}?{urllib.parse.urlencode(arguments)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return dict(json.loads(answer.read())["data"])


@contextlib.contextmanager
def running_prometheus(folder: Path, targets: Mapping[str, str]) -> Iterator[Prometheus]:
    """With the project's alerts; `targets`: job → host and port."""
    program = required("prometheus")
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": [{"job_name": job, "static_configs": [{"targets": [place]}]} for job, place in targets.items()],
    }  # fmt: skip
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        program, f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen([*_dies_with_us(), *command], stdout=log, stderr=log, cwd=folder)
    server = Prometheus(f"http://127.0.0.1:{port}", folder / "log")
    try:
        server.until(lambda: len(server.query("count_over_time(up[1h]) >= 3 and up == 1")) == len(targets))
        yield server
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.contextmanager
def served(text: str) -> Iterator[str]:
    """Host and port where a metrics.prom can be scraped."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *told: object) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()
