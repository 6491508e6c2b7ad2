"""Whether documents have the form that their API servers ask for: every field known, every type right."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import referencing
import yaml
from kubernetes_validate.utils import schema_contents

from tests.cluster.manifests import ROOT, Document, pods

KUBERNETES = "1.32"
"""The oldest that is meant to do: podFailurePolicy, time zones and the Job's name as a label are all in it."""

CRD = ROOT.parent / "shared" / "kuberay" / "rayjobs.v1.7.0.yaml"
"""KubeRay's own schema; where it is not, the fields that are used are checked by ours alone."""

_TEXT, _TEXTS = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
_RULE = {"alert": _TEXT, "expr": _TEXT, "labels": _TEXTS, "annotations": _TEXTS}
_EXPRESSION = {"key": _TEXT, "operator": _TEXT, "values": {"type": "array", "items": _TEXT}}


def _only(needed: str, **properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": needed.split(), "additionalProperties": False}


def _many(inner: Any) -> dict[str, Any]:
    return {"type": "array", "items": inner, "minItems": 1}


MONITORING: dict[str, Any] = {
    "PrometheusRule": _only(
        "groups", groups=_many(_only("name rules", name=_TEXT, rules=_many(_only("alert expr", **_RULE))))
    ),
    "PodMonitor": _only(
        "selector podMetricsEndpoints",
        selector=_only("matchExpressions", matchExpressions=_many(_only("key operator", **_EXPRESSION))),
        podMetricsEndpoints=_many(_only("port", port=_TEXT, interval={"type": "string", "pattern": "^[0-9]+s$"})),
    ),
}
"""Kind of the Prometheus operator's → its spec, in the fields that are used."""

OURS = Path(__file__).with_name("rayjob.schema.json")


def faults(documents: list[Document]) -> Iterator[str]:
    """What an API server would refuse, or worse, drop without a word."""
    for item in documents:
        what = f"{item.get('kind')} {item.get('metadata', {}).get('name')}"
        if item.get("apiVersion") == "ray.io/v1":
            for validator in rayjob_validators():
                yield from _told(what, validator, item)
        elif item.get("apiVersion") == "monitoring.coreos.com/v1" and item.get("kind") in MONITORING:
            yield from _told(what, _monitoring(item["kind"]), item)
        else:
            yield from _core(what, item)
    # No schema of KubeRay's checks a pod as strictly as that of pods.
    for part, template in pods(documents):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", **template.get("metadata", {})}}
        yield from _core(f"pod of {part}", {**pod, "spec": template["spec"]})


@functools.cache
def _monitoring(kind: str) -> Any:
    metadata = _only("name namespace", name=_TEXT, namespace=_TEXT, labels=_TEXTS)
    schema = _only("metadata spec", apiVersion=_TEXT, kind=_TEXT, metadata=metadata, spec=MONITORING[kind])
    return jsonschema.Draft202012Validator(schema)


@functools.cache
def rayjob_validators() -> tuple[Any, ...]:
    """By our schema, and by KubeRay's where it is there."""
    found = [json.loads(OURS.read_text())]
    if CRD.exists():
        [version] = [
            item for item in yaml.load(CRD.read_text(), yaml.CSafeLoader)["spec"]["versions"] if item["name"] == "v1"
        ]
        schema = strict(version["schema"]["openAPIV3Schema"])
        schema["properties"]["metadata"] = {"type": "object"}
        found.append(schema)
    return tuple(map(jsonschema.Draft202012Validator, found))


def strict(schema: Any) -> Any:
    """A CRD's schema as a JSON schema in which unknown fields are errors, as they are for `kubectl apply --validate`."""
    if not isinstance(schema, dict):
        return schema
    made = dict(schema)
    if made.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    if "properties" in made:
        made["properties"] = {name: strict(inner) for name, inner in made["properties"].items()}
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    for name in ("items", "additionalProperties"):
        if isinstance(made.get(name), dict):
            made[name] = strict(made[name])
    return made


def _core(what: str, item: Document) -> Iterator[str]:
    try:
        validator = _core_validator(str(item.get("kind")), str(item.get("apiVersion")))
    except FileNotFoundError:
        yield f"{what}: no such kind as {item.get('kind')} of {item.get('apiVersion')}"
        return
    yield from _told(what, validator, item)


@functools.cache
def _core_validator(kind: str, version: str) -> Any:
    """What `kubernetes-validate --strict` makes for every document anew."""
    folder = f"v{KUBERNETES}.0-local-strict"
    short = re.sub(r"^([^./]*)(?:\.[^/]*)?/", r"\1-", version)
    schema = schema_contents(f"kubernetes-json-schema/{folder}/{kind.lower()}-{short}.json", KUBERNETES)
    registry = referencing.Resource.from_contents(schema) @ _definitions(folder)
    return jsonschema.Draft202012Validator(schema, registry=registry)


@functools.cache
def _definitions(folder: str) -> Any:
    contents = schema_contents(f"kubernetes-json-schema/{folder}/_definitions.json", KUBERNETES)
    return referencing.Resource.from_contents(contents) @ referencing.Registry()


_KNOWN: dict[tuple[int, str], list[str]] = {}
"""Which validator, and a document as text → what is wrong: hundreds of mutations leave all documents but one as they were."""


def _told(what: str, validator: Any, item: Document) -> Iterator[str]:
    key = id(validator), json.dumps(item)  # validators are made once, and stay
    if key not in _KNOWN:
        found = validator.iter_errors(item)
        _KNOWN[key] = [f"{'/'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]
    for error in _KNOWN[key]:
        yield f"{what}: {error}"
