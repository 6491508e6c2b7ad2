"""Sizes and energies of choices: as the written adapter has them, and none better than the best."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from phlora_pipeline.report.choices import Choice, TradeOff, noise_edge, trade_off
from tests import runs
from tests.report import shelf


def chosen(found: TradeOff, way: str, label: str) -> Choice:
    return next(choice for choice in found.choices if (choice.way, choice.label) == (way, label))


def test_this_adapter_weighs_what_its_tensors_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = runs.extract(*pair, out, rank=8, max_rank=16, dtype="bfloat16")
    found = trade_off(list(runs.rows(out).values()), element_bytes=2)
    mine = chosen(found, "this adapter", "this adapter")
    assert mine.nbytes == sum(tensor.nbytes for tensor in load_file(out / "adapter_model.safetensors").values())
    assert mine.nbytes == result.adapter_bytes
    assert mine.energy == pytest.approx(result.summary.preserved_energy)
    fixed = chosen(found, "fixed rank", "rank 8")
    assert (fixed.nbytes, fixed.energy) == (mine.nbytes, mine.energy)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_threshold_is_met_by_every_tensor_and_by_no_smaller_rank(share: float) -> None:
    rows = shelf.rows(layers=3, decay=0.8)
    found = chosen(trade_off(rows, element_bytes=2), "energy", f"{100 * share:.0f} %")
    assert found.capped == 0
    parameters = 0
    for row in rows:
        if row.singular_values:
            total = row.delta_norm**2
            ranks = range(1, len(row.singular_values) + 1)
            least = next(r for r in ranks if math.fsum(v * v for v in row.singular_values[:r]) / total >= share)
            parameters += least * sum(row.shape)
    assert found.nbytes == 2 * parameters
    assert found.energy >= share


def test_no_choice_of_ranks_keeps_more_than_the_best_of_its_size() -> None:
    shapes, decays = ((8, 8), (4, 24), (16, 4)), (0.3, 0.9, 0.6)
    rows = [
        shelf.adapted(f"m.{n}.x", "mlp", shape, decay, most=3, rank=2)
        for n, (shape, decay) in enumerate(zip(shapes, decays, strict=True))
    ]
    best = trade_off(rows, element_bytes=4).best
    assert len(best) == 9
    total = sum(row.delta_norm**2 for row in rows)
    for ranks in itertools.product(range(4), repeat=3):
        nbytes = 4 * sum(rank * sum(row.shape) for rank, row in zip(ranks, rows, strict=True))
        kept = (
            sum(sum(v * v for v in row.singular_values[:rank]) for rank, row in zip(ranks, rows, strict=True)) / total
        )
        assert all(kept <= energy + 1e-12 for size, energy in best if size >= nbytes)


def test_the_lines_rise_and_one_rank_for_all_is_never_above_the_best() -> None:
    found = trade_off(shelf.rows(layers=3), element_bytes=2)
    for line in (found.uniform, found.best):
        assert list(line) == sorted(line)
    assert found.uniform[-1] == pytest.approx(found.best[-1])  # both are all that is known
    for nbytes, energy in found.best:
        assert all(kept <= energy + 1e-9 for size, kept in found.uniform if size <= nbytes)


def test_the_noise_edge_is_there_where_it_was_measured() -> None:
    plain = shelf.rows()
    assert noise_edge(plain[0]) is None
    assert not any(choice.way == "noise edge" for choice in trade_off(plain, element_bytes=2).choices)
    noisy = [
        replace(row, noise_energy=0.09 * 64 * 64 / (8 + 8) ** 2 / row.delta_norm**2) if row.rank else row
        for row in plain
    ]
    assert noise_edge(noisy[0]) == pytest.approx(0.3)  # √(energy/dk)·(√d + √k), of a 64 × 64 matrix
    picked = chosen(trade_off(noisy, element_bytes=2), "noise edge", "noise edge")
    assert picked.ranks[1] == max(
        sum(value > (noise_edge(row) or 0) for value in row.singular_values) for row in noisy if row.singular_values
    )


def test_a_threshold_that_most_tensors_do_not_reach_is_no_choice_and_one_that_few_miss_says_so() -> None:
    rows = shelf.rows(layers=2, decay=0.2, rest=5.0)
    assert {choice.way for choice in trade_off(rows, element_bytes=2).choices} == {
        "fixed rank",
        "energy",
        "this adapter",
    }
    assert not any(choice.label == "99 %" for choice in trade_off(rows, element_bytes=2).choices)
    steep = [shelf.adapted(f"m.{n}.x", "mlp", (32, 32), 2.0, rest=0.001) for n in range(3)]
    assert chosen(trade_off([*steep, rows[0]], element_bytes=2), "energy", "95 %").capped == 1


def test_nothing_adapted_is_no_trade_off() -> None:
    assert trade_off([], element_bytes=2) == TradeOff(2, (), (), ())
