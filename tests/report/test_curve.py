"""Energy against rank: the curve is eq. 5, tensor by tensor, and nothing is made up where it is not known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from phlora_pipeline.errors import NotFoundError, RequestError
from phlora_pipeline.report import energy_curve
from phlora_pipeline.report.curve import crowd, known_to
from phlora_pipeline.summary import summarize
from tests import runs, toys
from tests.report import shelf


def test_of_an_extraction_it_is_what_the_full_svd_of_every_delta_gives(tmp_path: Path) -> None:
    base = toys.llama_tensors(layers=3)
    tuned = toys.fine_tuned(base)
    out = tmp_path / "out"
    runs.extract(toys.save(tmp_path / "base", base), toys.save(tmp_path / "tuned", tuned), out, max_rank=32)
    deltas = [tuned[name].double() - value.double() for name, value in base.items() if value.ndim == 2]
    squares = [torch.linalg.svdvals(delta).square() for delta in deltas]
    for rank in (1, 3, 8, 32):
        energies = torch.stack([square[:rank].sum() / square.sum() for square in squares])
        quartiles = torch.quantile(energies, torch.tensor([0.25, 0.75], dtype=torch.float64))
        total = sum(square[:rank].sum() for square in squares) / sum(square.sum() for square in squares)
        found = energy_curve(str(out), [rank])
        assert found.tensors == len(deltas)
        wanted = (energies.mean(), *quartiles, total)
        for told, exact in zip((found.mean, found.lower, found.upper, found.total), wanted, strict=True):
            assert told[0] == pytest.approx(float(exact), abs=1e-5)


def test_at_the_adapters_rank_the_total_is_the_summarys_energy() -> None:
    rows = shelf.rows(layers=4, rank=8)
    assert energy_curve(rows, [8]).total == pytest.approx([summarize(rows).preserved_energy])


@given(st.lists(st.tuples(st.floats(0, 2), st.integers(1, 24), st.floats(0, 3)), min_size=1, max_size=6))
def test_it_rises_stays_below_one_and_has_its_mean_between_all_tensors(spectra: list[tuple[float, int, float]]) -> None:
    rows = [
        shelf.adapted(f"m.{n}.x", "mlp", (48, 48), decay, most=most, rest=rest)
        for n, (decay, most, rest) in enumerate(spectra)
    ]
    found = energy_curve(rows)
    assert found.ranks[-1] == min(most for _, most, _ in spectra)
    for shares in (found.mean, found.lower, found.upper, found.total, (*found.mean, *found.least)):
        assert list(shares) == sorted(shares)
        assert 0 < shares[0] <= shares[-1] <= 1
    assert all(low <= high for low, high in zip(found.lower, found.upper, strict=True))


def test_a_spectrum_that_is_known_whole_counts_as_one_beyond_its_end() -> None:
    whole = shelf.adapted("a", "mlp", (4, 64), 0.5, most=4, rest=0.0)
    cut = shelf.adapted("b", "mlp", (64, 64), 0.5, most=16)
    assert known_to([whole, cut]) == 16
    assert energy_curve([whole, cut], [16]).upper[0] > energy_curve([cut], [16]).upper[0]
    assert energy_curve([whole], [4]).mean == pytest.approx([1.0])


def test_beyond_what_is_known_there_is_no_curve_but_a_least() -> None:
    whole = [shelf.adapted(name, "mlp", (64, 64), 0.5, most=24) for name in "ab"]
    cut = [replace(whole[0], singular_values=whole[0].singular_values[:8]), whole[1]]
    found = energy_curve(cut)
    assert found.ranks[-1] == 8
    assert found.least_ranks == (12, 16, 24)
    known = energy_curve(whole, found.least_ranks)
    assert all(least < mean for least, mean in zip(found.least, known.mean, strict=True))


def test_without_a_spectrum_there_is_no_curve() -> None:
    found = energy_curve([row for row in shelf.rows() if row.rank is None])
    assert (found.ranks, found.mean, found.tensors) == ((), (), 0)


def test_a_crowd_is_told_by_its_quartiles() -> None:
    curves = [energy_curve(shelf.rows(decay=0.1 * n)) for n in range(1, 6)]
    rank, low, middle, high = crowd(curves)[3]
    means = sorted(curve.at(rank) or 0 for curve in curves)
    assert (low, middle, high) == pytest.approx(means[1:4])


def test_a_url_has_to_be_one_models(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no manifest at"):
        energy_curve(str(tmp_path / "nowhere"))
    with pytest.raises(RequestError, match="is a zoo of 2 models"):
        energy_curve(str(shelf.zoo(tmp_path / "zoo", 2)))
