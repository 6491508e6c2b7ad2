"""Two operators, one matrix: resident or formed slice by slice, lying or standing, in low precision or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from phlora_pipeline.lowrank import operator
from phlora_pipeline.lowrank.delta import form_delta
from phlora_pipeline.lowrank.operator import LOW_UNIT, Blocked, Dense, Plain, apply, gram, product, slice_bytes
from tests.lowrank.cases import CPU

SHAPES = [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1), (1, 1), (33, 70)]
LOW = [torch.float32, torch.bfloat16]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def stored(d: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return normal(d, k).to(dtype), normal(d, k, seed=1).to(dtype)


def dense(base: Tensor, tuned: Tensor, low: torch.dtype) -> Dense:
    delta = torch.empty(1, *base.shape)
    form_delta(base, tuned, delta[0])
    return Dense(delta, low)


@pytest.fixture(params=["whole", "sliced"])
def _cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a few columns each, so that toy matrices have many, and a ragged last one."""
    if request.param == "sliced":
        monkeypatch.setattr(operator, "CHUNK", 16)


@pytest.mark.usefixtures("_cut")
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize(("d", "k"), SHAPES)
class TestBoth:
    """`Dense` against matrices in float64, and `Blocked` against `Dense`."""

    @pytest.fixture
    def both(self, d: int, k: int, low: torch.dtype) -> tuple[Dense, Blocked, Tensor]:
        base, tuned = stored(d, k)
        delta = (tuned - base).double()
        return dense(base, tuned, low), Blocked(base, tuned, CPU, low), delta if d <= k else delta.mT

    def test_the_short_side_comes_first(self, both: tuple[Dense, Blocked, Tensor], d: int, k: int) -> None:
        for op in both[:2]:
            assert (op.shape, op.turned, op.device) == ((1, min(d, k), max(d, k)), d > k, CPU)

    @pytest.mark.parametrize("precise", [True, False])
    def test_products(self, both: tuple[Dense, Blocked, Tensor], low: torch.dtype, precise: bool) -> None:
        *operators, D = both
        m, n = D.shape
        on_long, on_short = normal(1, 5, n, seed=2), normal(1, 5, m, seed=3)
        unit = 2.0**-22 if precise or low == torch.float32 else 3 * LOW_UNIT  # of D, of the panel, and of the product
        for op in operators:
            to_short, to_long = op.to_short(on_long, precise=precise), op.to_long(on_short, precise=precise)
            assert to_short.dtype == to_long.dtype == torch.float32
            for found, wanted, panel in (
                (to_short[0], on_long[0].double() @ D.mT, on_long),
                (to_long[0], on_short[0].double() @ D, on_short),
            ):
                assert found.shape == wanted.shape
                assert torch.dist(found.double(), wanted) <= unit * D.norm() * panel.norm()

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
    def test_gram(self, both: tuple[Dense, Blocked, Tensor], dtype: torch.dtype) -> None:
        *operators, D = both
        for op in operators:
            found = op.gram(dtype)
            assert (found.dtype, found.shape) == (dtype, (1, len(D), len(D)))
            assert torch.dist(found[0].double(), D @ D.mT) <= 4 * torch.finfo(dtype).eps * D.norm() ** 2

    def test_residual_from_all_entries(self, both: tuple[Dense, Blocked, Tensor]) -> None:
        *operators, D = both
        m, n = D.shape
        short, long = normal(3, m, seed=4), normal(3, n, seed=5)
        wanted = float((D - short.mT.double() @ long.double()).square().sum())
        for op in operators:
            assert float(op.residual_sq(0, short, long)) == pytest.approx(wanted, rel=1e-5)

    def test_what_rounding_takes_is_known_from_above(
        self, both: tuple[Dense, Blocked, Tensor], low: torch.dtype, d: int, k: int
    ) -> None:
        *operators, D = both
        lost = float(torch.dist(D, D.float().to(low).double()))
        for op in operators:
            [bound] = op.roundings([float(D.square().sum())])
            assert lost * (1 - 1e-5) <= bound <= LOW_UNIT * float(D.norm()) * (1 + 1e-5)
            assert low == torch.bfloat16 or bound == 0

    def test_all_of_it(self, both: tuple[Dense, Blocked, Tensor], d: int, k: int) -> None:
        one, other, D = both
        assert one.dense().shape == (1, d, k)
        assert torch.equal(one.dense(), other.dense())
        assert torch.equal(one.dense()[0].double(), D.mT if d > k else D)


class TestDense:
    def test_a_rounded_copy_at_hand_is_used(self) -> None:
        delta = normal(1, 6, 8)
        op = Dense(delta, torch.bfloat16, rounded=Plain(torch.zeros(1, 6, 8, dtype=torch.bfloat16)))
        assert not op.to_long(normal(1, 2, 6)).any()
        assert op.to_long(normal(1, 2, 6), precise=True).any()

    def test_each_of_a_batch_has_its_own_roundings(self) -> None:
        delta = torch.cat([normal(1, 6, 8), torch.ones(1, 6, 8), 100 * normal(1, 6, 8, seed=1)])
        found = Dense(delta, torch.bfloat16).roundings([1.0, 1.0, 1.0])
        assert found == pytest.approx([float(torch.dist(each, each.bfloat16().float())) for each in delta], rel=1e-5)
        assert found[1] == 0

    def test_roundings_that_were_measured_are_taken_as_they_are(self) -> None:
        delta = normal(3, 6, 8)
        op = Dense(delta, torch.bfloat16, Plain(delta.bfloat16()), errors=[0.1, 0.2, 0.3])
        assert op.roundings([1.0, 1.0, 1.0]) == [0.1, 0.2, 0.3]
        assert op.pick([2, 0]).roundings([1.0, 1.0]) == [0.3, 0.1]

    def test_it_is_not_rounded_for_routes_that_need_no_low_precision(self) -> None:
        op = Dense(normal(1, 6, 8), torch.bfloat16)
        op.gram(torch.float64)
        op.to_long(normal(1, 2, 6), precise=True)
        op.residual_sq(0, normal(2, 6), normal(2, 8))
        assert op._H is None

    @pytest.mark.parametrize("low", LOW)
    def test_matrices_of_a_batch_are_apart(self, low: torch.dtype) -> None:
        delta, panel = normal(4, 9, 6), normal(4, 3, 6, seed=1)
        op = Dense(delta, low)
        together = op.to_long(panel)
        for index in range(4):
            alone = Dense(delta[index : index + 1], low)
            torch.testing.assert_close(alone.to_long(panel[index : index + 1])[0], together[index])
            short, long = normal(2, 6, seed=2), normal(2, 9, seed=3)
            assert op.residual_sq(index, short, long) == alone.residual_sq(0, short, long)

    @pytest.mark.parametrize("low", LOW)
    def test_picking_some(self, low: torch.dtype) -> None:
        delta, panel = normal(4, 9, 6), normal(2, 3, 6, seed=1)
        op = Dense(delta, low)
        op.to_long(normal(4, 1, 6))
        picked = op.pick([3, 1])
        assert (picked.shape, picked.turned) == ((2, 6, 9), True)
        assert torch.equal(picked.dense(), delta[[3, 1]])
        assert torch.equal(picked.to_long(panel), Dense(delta[[3, 1]], low).to_long(panel))
        assert op.pick([0, 1, 2, 3]) is op


class TestBlocked:
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_norms_are_those_of_the_whole(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        base, tuned = stored(30, 50, dtype)
        whole = form_delta(base, tuned, torch.empty(30, 50))
        monkeypatch.setattr(operator, "CHUNK", 16)
        torch.testing.assert_close(Blocked(base, tuned, CPU, torch.float32).sums(), whole, rtol=1e-6, atol=0)

    @pytest.mark.parametrize(("d", "k"), [(20, 30), (30, 20)])
    def test_scaling_is_exact(self, d: int, k: int) -> None:
        base, tuned = stored(d, k)
        op, panel = Blocked(base, tuned, CPU, torch.float32), normal(1, 2, 20)
        plain, whole, energies = op.to_long(panel), op.dense(), op.gram(torch.float64)
        op.exponent = -40
        assert torch.equal(op.to_long(panel), plain * 2.0**-40)
        assert torch.equal(op.dense(), whole * 2.0**-40)
        assert torch.equal(op.gram(torch.float64), energies * 2.0**-80)

    def test_there_is_one_matrix_and_it_is_picked(self) -> None:
        op = Blocked(*stored(3, 4), CPU, torch.float32)
        assert op.pick([0]) is op

    @pytest.mark.parametrize(("m", "n"), [(9, 400), (400, 9)])
    def test_no_slice_is_larger_than_it_says(self, m: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operator, "CHUNK", 100)
        slices = [part for _, part in Blocked(*stored(m, n), CPU, torch.float32).slices()]
        assert len(slices) > 5
        assert sum(part.numel() for part in slices) == m * n
        assert max(3 * part.nbytes for part in slices) <= slice_bytes(min(m, n))

    def test_a_side_longer_than_a_slice_is_taken_line_by_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operator, "CHUNK", 2)
        base, tuned = stored(20, 30)
        op = Blocked(base, tuned, CPU, torch.float32)
        assert {part.shape[-1] for _, part in op.slices()} == {1}
        torch.testing.assert_close(
            op.to_long(normal(1, 2, 20)), dense(base, tuned, torch.float32).to_long(normal(1, 2, 20))
        )


def test_a_product_of_one_is_that_of_a_batch() -> None:
    left, right = normal(3, 4, 5), normal(3, 5, 6, seed=1)
    for index in range(3):
        torch.testing.assert_close(
            product(left[index : index + 1], right[index : index + 1])[0], product(left, right)[index]
        )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("b", [1, 3])
def test_a_panel_is_applied_as_by_a_linear_layer(b: int, turned: bool, dtype: torch.dtype) -> None:
    weight = normal(b, 7, 5).to(dtype).mT if turned else normal(b, 5, 7).to(dtype)
    panel = normal(b, 4, 7, seed=1).to(dtype)
    found, wanted = apply(panel, weight), panel.double() @ weight.double().mT
    assert (found.dtype, found.shape) == (dtype, (b, 4, 5))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 5e-2)


def test_gram_of_a_panel_is_summed_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operator, "CHUNK", 50)
    panel = normal(2, 4, 300)
    wanted = panel.double() @ panel.double().mT
    torch.testing.assert_close(gram(panel), wanted, rtol=1e-13, atol=1e-12)
