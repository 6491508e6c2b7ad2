"""A night as a job of a Ray cluster: submitted, followed, and answered for with its own exit code.

Ray's client flattens exit codes: whatever fails is 1, and what somebody has stopped is 0. A night says on its last line
where its `result.json` is and which code it ends with; what is written there is what `phlora submit` ends with.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import json
import logging
import os
import re
import secrets
import shlex
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from phlora_pipeline import storage, zoofile
from phlora_pipeline.errors import DeviceError, PhloraError, RequestError, one_line

STOP_SECONDS = 40
"""How long Ray waits between SIGTERM and SIGKILL; by itself 3 s, in which no task can be finished."""

KILLED = 137
"""Exit code where a job was ended before it could say how."""

POLL_SECONDS = 2.0
PATIENCE_SECONDS = 300.0
"""How long a head node that does not answer is waited for."""

_RESULT = 16 << 20
_ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
_LAST = re.compile(r"^result: (?P<url>.+); exit code (?P<code>[0-9]{1,3})$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job.

    Attributes:
        id: for `ray job logs` and `ray job stop`.
        status: Ray's: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED.
        exit_code: the run's own; None where it was not waited for.
        result: URL of the run's result.json; empty where there is none.
        reason: in words, where the code does not come from the run.
    """

    id: str
    status: str
    exit_code: int | None = None
    result: str = ""
    reason: str = ""


def last_line(url: str, code: int) -> str:
    """What a night ends its output with.

    Args:
        url: of its `result.json`; empty where none was written.
        code: its exit code.

    >>> last_line("s3://zoo/out/_runs/r/result.json", 3)
    'result: s3://zoo/out/_runs/r/result.json; exit code 3'
    """
    return f"result: {url or 'none'}; exit code {code}"


def told(log: str) -> tuple[str, int] | None:
    r"""What the last `last_line` of a log says: (URL, or empty; exit code). None where there is none.

    >>> told("…\nresult: none; exit code 2\nsome more")
    ('', 2)
    """
    found = list(_LAST.finditer(log))
    if not found:
        return None
    url = found[-1]["url"]
    return ("" if url == "none" else url), int(found[-1]["code"])


def submit(
    zoo: str,
    *,
    address: str = "",
    working_dir: str = ".",
    yes: bool = False,
    wait: bool = True,
    say: Callable[[str], None] = print,
) -> Submitted:
    """Submit a night, and follow it to its end.

    Args:
        zoo: the zoo.yaml: a URL, or a file below `working_dir`.
        address: of the cluster's dashboard; empty: RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or this machine's.
        working_dir: what is uploaded.
        yes: as of `phlora run`.
        wait: until it has ended.
        say: is given the job's log, piece by piece.

    Raises:
        RequestError: the zoo.yaml is wrong, or would not be found there; nothing was submitted.
        DeviceError: there is no such cluster, or it does not answer any more.
    """
    config = zoofile.load(zoo)
    folder = storage.normalize(working_dir)
    if not os.path.isdir(folder):
        raise RequestError(f"{working_dir} is not a local folder", remedy="give the folder to upload by --working-dir")
    if config.output == folder or config.output.startswith(f"{folder}/"):
        raise RequestError(
            f"the output {config.output} lies in {folder}, of which the cluster gets a copy: what is written there is lost",
            remedy="give the output as a URL, or as a path that all nodes share",
        )
    command = ["python", "-m", "phlora_pipeline", "run", _there(zoo, folder), *(["--yes"] if yes else [])]
    client = _client(address)
    name = f"phlora-{dt.datetime.now(dt.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}
    try:
        # exec: a shell in between would be told to end, too, and end first.
        client.submit_job(
            entrypoint=f"exec {shlex.join(command)}",
            submission_id=name,
            runtime_env={"working_dir": folder, "env_vars": environment},
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise RequestError(
            f"the cluster does not take the job: {one_line(error)}",
            remedy="is the working directory small (see .rayignore), and this Ray of the cluster's version?",
        ) from error
    say(f"submitted {name}; ray job stop {name} ends it in order\n")
    return _Job(client, name, say).followed() if wait else Submitted(name, "PENDING")


def version(address: str) -> str:
    """Of the Ray behind a dashboard.

    Raises:
        DeviceError: there is no dashboard there.
    """
    client = _client(address)
    try:
        # The public get_version is of the interface, which has been the same for years.
        told = client._do_request("GET", "/api/version").json()  # noqa: SLF001
        return str(told["ray_version"])
    except (RuntimeError, ValueError, OSError, KeyError, TypeError) as error:
        raise DeviceError(
            f"{address} does not tell its version, as a Ray dashboard does: {one_line(error)}",
            remedy="give the dashboard's address: http://HEAD:8265",
        ) from error


def _there(zoo: str, folder: str) -> str:
    """What the zoo.yaml is called in the job."""
    url = storage.normalize(zoo)
    if "://" in url:
        return url
    if not url.startswith(f"{folder}/"):
        raise RequestError(
            f"{url} is not below {folder}, so that the job would not find it",
            remedy="give its folder by --working-dir, or put it into object storage",
        )
    return os.path.relpath(url, folder)


def _client(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient

    for name in ("_private.runtime_env.packaging", "dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk"):
        logging.getLogger(f"ray.{name}").setLevel("WARNING")  # how it packs a folder is not of interest
    try:
        with _without(_ADDRESSES if address else ()):
            return JobSubmissionClient(address or None)
    except (RuntimeError, ValueError, OSError) as error:
        told = address or next(filter(None, map(os.environ.get, _ADDRESSES)), "this machine")
        raise DeviceError(
            f"there is no Ray dashboard at {told}: {one_line(error)}",
            remedy="give it as --address http://HEAD:8265",
        ) from error


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    """Ray lets these variables win over an address that it is given: a job would go to another cluster than was said."""
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


class _Job:
    """A job that has been submitted."""

    def __init__(self, client: Any, name: str, say: Callable[[str], None]) -> None:
        self._client, self._name, self._say = client, name, say
        self._shown = 0

    def followed(self) -> Submitted:
        """Show its log until it has ended, and tell how it did."""
        lost = time.monotonic()
        while True:
            try:
                # A thread: Ctrl-C must not come to an event loop that is only half made.
                tail = threading.Thread(target=self._tail, name="phlora-log", daemon=True)
                tail.start()
                tail.join()
                info = self._client.get_job_info(self._name)
                lost = time.monotonic()
            except (RuntimeError, OSError) as error:
                if time.monotonic() - lost > PATIENCE_SECONDS:
                    raise DeviceError(
                        f"the cluster does not answer any more, and {self._name} with it: {one_line(error)}",
                        remedy="what it has published stays: see phlora status, and submit again",
                    ) from error
            else:
                if info.status.is_terminal():
                    return self._told(info)
            time.sleep(POLL_SECONDS)

    def _tail(self) -> None:
        """Show the log as it grows, from where it was left: after a break it begins anew."""

        async def follow() -> None:
            seen = 0
            async for text in self._client.tail_job_logs(self._name):
                seen += len(text)
                self._show(text, seen)

        with contextlib.suppress(Exception):  # whatever becomes of the log, the job's end is asked for elsewhere
            asyncio.run(follow())

    def _show(self, text: str, seen: int) -> None:
        if seen > self._shown:
            self._say(text[-(seen - self._shown) :])
            self._shown = seen

    def _told(self, info: Any) -> Submitted:
        """The run's own word for how it ended; Ray's only where there is none."""
        log = ""
        with contextlib.suppress(RuntimeError, OSError):
            log = self._client.get_job_logs(self._name)
            self._show(log, len(log))
        status = str(info.status.value)
        if (last := told(log)) is not None:
            url, code = last
            return Submitted(self._name, status, *(_written(url, code) if url else (code, "")))
        if info.driver_exit_code is not None:
            code = info.driver_exit_code
            killed = f"it was killed by signal {-code}" if code < 0 else ""
            return Submitted(self._name, status, KILLED if code < 0 else code, "", killed)
        if status == "STOPPED":
            return Submitted(self._name, status, KILLED, "", "it was stopped before it could say how far it had come")
        raise DeviceError(
            f"{self._name} did not begin: {one_line(RuntimeError(info.message or status))}",
            remedy="see the cluster's dashboard",
        )


def _written(url: str, told: int) -> tuple[int, str, str]:
    """(exit code, URL, reason) by the result.json; what the log says where that cannot be read from here."""
    try:
        info = storage.stat(url)
        document = json.loads(storage.read_object(info, limit=_RESULT)) if info is not None else {}
        return int(document["exit_code"]), url, ""
    except (PhloraError, ValueError, KeyError, TypeError) as error:
        return told, url, f"by the log; {url} cannot be read from here: {one_line(error)}"
