"""Profiles of one's own: measured, written, read back, and part of an extraction's identity."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from phlora_pipeline import calibrate
from phlora_pipeline.config import read_profile
from phlora_pipeline.errors import ConflictError, DeviceError, RequestError
from phlora_pipeline.extract import profile_of
from phlora_pipeline.lowrank import PROFILES, Profile
from tests import runs, toys

MINE = replace(PROFILES["cpu"], name="mine", svd_rate=1e9)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "_SIZE", 192)
    monkeypatch.setattr(calibrate, "_SMALL", 96)
    monkeypatch.setattr(calibrate, "_REPEATS", 2)


@pytest.mark.usefixtures("small")
def test_measured_rates_are_positive_numbers_of_this_device() -> None:
    found = calibrate.measure("cpu", 1, "mine")
    assert isinstance(found, Profile)
    assert found.name == "mine"
    assert found.low in {"bfloat16", "float32"}
    assert all(
        math.isfinite(value) and value > 0
        for value in asdict(replace(found, row=1.0)).values()
        if isinstance(value, float)
    )
    assert found.row == 0
    like = profile_of(torch.device("cpu"))
    for name in ("block_per_rank", "steps", "degree", "least_block"):  # what no rate tells
        assert getattr(found, name) == getattr(like, name)


def test_a_device_that_is_not_there_is_an_error() -> None:
    with pytest.raises(DeviceError):
        calibrate.measure("cuda:63", 1, "mine")


def test_a_profile_is_read_as_it_was_written_and_never_replaced(tmp_path: Path) -> None:
    url = str(tmp_path / "profile.json")
    calibrate.write(MINE, url)
    assert read_profile(url) == MINE
    calibrate.write(MINE, url)
    with pytest.raises(ConflictError, match="is there already"):
        calibrate.write(replace(MINE, call=1.0), url)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "nonsense",
        json.dumps(asdict(MINE) | {"low": "int8"}),
        json.dumps(asdict(MINE) | {"svd_rate": 0.0}),
        json.dumps(asdict(MINE) | {"stream_rate": -1.0}),
        json.dumps(asdict(MINE) | {"steps": 1}),
        json.dumps(asdict(MINE) | {"name": "cpu"}),
    ],
)  # fmt: skip
def test_what_is_no_profile_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text)
    with pytest.raises(RequestError) as caught:
        read_profile(str(tmp_path / "profile.json"))
    assert "\n" not in caught.value.what
    assert caught.value.remedy


def test_a_profile_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError):
        read_profile(str(tmp_path / "profile.json"))


def test_another_profile_is_another_extraction_with_an_adapter_as_good(tmp_path: Path) -> None:
    base = toys.llama_tensors()
    folders = toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", toys.fine_tuned(base))
    calibrate.write(MINE, str(tmp_path / "profile.json"))
    plain = runs.extract(*folders, tmp_path / "plain")
    own = runs.extract(*folders, tmp_path / "own", profile=str(tmp_path / "profile.json"))
    assert plain.version != own.version
    assert own.summary.preserved_energy == pytest.approx(plain.summary.preserved_energy, abs=1e-5)
