"""E_r of eq. 5, and what rounding the factors costs, from the factors alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from phlora_pipeline.lowrank import energy as energies
from phlora_pipeline.lowrank import preserved_energy, rounding_error_sq
from tests.lowrank.cases import delta_of, factors_of

SIGMA = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda values: sorted(values, reverse=True))


@settings(max_examples=60, deadline=None)
@given(sigma=SIGMA, rank=st.integers(1, 12))
def test_preserved_energy_is_the_papers_ratio_and_never_falls(sigma: list[float], rank: int) -> None:
    total = sum(value**2 for value in sigma)
    rank = min(rank, len(sigma))
    found = preserved_energy(sigma, total, rank)
    assert found == pytest.approx(sum(value**2 for value in sigma[:rank]) / total)
    assert found <= 1
    assert found >= preserved_energy(sigma, total, max(1, rank - 1)) - 1e-15
    assert preserved_energy(sigma, total, len(sigma)) == pytest.approx(1)


def test_preserved_energy_is_not_known_for_nothing_and_beyond_what_was_computed() -> None:
    assert preserved_energy([], 0.0, 1) is None
    assert preserved_energy([1.0, 0.5], 2.0, 3) is None


def test_no_share_is_more_than_all() -> None:
    """Σσ² and ‖ΔW‖_F² were rounded on different ways."""
    assert preserved_energy([1.0], 1 - 1e-9, 1) == 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("d", "k", "rank"), [(40, 30, 6), (30, 40, 30), (7, 1, 1)])
def test_rounding_error_equals_the_product_formed_in_full(
    d: int, k: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = factors_of(delta_of(d, k, "power"), rank)
    A, B = found.A, found.B
    A_written, B_written = A.to(dtype), B.to(dtype)
    direct = float((B_written.double() @ A_written.double() - B.double() @ A.double()).square().sum())
    for chunk in (1 << 22, 50):
        monkeypatch.setattr(energies, "CHUNK", chunk)
        error_sq = rounding_error_sq(A, B, A_written, B_written)
        assert error_sq == pytest.approx(direct, rel=1e-6, abs=1e-14)
        assert (error_sq > 1e-9) == (dtype != torch.float32)
