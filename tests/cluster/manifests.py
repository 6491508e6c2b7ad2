"""What `kubectl apply -k` would send: the rendered documents of an overlay, and the pods in them."""

from __future__ import annotations

import copy
import functools
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = sorted(path.name for path in (CLUSTER / "overlays").iterdir())
OBSERVED = "cpu+observability"
"""An overlay with the component added, as its README says."""

Document = dict[str, Any]


def rendered(overlay: str) -> list[Document]:
    """A copy of one's own, to be changed at will."""
    return copy.deepcopy(_rendered(overlay))


@functools.cache
def _rendered(overlay: str) -> list[Document]:
    name, _, component = overlay.partition("+")
    if not component:
        return _built(CLUSTER / "overlays" / name)
    with tempfile.TemporaryDirectory() as folder:
        made = shutil.copytree(CLUSTER, Path(folder) / "cluster") / "overlays" / name
        with (made / "kustomization.yaml").open("a") as file:
            file.write(f"components: [../../{component}]\n")
        return _built(made)


def _built(folder: Path) -> list[Document]:
    kubectl = Path(sys.executable).with_name("kubectl")  # the pinned one, and not the machine's
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


def named(documents: list[Document], kind: str, name: str = "") -> Document:
    """The one document of a kind, or of that name."""
    [found] = [item for item in documents if item["kind"] == kind and name in {"", item["metadata"]["name"]}]
    return found


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """(what it is for, pod template) of all that will run."""
    for item in documents:
        if item["kind"] == "CronJob":
            yield item["metadata"]["name"], item["spec"]["jobTemplate"]["spec"]["template"]
        elif item["kind"] == "RayJob":
            spec = item["spec"]
            yield "submit", spec["submitterPodTemplate"]
            yield "head", spec["rayClusterSpec"]["headGroupSpec"]["template"]
            for group in spec["rayClusterSpec"]["workerGroupSpecs"]:
                yield group["groupName"], group["template"]


def walk(value: Any, path: tuple[Any, ...] = ("",)) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value, with its path."""
    yield path, value
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield from walk(item, (*path, key))


def selects(selector: Document, template: Document) -> bool:
    """Whether a label selector means a pod of this template."""
    labels = template.get("metadata", {}).get("labels", {})
    matches = (labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    expressions = selector.get("matchExpressions", ())
    kinds = (item["operator"] == "In" and labels.get(item["key"]) in item["values"] for item in expressions)
    return all(matches) and all(kinds)
