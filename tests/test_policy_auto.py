"""`--rank auto` on updates whose truth is known: rank k in float32, stored in bfloat16."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from phlora_pipeline.summary import reasons
from phlora_pipeline.verify import verify
from tests import runs, toys

SIZE = 192
NAMES = [f"model.layers.0.self_attn.{name}_proj.weight" for name in "qkvo"]


def bf16_pair(folder: Path, rank: int, rms: float, *, seed: int = 0) -> tuple[Path, Path]:
    """Weights as trained models have them, and a fine-tune whose every matrix moved by `rank` directions."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned = {}, {}
    for number, name in enumerate(NAMES):
        base[name] = (0.02 * torch.randn(SIZE, SIZE, generator=generator)).bfloat16()
        update = torch.zeros(SIZE, SIZE)
        if rank:
            sigma = torch.ones(rank)
            update = toys.with_spectrum(SIZE, SIZE, sigma, seed=seed + number).float() * (rms * SIZE / rank**0.5)
        tuned[name] = (base[name].float() + update).bfloat16()
    return toys.save(folder / "base", base), toys.save(folder / "tuned", tuned)


def rounded(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One weight in float32, and in bfloat16: all that differs is rounding."""
    weight = 0.02 * torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return weight, weight.bfloat16()


def rounded_pair(folder: Path) -> tuple[Path, Path]:
    """A checkpoint that was only stored anew."""
    both = {name: rounded(number) for number, name in enumerate(NAMES)}
    base, tuned = ({name: pair[side] for name, pair in both.items()} for side in (0, 1))
    return toys.save(folder / "base", base), toys.save(folder / "tuned", tuned)


@pytest.mark.parametrize("dialect", ["peft", "portable"])
@pytest.mark.parametrize("rank", [4, 16])
def test_it_finds_the_rank_that_there_was_and_leaves_the_noise(rank: int, dialect: str, tmp_path: Path) -> None:
    pair = bf16_pair(tmp_path, rank, 1e-3)
    result = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64, dialect=dialect)
    assert set(result.ranks) == set(NAMES)
    assert all(abs(found - rank) <= 1 for found in result.ranks.values())
    assert result.rank == max(result.ranks.values())
    assert not any("storage precision" in warning for warning in result.warnings)
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out")).passed
    again = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64, dialect=dialect)
    assert (again.outcome, again.ranks, again.rank) == ("exists", result.ranks, result.rank)


def test_of_an_update_below_storage_precision_what_stands_above_the_edge_is_kept_and_it_says_so(tmp_path: Path) -> None:
    pair = bf16_pair(tmp_path, 4, 1e-5)
    result = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64, dialect="peft")
    assert set(result.ranks) == set(NAMES)
    assert all(4 <= rank < 32 for rank in result.ranks.values())
    [told] = result.warnings
    assert told.startswith("update below storage precision: in 4 of 4 tensors")
    assert "with 100.0 % of ‖ΔW‖² between them" in told
    assert "4 of them are of an update below storage precision" in (tmp_path / "out" / "README.md").read_text()
    for row in runs.rows(tmp_path / "out").values():
        assert row.status == "adapted"
        assert re.fullmatch(
            r"update below storage precision: 1\d\.\d % of the entries of its rows that moved differ", row.reason
        )


def test_where_nothing_stands_above_the_edge_it_says_so_instead_of_a_rank(tmp_path: Path) -> None:
    pair = rounded_pair(tmp_path)
    result = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64)
    assert (result.outcome, result.ranks) == ("nothing_to_adapt", {})
    assert any(warning.startswith("update below storage precision: 4 of 4 tensors") for warning in result.warnings)
    assert len(reasons(result.summary)) == 1  # told once, not tensor by tensor
    for row in runs.rows(tmp_path / "out").values():
        assert row.status == "skipped"
        assert row.reason.startswith("update below storage precision: no singular value stands above")
        assert row.singular_values  # what there was to see, for reports
    assert runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64).outcome == "nothing_to_adapt"


def test_in_a_family_of_which_a_part_is_noise_that_part_gets_a_zero_pair(tmp_path: Path) -> None:
    pair = bf16_pair(tmp_path, 4, 1e-3)
    tensors = toys.load(pair[1])
    before = toys.load(pair[0])
    before[NAMES[0]], tensors[NAMES[0]] = rounded(0)
    toys.save(pair[0], before)
    toys.save(pair[1], tensors)
    result = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=64)
    row = runs.rows(tmp_path / "out")[NAMES[0]]
    assert (row.status, row.rank) == ("zero_filled", None)
    assert "storage precision" in row.reason
    assert set(result.ranks) == set(NAMES[1:])
    assert verify(str(pair[0]), str(pair[1]), str(tmp_path / "out")).passed


def test_a_threshold_that_asks_for_noise_is_told(tmp_path: Path) -> None:
    pair = bf16_pair(tmp_path, 4, 1e-4)
    asked = runs.extract(*pair, tmp_path / "high", energy=0.995, max_rank=192)
    assert any("reach 0.995 of their energy only with rounding noise" in warning for warning in asked.warnings)
    modest = runs.extract(*pair, tmp_path / "modest", energy=0.5, max_rank=192, dialect="vllm")
    assert modest.warnings == ()


def test_more_above_the_noise_than_the_cap_is_told(tmp_path: Path) -> None:
    pair = bf16_pair(tmp_path, 16, 1e-3)
    result = runs.extract(*pair, tmp_path / "out", rank="auto", max_rank=8)
    assert set(result.ranks.values()) == {8}
    assert any("raise --max-rank" in warning for warning in result.warnings)
