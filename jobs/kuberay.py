"""A night as a RayJob of KubeRay: `python jobs/kuberay.py phlora-night` is what the pod of the CronJob runs.

The manifests hold one RayJob that is suspended: the pattern. A night is a copy of it, named after the CronJob's Job, so that
there is one for each time of the schedule, however often the pod is started: a pod that comes second follows the RayJob that
is there. It ends with the night's own exit code, which KubeRay does not tell: it is in the last lines of the job's log.

A night that was lost with its cluster, found no device or no storage is tried again, `TRIES` times in all; it goes on from
the parts that are there. Other ends are a person's business. Told to stop, this ends and the night goes on; who deletes the
Job deletes the RayJob with it, and that ends the night in order.

From a laptop: `kubectl proxy`, then KUBERNETES_API=http://127.0.0.1:8001 JOB_NAME=by-hand python jobs/kuberay.py phlora-night.
"""

from __future__ import annotations

import http.client
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phlora_pipeline.errors import CredentialsError, DeviceError, NotFoundError, PhloraError, RequestError, one_line
from phlora_pipeline.submit import KILLED, told

TRIES = 3
AGAIN = frozenset({12, 14, KILLED})
"""Exit codes that another cluster, or another hour, may mend."""

STOPPED = 143
_REASONS = {
    "ValidationFailed": RequestError.exit_code,
    "PreRunningDeadlineExceeded": DeviceError.exit_code,
    "DeadlineExceeded": 124,
}
"""KubeRay's, where the night itself could not say anything; 124 as of `timeout`."""

POLL_SECONDS = float(os.environ.get("PHLORA_POLL_SECONDS", "10"))
PATIENCE_SECONDS = 600.0
"""How long an API server that does not answer is waited for: it may be upgraded meanwhile."""

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONFLICT = 409


class Api:
    """RayJobs of one namespace, as the pod's service account may see them."""

    def __init__(self) -> None:
        host, port = (os.environ.get(f"KUBERNETES_SERVICE_{part}", "") for part in ("HOST", "PORT"))
        self._server = os.environ.get("KUBERNETES_API") or f"https://{f'[{host}]' if ':' in host else host}:{port}"
        self.namespace = os.environ.get("NAMESPACE") or "phlora"

    def get(self, name: str) -> dict[str, Any] | None:
        """One RayJob; None where there is none."""
        try:
            return self._ask("GET", f"/{name}")
        except NotFoundError:
            return None

    def create(self, rayjob: Mapping[str, Any]) -> dict[str, Any] | None:
        """A new RayJob; None where one of that name is there."""
        return self._ask("POST", "", rayjob)

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        """Of the API server, for as long as it takes to answer.

        Raises:
            CredentialsError: the service account may not.
            NotFoundError: there is no such RayJob, or no KubeRay.
            RequestError: what was sent is wrong.
            DeviceError: it does not answer.
        """
        url = f"{self._server}/apis/ray.io/v1/namespaces/{self.namespace}/rayjobs{path}"
        began = time.monotonic()
        while True:
            try:
                return self._answer(method, url, body)
            except urllib.error.HTTPError as error:
                said = f"{method} {url}: {error.code} {_message(error)}"
                if error.code == _CONFLICT:
                    return None
                if error.code in {401, 403}:
                    raise CredentialsError(said, remedy="see the Role and the RoleBinding in rbac.yaml") from error
                if error.code == 404:
                    raise NotFoundError(said, remedy="is KubeRay installed, and cluster/ applied?") from error
                if error.code < 500 and error.code != 429:
                    raise RequestError(
                        said, remedy="is KubeRay of the version that cluster/README.md names?"
                    ) from error
            except (OSError, http.client.HTTPException) as error:
                said = f"{method} {url}: {one_line(error)}"
            if time.monotonic() - began > PATIENCE_SECONDS:
                raise DeviceError(said, remedy="the API server must be reachable from this pod: see network.yaml")
            time.sleep(POLL_SECONDS)

    def _answer(self, method: str, url: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        headers, context = {"Content-Type": "application/json"}, None
        if url.startswith("https:"):
            # Read anew each time: tokens are replaced every hour.
            headers["Authorization"] = f"Bearer {(ACCOUNT / 'token').read_text().strip()}"
            context = ssl.create_default_context(cafile=str(ACCOUNT / "ca.crt"))
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)  # noqa: S310  # an API server's address
        with urllib.request.urlopen(request, timeout=30, context=context) as answer:  # noqa: S310
            found: dict[str, Any] = json.load(answer)
            return found


def night(pattern: Mapping[str, Any], name: str, job: str) -> dict[str, Any]:
    """The RayJob of one night: the pattern's copy, not suspended, that goes when the Job goes which it belongs to."""
    metadata: dict[str, Any] = {"name": name, "labels": {**pattern["metadata"].get("labels", {}), "phlora/night": job}}
    if uid := os.environ.get("JOB_UID"):
        metadata["ownerReferences"] = [{"apiVersion": "batch/v1", "kind": "Job", "name": job, "uid": uid}]
    return {
        "apiVersion": pattern["apiVersion"],
        "kind": pattern["kind"],
        "metadata": metadata,
        "spec": {**pattern["spec"], "suspend": False},
    }


def ended(status: Mapping[str, Any]) -> int | None:
    r"""A RayJob's exit code by its status: the night's own where its log has it; None while it goes on.

    >>> ended({"jobDeploymentStatus": "Running"})
    >>> ended({"jobDeploymentStatus": "Failed", "message": "… code 1 …\nresult: s3://o/r.json; exit code 3"})
    3
    """
    phase, job = status.get("jobDeploymentStatus"), status.get("jobStatus")
    if phase not in {"Complete", "Failed", "ValidationFailed"}:
        return None
    if job == "SUCCEEDED":
        return 0
    if (last := told(status.get("message") or "")) is not None:
        return last[1]
    return STOPPED if job == "STOPPED" else _REASONS.get(status.get("reason", ""), KILLED)


def follow(api: Api, name: str) -> int:
    """Wait for a RayJob's end, saying what changes on the way; its exit code."""
    said = ""
    while True:
        rayjob = api.get(name)
        if rayjob is None:
            print(f"{name} has been deleted")
            return STOPPED
        status = rayjob.get("status") or {}
        now = f"{status.get('jobDeploymentStatus') or 'New'} {status.get('jobStatus', '')}".strip()
        if now != said:
            log = f"; its log: kubectl -n {api.namespace} logs -f job/{name}" if now.startswith("Running") else ""
            print(f"{name}: {now}{log}")
            said = now
        if (code := ended(status)) is not None:
            print(f"{name}: exit code {code}. {one_line(RuntimeError(status.get('message', '')[-300:]))}".rstrip(". "))
            return code
        time.sleep(POLL_SECONDS)


def _message(error: urllib.error.HTTPError) -> str:
    """The API server's own words."""
    try:
        return str(json.load(error).get("message", ""))
    except (ValueError, AttributeError, OSError):
        return str(error.reason)


def main(pattern_name: str) -> int:
    """See to one night, and tell its exit code."""
    api, job = Api(), os.environ.get("JOB_NAME", "")
    if not job:
        raise RequestError(
            "JOB_NAME is not set", remedy="give the night a name of its own by it; the CronJob takes its Job's"
        )
    pattern = api.get(pattern_name)
    if pattern is None:
        raise NotFoundError(
            f"there is no RayJob {pattern_name} in {api.namespace}", remedy="kubectl apply -k cluster/overlays/…"
        )
    code = 1
    for number in range(1, TRIES + 1):
        # Not the Job's own name: KubeRay calls the Job that submits by the RayJob's.
        name = f"{job}-{number}"
        if api.get(name) is None and api.create(night(pattern, name, job)) is not None:
            print(f"{name} created")
        code = follow(api, name)
        if code not in AGAIN:
            break
    return code


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except PhloraError as error:
        print(f"error: {error.what}\n  fix: {error.remedy}", file=sys.stderr)
        sys.exit(error.exit_code)
