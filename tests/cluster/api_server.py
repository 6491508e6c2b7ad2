"""An API server's RayJobs on loopback: kept as KubeRay keeps them, with whoever plays the operator saying how they stand."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.cluster.manifests import Document

SPACE = "/apis/ray.io/v1/namespaces/phlora/rayjobs"


class ApiServer:
    """RayJobs by name; `operate` is told of each that is created, and sets its status.

    Attributes:
        rayjobs: as they stand.
        refusals: HTTP codes that the next requests are answered with.
        bearers: whose token each request had.
    """

    def __init__(self, pattern: Document, operate: Callable[[Document], None]) -> None:
        self.rayjobs: dict[str, Document] = {pattern["metadata"]["name"]: pattern}
        self.refusals: list[int] = []
        self.address = ""
        self.bearers: list[str] = []
        self._operate = operate

    @property
    def created(self) -> list[str]:
        """Names of all but the pattern, in their order."""
        return [name for name, item in self.rayjobs.items() if not item["spec"]["suspend"]]

    def get(self, name: str) -> tuple[int, Document]:
        return (200, self.rayjobs[name]) if name in self.rayjobs else (404, {"message": f'rayjobs "{name}" not found'})

    def create(self, rayjob: Document) -> tuple[int, Document]:
        name = rayjob["metadata"]["name"]
        if name in self.rayjobs:
            return 409, {"message": f'rayjobs "{name}" already exists'}
        self.rayjobs[name] = {**rayjob, "status": {}}
        self._operate(self.rayjobs[name])
        return 201, self.rayjobs[name]


@contextlib.contextmanager
def running(
    pattern: Document, operate: Callable[[Document], None], tls: ssl.SSLContext | None = None
) -> Iterator[ApiServer]:
    """On a free port, until the end; by HTTPS where it has a certificate."""
    api = ApiServer(pattern, operate)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(lambda: api.get(self.path.removeprefix(f"{SPACE}/")))

        def do_POST(self) -> None:
            assert self.path == SPACE
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._answer(lambda: api.create(body))

        def _answer(self, done: Callable[[], tuple[int, Any]]) -> None:
            api.bearers.append(self.headers.get("Authorization", ""))
            code, body = (api.refusals.pop(0), {"message": "not now"}) if api.refusals else done()
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # who has asked may have been ended meanwhile
                self.wfile.write(data)

        def log_message(self, *told: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        api.address = f"http{'s' if tls else ''}://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield api
        finally:
            server.shutdown()
            thread.join()
