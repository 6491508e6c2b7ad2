"""Sizes and energies of choices: as the written adapter has them, and none better than the best."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from phlora_pipeline import ranks
from phlora_pipeline.ranks import Spectrum
from phlora_pipeline.report import choices
from phlora_pipeline.report.choices import Choice, TradeOff, rank_for, trade_off
from tests import runs, toys
from tests.report import shelf


def chosen(found: TradeOff, way: str, label: str) -> Choice:
    return next(choice for choice in found.choices if (choice.way, choice.label) == (way, label))


def test_this_adapter_weighs_what_its_tensors_do(pair: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = runs.extract(*pair, out, rank=8, max_rank=16, dtype="bfloat16")
    found = trade_off(list(runs.rows(out).values()), element_bytes=2)
    mine = chosen(found, "this adapter", "this adapter")
    assert mine.nbytes == sum(tensor.nbytes for tensor in load_file(out / "adapter_model.safetensors").values())
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
            known = range(1, len(row.singular_values) + 1)
            least = next(r for r in known if math.fsum(v * v for v in row.singular_values[:r]) / total >= share)
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
    for own in itertools.product(range(4), repeat=3):
        nbytes = 4 * sum(rank * sum(row.shape) for rank, row in zip(own, rows, strict=True))
        kept = sum(sum(v * v for v in row.singular_values[:rank]) for rank, row in zip(own, rows, strict=True)) / total
        assert all(kept <= energy + 1e-12 for size, energy in best if size >= nbytes)


def test_the_lines_rise_and_one_rank_for_all_is_never_above_the_best() -> None:
    found = trade_off(shelf.rows(layers=3), element_bytes=2)
    for line in (found.uniform, found.best):
        assert list(line) == sorted(line)
    assert found.uniform[-1] == pytest.approx(found.best[-1])  # both are all that is known
    for nbytes, energy in found.best:
        assert all(kept <= energy + 1e-9 for size, kept in found.uniform if size <= nbytes)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Some directions well above the steps of bfloat16, and the others lost in them."""
    folder = tmp_path_factory.mktemp("bf16")
    base = {name: value.bfloat16() for name, value in toys.llama_tensors(layers=2, hidden=48, inner=64).items()}
    tuned = dict(base)
    for number, name in enumerate(name for name, value in base.items() if value.ndim == 2):
        d, k = base[name].shape
        sigma = 2.0 * torch.arange(1, min(d, k) + 1).double() ** -(1.0 + 0.1 * number)
        tuned[name] = (base[name].float() + toys.with_spectrum(d, k, sigma, seed=number).float()).bfloat16()
    return toys.save(folder / "base", base), toys.save(folder / "tuned", tuned)


@pytest.mark.parametrize(
    ("way", "label", "asked"),
    [
        ("noise edge", "auto", {"rank": "auto"}),
        ("energy", "90 %", {"energy": 0.9}),
        ("budget", "size of rank 8", {"budget": "-params"}),
    ],
)
def test_the_page_of_one_adapter_tells_what_another_policy_would_write(
    way: str, label: str, asked: dict[str, Any], bf16: tuple[Path, Path], tmp_path: Path
) -> None:
    runs.extract(*bf16, tmp_path / "fixed", rank=8, max_rank=64, dialect="peft")
    rows = list(runs.rows(tmp_path / "fixed").values())
    found = trade_off(rows, element_bytes=4)
    if "budget" in asked:
        asked = {"budget": f"{chosen(found, 'fixed rank', 'rank 8').nbytes // 4}-params"}
    result = runs.extract(*bf16, tmp_path / "other", max_rank=64, dialect="peft", **({"rank": 8} | asked))
    told = chosen(found, way, label)
    assert told.ranks == (min(result.ranks.values()), max(result.ranks.values()))
    assert told.ranks[0] < told.ranks[1]
    tensors = load_file(tmp_path / "other" / "adapter_model.safetensors")
    assert told.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert told.energy == pytest.approx(result.summary.preserved_energy, rel=1e-5)
    mine = chosen(
        trade_off(list(runs.rows(tmp_path / "other").values()), element_bytes=4), "this adapter", "this adapter"
    )
    assert (mine.ranks, mine.nbytes, mine.padded_bytes) == (told.ranks, told.nbytes, told.padded_bytes)


@given(
    st.lists(
        st.tuples(st.integers(1, 12), st.lists(st.integers(1, 5), min_size=1, max_size=5)), min_size=1, max_size=5
    ),
    st.integers(0, 200),
)
def test_a_budget_is_spread_as_the_policy_does(shapes: list[tuple[int, list[int]]], parameters: int) -> None:
    spectra = {
        f"t{n}": Spectrum(tuple(float(v) for v in sorted(values, reverse=True)), 1.0, unit)
        for n, (unit, values) in enumerate(shapes)
    }

    def fits(own: Mapping[str, int]) -> bool:
        return sum(rank * spectra[name].unit for name, rank in own.items()) <= parameters

    assert choices._spread(choices._items(spectra), parameters) == ranks.spread(spectra, fits)


def test_where_all_is_noise_auto_keeps_nothing() -> None:
    rows = [replace(shelf.adapted("a", "mlp", (8, 8), 0.5), noise_edge=100.0)]
    told = chosen(trade_off(rows, element_bytes=4), "noise edge", "auto")
    assert (told.ranks, told.nbytes, told.padded_bytes, told.energy) == ((0, 0), 0, 0, 0.0)


def test_what_an_extraction_to_a_threshold_keeps_is_known_to_reach_it(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Its spectra end there, and are stored in float32."""
    runs.extract(*pair, tmp_path / "out", energy=0.9, max_rank=64, dialect="peft")
    rows = [row for row in runs.rows(tmp_path / "out").values() if row.rank]
    assert [rank_for(row, 0.9) for row in rows] == [row.rank for row in rows]
    assert any(rank_for(row, 0.99) is None for row in rows)
    half = shelf.adapted("a", "mlp", (8, 8), 0.0, most=1, rest=1.0)
    stored = torch.tensor(math.sqrt(0.5)).item()
    assert stored**2 < 0.5
    assert rank_for(replace(half, delta_norm=1.0, singular_values=(stored,)), 0.5) == 1


def test_the_noise_edge_is_there_where_it_was_measured() -> None:
    plain = shelf.rows()
    assert not any(choice.way == "noise edge" for choice in trade_off(plain, element_bytes=2).choices)
    noisy = [replace(row, noise_edge=0.3) if row.rank else row for row in plain]
    picked = chosen(trade_off(noisy, element_bytes=2), "noise edge", "auto")
    assert picked.ranks == (5, 11)  # i^−0.5 > 0.3 up to 11, i^−0.7 up to 5


def test_a_threshold_that_most_tensors_do_not_reach_is_no_choice_and_one_that_few_miss_says_so() -> None:
    rows = shelf.rows(layers=2, decay=0.2, rest=5.0)
    assert {choice.way for choice in trade_off(rows, element_bytes=2).choices} == {
        "fixed rank",
        "energy",
        "budget",
        "this adapter",
    }
    assert not any(choice.label == "99 %" for choice in trade_off(rows, element_bytes=2).choices)
    steep = [shelf.adapted(f"m.{n}.x", "mlp", (32, 32), 2.0, rest=0.001) for n in range(3)]
    assert chosen(trade_off([*steep, rows[0]], element_bytes=2), "energy", "95 %").capped == 1


def test_nothing_adapted_is_no_trade_off() -> None:
    assert trade_off([], element_bytes=2) == TradeOff(2, (), (), ())
