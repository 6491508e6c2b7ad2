"""Settings: what is refused, in one line, before anything is opened."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from phlora_pipeline.config import MAX_RANK, RunConfig, read_profile, run_config
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lowrank import PROFILES

PAIR = {"base": "/models/base", "tuned": "/models/tuned", "out": "/adapters/a"}


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"rank": 0}, "rank must be between 1 and 512, got 0"),
        ({"rank": -1}, "rank must be between 1 and 512, got -1"),
        ({"rank": MAX_RANK + 1}, "rank must be between 1 and 512, got 513"),
        ({"rank": "many"}, "rank must be between 1 and 512, or auto, got 'many'"),
        ({"rank": 2.5}, "rank must be between 1 and 512, or auto, got"),
        ({"rank": 32, "max_rank": 16}, "max_rank must be between rank (32) and 512, got 16"),
        ({"rank": 32, "max_rank": 513}, "got 513"),
        ({"rank": 32, "max_rank": -1}, "got -1"),
        ({"energy": 0}, "energy: "),
        ({"energy": 1.01}, "energy: "),
        ({"energy": "nan"}, "energy: "),
        ({"energy": 0.9, "max_rank": 513}, "got 513"),
        ({"energy": 0.9, "budget": "5MB"}, "energy and budget are different ways to choose ranks"),
        ({"rank": "auto", "budget": "5MB"}, "budget and rank auto are different ways"),
        ({"rank": "auto", "max_rank": 513}, "got 513"),
        ({"rank": True}, "rank must be between 1 and 512, or auto, got"),
        ({"budget": "much"}, "budget: a budget is a size of the adapter's file, such as 200MB"),
        ({"tolerance": 0}, "tolerance: "),
        ({"tolerance": 1.5}, "tolerance: Input should be less than or equal to 1, got 1.5"),
        ({"ranks": 3}, "ranks: "),
        ({"targets": "some"}, "targets: "),
        ({"dtype": "int8"}, "dtype: "),
        ({"solver": "magic"}, "solver: "),
        ({"engine": "spark"}, "engine: "),
        ({"dialect": "tgi"}, "dialect: "),
        ({"workers": -1}, "workers: "),
        ({"threads": -1}, "threads: "),
        ({"base_name": "/home/me/llama"}, "not a path"),
        ({"base_name": "./llama"}, "not a path"),
        ({"base_name": "s3://zoo/llama"}, "not a path"),
        ({"base": ""}, "not a path or URL: ''"),
        ({"base": "s3://"}, "not a path or URL: 's3://'"),
        ({"tuned": "s3:/zoo/tuned"}, "not a path or URL: 's3:/zoo/tuned'"),
        ({"tuned": "a\0b"}, r"not a path or URL: 'a\x00b'"),
        ({"out": "/models/base"}, "lies inside the base checkpoint"),
        ({"out": "/models/base/adapter"}, "lies inside the base checkpoint"),
        ({"out": "/models/tuned/"}, "lies inside the tuned checkpoint"),
        ({"tuned": "/models/t.safetensors", "out": "/models"}, "lies inside the tuned checkpoint"),
        ({"tuned": "s3://zoo/m/t.safetensors", "out": "s3://zoo/m"}, "lies inside the tuned checkpoint"),
    ],
    ids=str,
)
def test_a_wrong_setting_is_one_line_that_names_it(wrong: dict[str, object], told: str) -> None:
    with pytest.raises(RequestError) as caught:
        run_config(**{**PAIR, **wrong})
    assert told in caught.value.what
    assert "\n" not in caught.value.what
    assert caught.value.remedy


@pytest.mark.parametrize("rank", [1, MAX_RANK])
def test_the_ends_of_the_range_are_in_it(rank: int) -> None:
    assert run_config(**PAIR, rank=rank).max_rank == rank


@pytest.mark.parametrize(
    ("given", "name", "rank"),
    [({"rank": "auto"}, "auto", "auto"), ({"budget": "5 MB"}, "budget", 128), ({"rank": "16"}, "fixed", 16)],
)
def test_a_policy_has_a_cap_and_outlives_a_round_trip(given: dict[str, Any], name: str, rank: object) -> None:
    made = run_config(**PAIR, **given)
    assert (made.policy.name, made.rank) == (name, rank)
    assert made.max_rank == made.most_rank == (16 if name == "fixed" else 128)
    assert run_config(**made.model_dump()) == made


def test_a_threshold_of_energy_has_a_cap_and_the_rank_gives_way() -> None:
    assert (run_config(**PAIR, energy=0.9).rank, run_config(**PAIR, energy=0.9).max_rank) == (128, 128)
    assert (run_config(**PAIR, energy=1.0, max_rank=40).rank, run_config(**PAIR).rank) == (40, 32)


class TestProfile:
    """Rates of a device, from a file that a machine wrote and a human may have changed."""

    OWN = replace(PROFILES["cpu-bf16"], name="mine")

    def file(self, folder: Path, text: str) -> str:
        (folder / "profile.json").write_text(text)
        return str(folder / "profile.json")

    def test_it_reads_back(self, tmp_path: Path) -> None:
        assert read_profile(self.file(tmp_path, json.dumps(asdict(self.OWN)))) == self.OWN

    @pytest.mark.parametrize(
        "text",
        [
            "", "{", "[]", "{}", json.dumps({**asdict(OWN), "low": "float8"}), json.dumps({**asdict(OWN), "call": 0}),
            json.dumps({**asdict(OWN), "svd_rate": "fast"}), json.dumps({**asdict(OWN), "steps": 1}),
            json.dumps({**asdict(OWN), "low_rate": -1.0}),
            json.dumps({key: value for key, value in asdict(OWN).items() if key != "steps"}),
        ],
    )  # fmt: skip
    def test_what_is_none_is_refused_in_one_line(self, text: str, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="is not a device profile") as caught:
            read_profile(self.file(tmp_path, text))
        assert "\n" not in caught.value.what
        assert "phlora calibrate" in caught.value.remedy

    def test_a_file_that_is_not_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(RequestError, match="is not a device profile"):
            read_profile(str(tmp_path / "none.json"))

    def test_the_name_of_a_committed_one_is_taken(self, tmp_path: Path) -> None:
        """Those are no part of an extraction's identity: a file under their name would be none, either."""
        with pytest.raises(RequestError, match="'cpu', a profile that is built in"):
            read_profile(self.file(tmp_path, json.dumps(asdict(PROFILES["cpu"]))))


def test_a_neighbour_of_a_checkpoint_is_not_inside_it() -> None:
    assert run_config(**{**PAIR, "out": "/models/base-adapter"}).out == "/models/base-adapter"
    assert run_config(**{**PAIR, "out": "/models"}).out == "/models"


def test_places_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.chdir(str(tmp_path))
    made = run_config(base="base/", tuned="file:///models/tuned/", out="s3://zoo/out/")
    assert (made.base, made.tuned, made.out) == (os.path.join(str(tmp_path), "base"), "/models/tuned", "s3://zoo/out")


def test_the_resolved_form_reads_back() -> None:
    made = run_config(**PAIR, rank=8, include=("*.q_proj.*",), dtype="bfloat16")
    assert RunConfig.model_validate(json.loads(made.model_dump_json())) == made


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        run_config(**PAIR).rank = 3
