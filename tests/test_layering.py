"""Imports go downwards only, and each heavy dependency has one home."""

from __future__ import annotations

import ast
import functools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import toys

PACKAGE = Path(__file__).parent.parent / "phlora_pipeline"

LAYERS = [
    {
        "errors",
        "lowrank",
        "ranks",
        "safetensors_format",
        "storage",
        "quantised",
        "formats",
        "tensors",
        "checkpoint",
        "config",
        "zoofile",
        "machine",
    },
    {
        "reading",
        "names",
        "targets",
        "loaders",
        "experts",
        "convolutions",
        "carry",
        "plan",
        "dispatch",
        "parts",
        "adapter",
        "lora",
        "manifest",
        "metrics",
        "summary",
        "card",
        "policy",
        "matrix",
    },
    {
        "extract",
        "engine",
        "pool",
        "driver",
        "merge",
        "reducer",
        "rows",
        "runlog",
        "verify",
        "logits",
        "convert",
        "calibrate",
        "compress",
    },
    {"prepare", "concluding", "pipeline", "several", "zoo", "submit", "doctor", "report"},
    {"cli", "console", "render", "api", "__main__"},
]
HOMES = {
    "ray": {"driver", "submit"},
    "pyarrow": {"manifest"},
    "pydantic": {"config", "zoofile"},
    "yaml": {"zoofile"},
    "fsspec": {"storage"},
    "s3fs": {"storage"},
    "boto3": {"storage"},
    "botocore": {"storage"},
    "stamina": {"storage"},
    "matplotlib": {"report"},
    "jinja2": {"report"},
    "typer": {"cli"},
    "prometheus_client": {"metrics"},
    "packaging": {"doctor"},
    "rich": {"console", "render"},
    "safetensors": {"convert"},  # writing what was unpickled; reading is our own, strictly
}


NUMERICS = [
    "faults", "beside", "small", "delta", "noise", "rounded", "operator", "panels", "krylov", "ritz", "compress", "full", "certificate", "checks", "energy", "routes", "solve", "decompose",
]  # fmt: skip


def modules() -> dict[str, list[Path]]:
    """Module of the package → its files; a sub-package counts as one module."""
    found: dict[str, list[Path]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        found.setdefault(name, []).append(path)
    found.pop("__init__")
    return found


@functools.cache
def imported(path: Path) -> frozenset[str]:
    """Dotted names of everything that a file imports, however late."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


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


def test_the_numerics_know_tensors_and_nothing_else_of_the_project() -> None:
    """No storage, no logging, no settings: whoever wants the mathematics alone takes the folder."""
    names = {name for path in modules()["lowrank"] for name in imported(path)}
    others = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    assert others == {"torch", "phlora_pipeline"}
    assert all(name.startswith("phlora_pipeline.lowrank") for name in names if name.startswith("phlora_pipeline"))


def test_the_numerics_stand_on_each_other_in_one_order() -> None:
    files = {path.stem: path for path in modules()["lowrank"]}
    assert set(files) == {*NUMERICS, "__init__"}
    for number, module in enumerate(NUMERICS):
        used = {name.split(".")[2] for name in imported(files[module]) if name.startswith("phlora_pipeline.lowrank.")}
        assert used & set(files) <= set(NUMERICS[:number]), module


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


def after_command(*arguments: object) -> tuple[int, set[str], int]:
    """Of a `phlora` in a process of its own: its exit code, the top modules it has loaded, and the objects it has frozen."""
    script = (
        "import atexit, gc, json, sys; from phlora_pipeline import cli\n"
        "def tell(): print(json.dumps([sorted({name.partition('.')[0] for name in sys.modules}), gc.get_freeze_count()]))\n"
        "atexit.register(tell); cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    loaded, frozen = json.loads(done.stdout.splitlines()[-1])
    return done.returncode, set(loaded), frozen


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--version"], 0),
        (["extract", "--help"], 0),
        (["extract", "--base", "x"], 2),
        (["extract", "--base", "x", "--tuned", "y", "--out", "z", "--rank", "0"], 2),
        (["convert", "nothing-there.bin", "z"], 2),
        (["run", "--help"], 0),
        (["merge", "--help"], 0),
        (["doctor", "--help"], 0),
        (["run", "nothing-there.yaml"], 2),
        (["submit", "nothing-there.yaml"], 2),
        (["plan", "nothing-there.yaml"], 2),
        (["report", "--help"], 0),
    ],
    ids=[
        "version",
        "help",
        "usage",
        "setting",
        "convert",
        "zoo-help",
        "merge-help",
        "doctor-help",
        "run",
        "submit",
        "plan",
        "report",
    ],
)
def test_a_command_that_computes_nothing_does_not_wait_for_torch(arguments: list[str], code: int) -> None:
    ended, loaded, _ = after_command(*arguments)
    assert ended == code
    assert not loaded & {"torch", "numpy", "pyarrow", "ray", "fsspec", "boto3", "matplotlib"}


def test_a_local_extraction_loads_only_what_it_needs_and_has_it_frozen(tmp_path: Path) -> None:
    base = toys.llama_tensors(layers=1)
    pair = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", toys.fine_tuned(base))
    flags = ["--engine", "local", "--device", "cpu", "--threads", 1]
    code, loaded, frozen = after_command(
        "extract", "--base", pair[0], "--tuned", pair[1], "--out", tmp_path / "out", *flags
    )
    assert code == 0
    assert loaded >= {"torch", "pyarrow"}
    assert not loaded & {"ray", "fsspec", "s3fs", "boto3", "botocore", "aiohttp", "stamina", "safetensors", "rich"}
    assert frozen > 100_000  # all of torch: no collection looks through it again
