"""The commands as functions: what the module's own examples do not show."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from phlora_pipeline import api
from phlora_pipeline.errors import CheckpointError, ConflictError, NotFoundError, PhloraError, RequestError
from tests import runs, toys

FUNCTIONS = [name for name in api.__all__ if name[0].islower()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a fine-tune and an adapter of rank 8, which no test changes."""
    folder = tmp_path_factory.mktemp("api")
    base = toys.llama_tensors(layers=1)
    toys.save(folder / "base", base)
    toys.save(folder / "tuned", toys.fine_tuned(base))
    runs.extract(folder / "base", folder / "tuned", folder / "r8")
    return folder


def spoilt(folder: Path, at: Path) -> Path:
    """The adapter with one entry that is no number."""
    at.mkdir()
    tensors = load_file(folder / "r8" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, at / "adapter_model.safetensors")
    (at / "adapter_config.json").write_bytes((folder / "r8" / "adapter_config.json").read_bytes())
    return at


Call = Callable[[Path, str], object]
WRONG: dict[str, tuple[Call, type[PhloraError], str]] = {
    "extract, a setting": (lambda at, out: api.extract(f"{at}/base", f"{at}/tuned", out, rnak=4), RequestError, "rnak"),
    "extract, a value": (lambda at, out: api.extract(f"{at}/base", f"{at}/tuned", out, rank=-1), RequestError, "rank"),
    "extract, no base": (lambda at, out: api.extract(f"{at}/none", f"{at}/tuned", out), NotFoundError, "/none"),
    "extract_ranks": (lambda at, out: api.extract_ranks(f"{at}/base", f"{at}/tuned", out, []), RequestError, "rank"),
    "compress, rank": (lambda at, out: api.compress(f"{at}/r8", out, rank=9), RequestError, "its largest is 8"),
    "compress, none": (lambda at, out: api.compress(f"{at}/r9", out, rank=4), NotFoundError, "/r9"),
    "merge, another base": (lambda at, out: api.merge(f"{at}/short", [f"{at}/r8"], out), RequestError, "the base has no"),
    "merge, a weight": (lambda at, out: api.merge(f"{at}/base", [(f"{at}/r8", math.nan)], out), RequestError, "nan"),
    "merge, in the base": (lambda at, out: api.merge(f"{at}/base", [f"{at}/r8"], f"{at}/base/out"), ConflictError, "lie in one another"),
    "verify": (lambda at, out: api.verify(f"{at}/base", f"{at}/tuned", f"{at}/base"), RequestError, "adapter_config.json"),
    "report, no manifest": (lambda at, out: api.report([f"{at}/base"], out + ".md", form="md"), PhloraError, "base"),
    "report, no place": (lambda at, out: api.report([f"{at}/r8"]), RequestError, "needs a place"),
    "energy_curve": (lambda at, out: api.energy_curve(f"{at}/base"), NotFoundError, "energy.parquet"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_an_exception_with_the_commands_words(
    wrong: str, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    call, kind, says = WRONG[wrong]
    toys.save(folder / "short", {"model.norm.weight": torch.ones(4)})
    before = runs.contents(folder)
    with pytest.raises(kind, match=says) as caught:
        call(folder, str(tmp_path / "out"))
    assert (caught.value.exit_code, bool(caught.value.remedy)) == (2, True)
    assert "\n" not in caught.value.what
    assert not list(tmp_path.iterdir())
    assert runs.contents(folder) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("call", ["compress", "merge"])
def test_what_is_no_number_leaves_nothing(call: str, folder: Path, tmp_path: Path) -> None:
    bad, out = str(spoilt(folder, tmp_path / "bad")), str(tmp_path / "out")
    with pytest.raises(CheckpointError, match="NaN or infinite, the first at"):
        api.compress(bad, out, rank=4) if call == "compress" else api.merge(str(folder / "base"), [bad], out)
    assert not (tmp_path / "out").exists()


def test_every_function_says_what_it_takes_and_raises() -> None:
    for name in FUNCTIONS:
        told = inspect.getdoc(getattr(api, name)) or ""
        for parameter in inspect.signature(getattr(api, name)).parameters:
            assert parameter in told.partition("Args:")[2], (name, parameter)
        assert "Raises:\n" in told, name


def test_nothing_is_printed_and_an_observer_is_told(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, tuned, watcher = str(folder / "base"), str(folder / "tuned"), runs.Watcher()
    made = api.extract(base, tuned, str(tmp_path / "a"), rank=4, engine="local", device="cpu", observer=watcher)
    assert watcher.plan is not None
    assert len(watcher.reports) == len(watcher.plan.tasks)
    smaller = api.compress(made.out, str(tmp_path / "b"), rank=2, dialect="peft")
    api.merge(base, [made.out, (smaller.out, -0.5)], str(tmp_path / "c"))
    api.report([made.out, smaller.out], str(tmp_path / "d.md"), form="md")
    assert api.verify(base, tuned, made.out).passed
    assert capfd.readouterr() == ("", "")


def test_one_url_is_taken_for_one_and_not_for_its_letters(folder: Path, tmp_path: Path) -> None:
    base, adapter = str(folder / "base"), str(folder / "r8")
    one, other = (api.merge(base, given, str(tmp_path / name)) for given, name in ((adapter, "1"), ([adapter], "2")))
    assert one.version == other.version
    assert api.report(adapter, form="json").models == 1


def test_results_are_plain_enough_for_json(folder: Path, tmp_path: Path) -> None:
    from dataclasses import asdict

    made = api.compress(str(folder / "r8"), str(tmp_path / "out"), energy=0.9)
    assert json.loads(json.dumps(asdict(made)))["original_rank"] == 8


def test_importing_it_loads_no_engine_no_reader_and_no_plots() -> None:
    heavy = {"ray", "pyarrow", "matplotlib", "jinja2", "fsspec", "boto3", "typer", "rich", "transformers", "peft"}
    script = f"import sys, phlora_pipeline.api; print(sorted(set({heavy!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    script = "import sys, phlora_pipeline; print('torch' in sys.modules, 'pydantic' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
