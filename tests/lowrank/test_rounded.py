"""A matrix that lies both ways gives the products of the matrix, whatever its memory held before."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phlora_pipeline.lowrank import Settings, Workspace, decompose, rounded
from phlora_pipeline.lowrank.delta import form_delta
from phlora_pipeline.lowrank.operator import LOW_UNIT, Dense
from phlora_pipeline.lowrank.rounded import PADDING, BothWays, both_ways
from tests.lowrank.cases import CPU, SHORT, delta_of, loss_of, pair_of

LOW = torch.bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def room(d: int, k: int) -> BothWays:
    """Of memory full of what would spoil every sum."""
    rows = torch.full((d + PADDING, k + PADDING), torch.nan, dtype=LOW)
    return BothWays(rows, torch.full((k + PADDING, d + PADDING), torch.nan, dtype=LOW))


@pytest.mark.parametrize(("d", "k"), [(96, 64), (64, 96), (33, 130), (5, 7), (1, 1)])
def test_products_with_both_sides(d: int, k: int) -> None:
    made, delta = room(d, k), normal(d, k)
    made.matrix[0].copy_(delta)
    made.settle()
    assert torch.equal(made.matrix[0], delta.to(LOW))
    on_rows, on_columns = normal(1, 4, k, seed=1), normal(1, 4, d, seed=2)
    for found, wanted in (
        (made.along_rows(on_rows), on_rows[0].double() @ delta.double().mT),
        (made.along_columns(on_columns), on_columns[0].double() @ delta.double()),
    ):
        assert (found.dtype, found.shape) == (torch.float32, (1, *wanted.shape))
        assert found.is_contiguous()
        assert torch.dist(found[0].double(), wanted) <= 3 * LOW_UNIT * delta.norm() * 2 * max(d, k) ** 0.5


@pytest.mark.parametrize("turned", [False, True])
def test_it_is_as_good_as_one_copy(turned: bool) -> None:
    delta = normal(90, 70).mT.contiguous() if turned else normal(90, 70)
    made = room(*delta.shape)
    made.matrix[0].copy_(delta)
    made.settle()
    one, other = Dense(delta.unsqueeze(0), LOW), Dense(delta.unsqueeze(0), LOW, made)
    short, long = normal(1, 8, 70, seed=1), normal(1, 8, 90, seed=2)
    torch.testing.assert_close(one.to_long(short), other.to_long(short), rtol=0.02, atol=0.2)
    torch.testing.assert_close(one.to_short(long), other.to_short(long), rtol=0.02, atol=0.2)
    assert one.roundings([1.0]) == pytest.approx(other.roundings([1.0]), rel=1e-6)
    assert other.pick([0]).to_long(short).equal(other.to_long(short))


@pytest.mark.parametrize(("d", "k"), [(300, 512), (37, 100), (700, 33), (3, 5)])
def test_a_difference_is_rounded_into_it_as_it_is_formed(d: int, k: int) -> None:
    base, tuned, made, out = normal(d, k).to(LOW), normal(d, k, seed=1).to(LOW), room(d, k), torch.empty(d, k)
    sums = form_delta(base, tuned, out, made.matrix[0]).tolist()
    apart, lying = torch.empty(d, k), torch.empty(d, k, dtype=LOW)
    assert sums == pytest.approx(form_delta(base, tuned, apart, lying).tolist(), rel=1e-12)
    assert torch.equal(out, apart)
    assert torch.equal(made.matrix[0], lying)


def test_large_ones_on_a_processor_are_worth_it() -> None:
    assert both_ways(2048, 2048, "cpu")
    assert both_ways(2048, 8192, "cpu")
    assert not both_ways(4096, 14336, "cpu")
    assert not both_ways(2048, 2048, "cuda")
    assert not both_ways(1024, 1024, "cpu")
    assert not both_ways(128256, 4096, "cpu")


def test_one_worker_does_all_shapes_in_the_same_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an earlier matrix has left beside a smaller one, or where its zeros belong, changes no byte."""
    monkeypatch.setattr(rounded, "_WORTH", range(1, 1 << 26))
    settings, kept = Settings(8, "krylov"), [Workspace()]
    deltas = [1e3 * delta_of(200, 150, "power"), delta_of(150, 160, "power"), 1e-12 * delta_of(100, 190, "power")]
    for delta in deltas:
        [used] = decompose([pair_of(delta)], ["w"], settings, SHORT["cpu-bf16"], CPU, kept)
        [fresh] = decompose([pair_of(delta)], ["w"], settings, SHORT["cpu-bf16"], CPU)
        assert used.factors is not None
        assert fresh.factors is not None
        assert used.factors.solver.startswith("krylov")
        assert torch.equal(used.factors.A, fresh.factors.A)
        assert torch.equal(used.factors.B, fresh.factors.B)
        assert loss_of(used.factors, delta) <= used.factors.certificate
