"""A profile of one's own: measured, written once, and read back as what it is."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest

from phlora_pipeline import calibrate
from phlora_pipeline.config import read_profile
from phlora_pipeline.errors import ConflictError, DeviceError
from phlora_pipeline.lowrank import PROFILES, Profile


@pytest.fixture
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_SIZE", 256), ("_SMALL", 64), ("_REPEATS", 2)):
        monkeypatch.setattr(calibrate, name, value)


@pytest.mark.usefixtures("_small")
def test_what_is_measured_is_a_profile_of_this_device() -> None:
    found = calibrate.measure("cpu", 1, "mine")
    assert found.name == "mine"
    assert found.low in {"bfloat16", "float32"}
    assert found.low_rate >= found.float32_rate
    assert (found.steps, found.block_per_rank) == (PROFILES["cpu"].steps, PROFILES["cpu"].block_per_rank)
    assert all(
        isinstance(value, float) and value > 0 for name, value in asdict(found).items() if name.endswith("_rate")
    )


@pytest.mark.usefixtures("_small")
def test_it_comes_back_from_its_file(tmp_path: Path) -> None:
    made = calibrate.measure("cpu", 1, "mine")
    calibrate.write(made, str(tmp_path / "profile.json"))
    assert read_profile(str(tmp_path / "profile.json")) == made
    assert {item.name for item in fields(Profile)} == set(asdict(made))


def test_a_file_is_not_replaced_by_another(tmp_path: Path) -> None:
    """Extractions may have used it, and their identity has its rates."""
    url = str(tmp_path / "profile.json")
    calibrate.write(PROFILES["cpu"], url)
    calibrate.write(PROFILES["cpu"], url)
    with pytest.raises(ConflictError, match="is there already"):
        calibrate.write(PROFILES["cpu-bf16"], url)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeviceError):
        calibrate.measure("cuda:99", 1, "mine")
