"""One extraction, as a test wants it: on one thread in this process, with nothing printed; and what it left behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from phlora_pipeline import config, manifest, pipeline
from phlora_pipeline.config import RunConfig
from phlora_pipeline.extract import TaskReport
from phlora_pipeline.manifest import EnergyRow
from phlora_pipeline.pipeline import ExtractResult
from phlora_pipeline.plan import Plan


class Watcher:
    """An observer that remembers, and can be told to interfere."""

    def __init__(self) -> None:
        self.plan: Plan | None = None
        self.reports: list[TaskReport] = []
        self.warnings: list[str] = []

    def planned(self, plan: Plan) -> None:
        self.plan = plan

    def task_done(self, report: TaskReport) -> None:
        self.reports.append(report)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def settings(base: Path, tuned: Path, out: Path, **others: Any) -> RunConfig:
    """What is not said is the plainest: local, one thread, rank 8 in float32."""
    plain = {"rank": 8, "dtype": "float32", "engine": "local", "device": "cpu", "threads": 1}
    return config.run_config(base=str(base), tuned=str(tuned), out=str(out), **{**plain, **others})


def extract(
    base: Path, tuned: Path, out: Path, *, observer: pipeline.Observer | None = None, **others: Any
) -> ExtractResult:
    return pipeline.extract(settings(base, tuned, out, **others), observer or Watcher())


def rows(out: Path) -> dict[str, EnergyRow]:
    """The manifest's rows, by tensor."""
    found = manifest.read(str(out / "energy.parquet"))
    assert len({row.tensor for row in found}) == len(found)
    return {row.tensor: row for row in found}


def contents(out: Path) -> dict[str, bytes]:
    """Every published file, by path; runs tell of times, and are left aside."""
    paths = (path for path in sorted(out.rglob("*")) if path.is_file())
    found = {str(path.relative_to(out)): path.read_bytes() for path in paths}
    return {name: data for name, data in found.items() if not name.startswith("_runs/")}


def written_delta(out: Path, module: str) -> Tensor:
    """B·A of a plain linear module in float64, from the written bytes."""
    tensors = load_file(out / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.{module}.lora_{side}.weight"].double() for side in "AB")
    return B @ A
