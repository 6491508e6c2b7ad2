"""Imports go downwards only, and each heavy dependency has one home."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "phlora_pipeline"

LAYERS = [
    {"errors", "lowrank", "safetensors_format", "storage", "checkpoint", "config", "machine"},
    {"targets", "plan", "dispatch", "parts", "adapter", "manifest", "summary", "card"},
    {"extract", "driver", "reducer", "runlog", "verify", "convert"},
    {"pipeline"},
    {"cli", "console", "render", "__main__"},
]
HOMES = {
    "ray": {"driver"},
    "pyarrow": {"manifest"},
    "pydantic": {"config"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "stamina": {"storage"},
    "typer": {"cli"},
    "rich": {"console", "render"},
    "safetensors": {"convert"},  # writing what was unpickled; reading is our own, strictly
}


def modules() -> dict[str, list[Path]]:
    """Module of the package → its files; a sub-package counts as one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    found.pop("__init__")
    return found


def imported(path: Path) -> set[str]:
    """Dotted names of everything that a file imports, however late."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(module: str) -> int:
    return next(number for number, layer in enumerate(LAYERS) if module in layer)


def test_every_module_has_a_layer_and_every_layer_only_modules_that_exist() -> None:
    assert set(modules()) == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downwards_or_sideways_without_a_circle(module: str) -> None:
    for path in modules()[module]:
        for name in imported(path):
            if not name.startswith("phlora_pipeline."):
                continue
            other = name.split(".")[1]
            if other not in modules() or other == module:
                continue
            assert layer_of(other) <= layer_of(module), (
                f"{module} (layer {layer_of(module)}) imports {other} (layer {layer_of(other)})"
            )


def test_there_are_no_import_circles() -> None:
    edges = {
        module: {name.split(".")[1] for path in paths for name in imported(path) if name.startswith("phlora_pipeline.")}
        - {module}
        for module, paths in modules().items()
    }
    while edges:
        leaves = {module for module, others in edges.items() if not others & edges.keys()}
        assert leaves, f"these modules import each other in a circle: {sorted(edges)}"
        edges = {module: others for module, others in edges.items() if module not in leaves}


@pytest.mark.parametrize("dependency", sorted(HOMES))
def test_a_dependency_is_imported_only_in_its_home(dependency: str) -> None:
    users = {
        module
        for module, paths in modules().items()
        for path in paths
        for name in imported(path)
        if name.split(".")[0] == dependency
    }
    assert users == HOMES[dependency]


def test_importing_the_package_and_planning_loads_no_engine() -> None:
    """A person who types `phlora plan` should not wait for Ray, Arrow or an S3 client."""
    script = (
        "import sys, phlora_pipeline, phlora_pipeline.pipeline;"
        "print([name for name in ('ray', 'pyarrow', 'boto3', 's3fs', 'matplotlib', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
