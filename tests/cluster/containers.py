"""What every pod must be: restricted, bounded, of one image, with what it names."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.cluster.manifests import Document, named, pods, walk

_QUANTITY = re.compile(r"[1-9][0-9]*(m|[KMGT]i)?")


def restricted(documents: list[Document]) -> Iterator[str]:
    """The restricted profile, and a root that is read-only."""
    contexts = []
    for part, template in pods(documents):
        pod = template["spec"].get("securityContext", {})
        if pod.get("runAsNonRoot") is not True or {pod.get(f"runAs{who}") for who in ("User", "Group")} != {1000}:
            yield f"{part}: not the image's user"
        if pod.get("fsGroup") != 1000:
            yield f"{part}: the token of its role cannot be read"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{part}: no seccomp profile"
        if set(template["spec"]) & {"hostNetwork", "hostPID", "hostIPC"}:
            yield f"{part}: shares the host's namespaces"
        contexts += [(part, container.get("securityContext", {})) for container in template["spec"]["containers"]]
    options = named(documents, "RayJob")["spec"]["rayClusterSpec"].get("autoscalerOptions", {})
    contexts.append(("autoscaler", options.get("securityContext", {})))
    for part, context in contexts:
        wanted = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        if context != wanted:
            yield f"{part}: {context}"


def resources(documents: list[Document]) -> Iterator[str]:
    for part, template in pods(documents):
        for container in template["spec"]["containers"]:
            asked = container.get("resources", {})
            if not {"cpu", "memory"} <= set(asked.get("requests", {})) or "memory" not in asked.get("limits", {}):
                yield f"{part}: does not say what it takes"
            for amount in (*asked.get("requests", {}).values(), *asked.get("limits", {}).values()):
                if not _QUANTITY.fullmatch(str(amount)):
                    yield f"{part}: {amount!r} is no quantity"
    for path, value in walk(documents):
        if path[-1] == "sizeLimit" and not _QUANTITY.fullmatch(str(value)):
            yield f"{value!r} is no size"


def mounts(documents: list[Document]) -> Iterator[str]:
    needed = {"head": "/etc/phlora", "phlora-gc": "/etc/phlora"}
    for part, template in pods(documents):
        volumes = {volume["name"]: volume for volume in template["spec"].get("volumes", [])}
        for container in template["spec"]["containers"]:
            at = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
            for name in set(at.values()) - set(volumes):
                yield f"{part}: there is no volume {name}"
            if not volumes.get(at.get("/tmp", ""), {}).get("emptyDir", {}).get("sizeLimit"):
                yield f"{part}: nothing can be written to /tmp, or too much"
            if part in needed and "configMap" not in volumes.get(at.get(needed[part], ""), {}):
                yield f"{part}: there is no zoo.yaml"
    options = named(documents, "RayJob")["spec"]["rayClusterSpec"].get("autoscalerOptions", {})
    if {"name": "tmp", "mountPath": "/tmp"} not in options.get("volumeMounts", []):
        yield "autoscaler: nothing can be written to /tmp"


def references(documents: list[Document]) -> Iterator[str]:
    """ConfigMaps and accounts that are named must be there; Secrets are made by hand, and may be missing."""
    there = {(item["kind"], item["metadata"]["name"]) for item in documents}
    for path, value in walk(documents):
        if path[-1] in {"configMapRef", "configMap"} and ("ConfigMap", value.get("name")) not in there:
            yield f"there is no ConfigMap {value.get('name')}"
        if path[-1] == "secretRef" and value != {"name": "phlora-credentials", "optional": True}:
            yield f"Secret {value}"
    for item in documents:
        if (
            item["kind"] == "ConfigMap"
            and item["metadata"]["name"] == "phlora-zoo"
            and set(item["data"]) != {"zoo.yaml"}
        ):
            yield f"phlora-zoo holds {set(item['data'])}"
    entry = named(documents, "RayJob")["spec"]["entrypoint"].split()[-1]
    gc = named(documents, "CronJob", "phlora-gc")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]
    if entry != "/etc/phlora/zoo.yaml" or gc.get("command") != ["phlora", "gc", "/etc/phlora/zoo.yaml", "--yes"]:
        yield "there is no such zoo.yaml"
    for part in ("head", "workers", "phlora-gc"):
        found = dict(pods(documents))[part]["spec"]["containers"][0].get("envFrom", [])
        if {"configMapRef": {"name": "phlora-environment"}} not in found:
            yield f"{part}: has not the environment that all share"
    fields = {
        "NAMESPACE": "metadata.namespace",
        "JOB_NAME": "metadata.labels['batch.kubernetes.io/job-name']",
        "JOB_UID": "metadata.labels['batch.kubernetes.io/controller-uid']",
    }
    env = dict(pods(documents))["phlora-nightly"]["spec"]["containers"][0].get("env", [])
    if {item["name"]: item.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath") for item in env} != fields:
        yield f"expected {fields}"


def images(documents: list[Document]) -> Iterator[str]:
    found = {container["image"] for _, template in pods(documents) for container in template["spec"]["containers"]}
    if len(found) != 1:
        yield f"more than one image: {sorted(found)}"
    for image in found:
        name, _, tag = image.rpartition(":")
        if not re.fullmatch(r"[a-z0-9.-]+/phlora-pipeline", name) or not re.fullmatch(
            r"[0-9]+\.[0-9]+\.[0-9]+(-cuda)?", tag
        ):
            yield f"{image} is not one version of our image"


def accounts(documents: list[Document]) -> Iterator[str]:
    wanted = {
        "submit": ("phlora-night", False), "head": ("phlora-night", True), "workers": ("phlora-night", False),
        "phlora-nightly": ("phlora-schedule", True), "phlora-gc": ("phlora-gc", False),
    }  # fmt: skip
    there = {item["metadata"]["name"]: item for item in documents if item["kind"] == "ServiceAccount"}
    for part, template in pods(documents):
        spec = template["spec"]
        found = spec.get("serviceAccountName"), spec.get("automountServiceAccountToken")
        if found != wanted.get(part) or found[0] not in there:
            yield f"{part}: {found}, expected {wanted.get(part)}"
    for name, item in there.items():
        if item.get("automountServiceAccountToken") is not False:
            yield f"{name}: its token goes to whoever does not ask"
        role = item["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn")
        if role is not None and not re.fullmatch(rf"arn:aws:iam::[0-9]{{12}}:role/{name}", role):
            yield f"{name}: has the role {role}"
    gpu = "nvidia.com/gpu" in str(dict(pods(documents))["workers"])
    roles = {name for name, item in there.items() if "annotations" in item["metadata"]}
    if roles != ({"phlora-night", "phlora-gc"} if gpu else set()):
        yield f"roles of AWS: {roles}"
