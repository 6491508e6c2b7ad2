"""What a page tells adds up: to the summary, to the files, to the run's own records."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from phlora_pipeline.report import sources
from phlora_pipeline.report.facts import ModelReport, Source, model_report
from tests import runs
from tests.report import shelf


@pytest.fixture
def extracted(pair: tuple[Path, Path], tmp_path: Path) -> tuple[Path, ModelReport]:
    out = tmp_path / "out"
    runs.extract(*pair, out, rank=8, max_rank=16, dtype="bfloat16", exclude=["*.k_proj.*"])
    (source,) = sources.find([str(out)])
    told, rows = sources.read(sources.with_records(source))
    return out, model_report(rows, told)


def test_it_names_the_pair_and_the_sizes_of_the_real_files(
    extracted: tuple[Path, ModelReport], pair: tuple[Path, Path]
) -> None:
    out, report = extracted
    assert (report.model, report.base) == ("tuned", "base")
    assert report.exact
    assert report.adapter_bytes == (out / "adapter_model.safetensors").stat().st_size
    assert 0 <= (pair[1] / "model.safetensors").stat().st_size - report.checkpoint_bytes < 4096  # the header
    assert report.ranks == (8, 8)
    assert report.certificate == max(row.certificate or 0 for row in runs.rows(out).values())


def test_every_tensor_without_factors_is_in_one_group_with_its_reason(extracted: tuple[Path, ModelReport]) -> None:
    out, report = extracted
    rows = runs.rows(out).values()
    assert sum(group.tensors for group in report.groups) == sum(row.status != "adapted" for row in rows)
    assert {(group.status, group.reason) for group in report.groups} == {
        (row.status, row.reason) for row in rows if row.status != "adapted"
    }
    assert math.fsum(group.share or 0 for group in report.groups) == pytest.approx(1 - report.summary.coverage)
    assert math.fsum(line.share or 0 for line in report.lines) == pytest.approx(1)


def test_the_runs_own_records_are_told_where_they_lie_beside(extracted: tuple[Path, ModelReport]) -> None:
    out, report = extracted
    result = json.loads(next(out.glob("_runs/*/result.json")).read_text())
    assert report.run is not None
    assert (report.run.seconds, report.run.tasks, report.run.read_bytes) == tuple(
        result[key] for key in ("seconds", "tasks", "read_bytes")
    )
    assert sum((report.run.routes or {}).values()) == report.summary.adapted
    assert report.settings["rank"] == 8


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": 3}', '{"version": 7}'])
def test_somebody_elses_records_are_no_records(extracted: tuple[Path, ModelReport], text: str) -> None:
    out, known = extracted
    (out / "run.json").write_text(text)
    (source,) = sources.find([str(out)])
    told, rows = sources.read(sources.with_records(source))
    report = model_report(rows, told)
    assert report.run is None
    assert not report.exact
    assert report.summary == known.summary
    # The factors alone, without a header; of a float32 pair float32 is taken to be written.
    assert report.adapter_bytes == 4 * sum((row.rank or 0) * sum(row.shape) for row in rows)


def test_spectra_are_those_that_changed_most_one_of_each_projection() -> None:
    rows = shelf.rows(layers=3)
    report = model_report(rows, Source("x"))
    assert len(report.spectra) == len(shelf.PROJECTIONS)
    shares = [spectrum.share for spectrum in report.spectra]
    assert shares == sorted(shares, reverse=True)
    largest = max((row for row in rows if row.rank), key=lambda row: row.delta_norm or 0)
    assert report.spectra[0].values == largest.singular_values


def test_noise_is_told_only_where_it_was_measured_everywhere() -> None:
    rows = shelf.rows(noise_energy=0.02)
    assert model_report(rows, Source("x")).noise_energy == pytest.approx(0.02)
    assert model_report([*rows, *shelf.rows()], Source("x")).noise_energy is None


def test_nothing_is_something_to_tell() -> None:
    report = model_report([], Source("x", "m"))
    assert (report.ranks, report.lines, report.groups, report.adapter_bytes) == (None, (), (), 0)
    assert json.loads(json.dumps(report.as_dict()))["summary"]["coverage"] is None
