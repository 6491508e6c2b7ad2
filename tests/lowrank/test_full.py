"""The routes that decompose all of ΔW: true triplets, and bounds that are above the truth."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank import full
from phlora_pipeline.lowrank.operator import Dense
from phlora_pipeline.lowrank.panels import gaussian
from phlora_pipeline.lowrank.ritz import Triplets
from tests.lowrank.cases import CPU, delta_of, energies_of
from tests.toys import with_spectrum

SHAPES = [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1), (1, 1)]
ROUTES = ["exact", "gram float64", "gram float32"]


def run(route: str, delta: Tensor, rank: int) -> tuple[Triplets, Tensor]:
    """Triplets and bounds of λ; of one matrix, or of a batch."""
    op = Dense(delta if delta.ndim == 3 else delta.unsqueeze(0), torch.float32)
    if route == "exact":
        return full.exact(op, rank)[:2]
    psi = gaussian(["w"] * op.shape[0], "check", 8, op.shape[1], CPU)
    return full.gram_eigen(op, rank, psi, getattr(torch, route.removeprefix("gram ")))[:2]


@pytest.mark.parametrize("route", ROUTES)
class TestAll:
    @pytest.mark.parametrize("spectrum", ["power", "flat", "clustered", "rank two", "steep"])
    @pytest.mark.parametrize(("d", "k"), SHAPES)
    def test_no_other_matrix_of_that_rank_is_closer(self, d: int, k: int, spectrum: str, route: str) -> None:
        delta, rank = delta_of(d, k, spectrum), min(3, d, k)
        found, _ = run(route, delta, rank)
        energies = energies_of(delta)
        total = float(energies.sum())
        product = found.short[0].double().mT @ found.long[0].double()
        left = float(((delta if d <= k else delta.mT).double() - product).square().sum())
        slack = 1e-11 if route != "gram float32" else 1e-9
        assert left == pytest.approx(float(energies[rank:].sum()), rel=1e-5, abs=slack * total)
        torch.testing.assert_close(found.energies[0], energies[:rank], rtol=1e-5, atol=1e-6 * total)

    def test_tiny_singular_values_are_as_good_as_large_ones(self, route: str) -> None:
        """σ and v come from a product with ΔW itself, so that squaring the condition number costs only the direction of u."""
        delta = with_spectrum(30, 40, torch.tensor([1.0, 1e-2, 1e-4]), seed=4).float()
        found, _ = run(route, delta, 3)
        wanted = energies_of(delta)[:3].sqrt()
        assert found.energies[0, :2].sqrt().tolist() == pytest.approx(wanted[:2].tolist(), rel=1e-4)
        assert float(found.energies[0, 2].sqrt()) == pytest.approx(
            float(wanted[2]), rel=2e-2 if route != "gram float32" else 1
        )

    def test_matrices_of_a_batch_are_apart(self, route: str) -> None:
        deltas = torch.stack([delta_of(14, 10, name) for name in ("power", "clustered", "rank two")])
        together, bounds = run(route, deltas, 4)
        for index in range(3):
            alone, bound = run(route, deltas[index], 4)
            torch.testing.assert_close(alone.energies[0], together.energies[index], rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(bound[0], bounds[index], rtol=1e-4, atol=1e-6)

    @settings(max_examples=40, deadline=None)
    @given(
        d=st.integers(1, 24), k=st.integers(1, 24), seed=st.integers(0, 2**16), rank=st.integers(1, 24),
        spectrum=st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=24),
    )  # fmt: skip
    def test_bounds_are_above_the_truth_and_not_far(
        self, d: int, k: int, seed: int, rank: int, spectrum: list[float], route: str
    ) -> None:
        m = min(d, k)
        sigma = torch.tensor([*sorted(spectrum, reverse=True), *[0.0] * m], dtype=torch.float64)[:m]
        delta = with_spectrum(d, k, sigma, seed=seed).float()
        found, bounds = run(route, delta, min(rank, m))
        truth = energies_of(delta)[: min(rank, m)]
        assert (bounds.dtype, bounds.device.type) == (torch.float64, "cpu")
        assert (bounds[0] >= truth - (1e-13 if route != "exact" else 1e-5) * truth[0]).all()
        close = 1e-5 if route != "gram float32" else 1e-4
        assert float((bounds[0] - truth).max()) <= close * float(truth[0])
        assert found.energies.shape == bounds.shape


def test_bounds_of_the_svd_stand_where_singular_values_crowd() -> None:
    """LAPACK's float32 loses most there: fifty units of roundoff were seen."""
    for seed in range(40):
        sigma = 0.8 + 0.2 * torch.rand(64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        delta = with_spectrum(64, 64, sigma.sort(descending=True)[0], seed=seed).float()
        assert (run("exact", delta, 64)[1][0] >= energies_of(delta)).all()


@pytest.mark.parametrize("spectrum", ["power", "flat", "steep", "clustered", "rank two"])
@pytest.mark.parametrize(("d", "k"), [(64, 64), (30, 200), (1, 7), (200, 128)])
def test_sums_are_bounded_more_sharply_than_one_by_one(d: int, k: int, spectrum: str) -> None:
    delta, m = delta_of(d, k, spectrum), min(d, k)
    truth = energies_of(delta)
    norm_sq = float(delta.double().square().sum())
    op = Dense(delta.unsqueeze(0), torch.float32)
    _, bounds, _ = full.exact(op, m, norms_sq=[norm_sq])
    _, apart, _ = full.exact(op, m)
    sums = bounds[0].cumsum(dim=0)
    assert (sums >= truth.cumsum(dim=0) - 1e-12 * norm_sq).all()
    assert (sums <= apart[0].cumsum(dim=0) + 1e-6 * norm_sq).all()
    assert (sums <= truth.cumsum(dim=0) + 3e-6 * norm_sq).all()
    assert (bounds >= 0).all()


def test_what_the_svd_has_lost_of_the_norm_is_in_the_bound() -> None:
    """Of equal entries float32 sums are off by many units of roundoff: of no other matrix it loses as much."""
    delta = torch.full((300, 2000), 0.3)
    norm_sq = float(delta.double().square().sum())
    _, bounds, found = full.exact(Dense(delta.unsqueeze(0), torch.float32), 1, norms_sq=[norm_sq])
    assert float(bounds[0, 0]) >= norm_sq * (1 - 1e-12)
    short = [norm_sq * (1 + 1e-5)]
    _, more, _ = full.exact(Dense(delta.unsqueeze(0), torch.float32), 1, norms_sq=short)
    assert float(more[0, 0] - bounds[0, 0]) == pytest.approx(1e-5 * norm_sq, rel=0.1)
    assert float(found[0, 0]) ** 2 == pytest.approx(norm_sq, rel=1e-4)


def test_the_gram_route_knows_the_whole_spectrum() -> None:
    delta = delta_of(20, 30, "power")
    op = Dense(delta.unsqueeze(0), torch.float32)
    *_, values = full.gram_eigen(op, 3, gaussian(["w"], "check", 8, 20, CPU), torch.float64)
    torch.testing.assert_close(values[0], energies_of(delta), rtol=1e-8, atol=1e-10)


def test_what_it_sees_of_the_random_rows_is_from_delta_itself() -> None:
    delta, psi = delta_of(20, 30, "power"), gaussian(["w"], "check", 8, 20, CPU)
    seen = full.gram_eigen(Dense(delta.unsqueeze(0), torch.float32), 3, psi, torch.float64)[2]
    torch.testing.assert_close(seen, psi @ delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_the_matrix_is_left_as_it_was(route: str) -> None:
    delta = delta_of(12, 9, "power")
    before = delta.clone()
    run(route, delta, 3)
    assert torch.equal(delta, before)


def test_a_gpu_has_a_ladder_of_drivers_that_ends_on_the_processor() -> None:
    assert full.drivers(CPU) == (None,)
    assert full.drivers(torch.device("cuda")) == ("gesvda", "gesvd", None)


def test_each_driver_is_the_one_that_torch_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Elsewhere(Dense):
        device = property(lambda _: torch.device("meta"), lambda *_: None)

    asked, svd = [], torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda A, full_matrices, driver: asked.append(driver) or svd(A, full_matrices)
    )
    for driver in ("gesvda", "gesvd"):
        full.exact(Elsewhere(delta_of(6, 5, "power").unsqueeze(0), torch.float32), 2, driver)
    assert asked == ["gesvda", "gesvd"]


def test_an_svd_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", refuse)
    with pytest.raises(torch.linalg.LinAlgError):
        run("exact", delta_of(6, 5, "power"), 2)
