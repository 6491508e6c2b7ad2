"""Random rows that a name decides, and orthonormal ones whatever they were made from."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline.lowrank.panels import against, gaussian, orthonormal, straightened, whitener
from tests.lowrank.cases import CPU, projector


def draw(*names: str, purpose: str = "range", rows: int = 4, columns: int = 50) -> Tensor:
    return gaussian(names, purpose, rows, columns, CPU)


def gram_of(panel: Tensor) -> Tensor:
    return panel.double() @ panel.double().mT


class TestGaussian:
    def test_the_same_name_draws_the_same_numbers_in_every_batch(self) -> None:
        together = draw("a", "b", "c")
        assert torch.equal(draw("b")[0], together[1])
        assert torch.equal(draw("c", "a"), together[[2, 0]])

    def test_what_was_drawn_elsewhere_changes_nothing(self) -> None:
        before = draw("a")
        torch.manual_seed(5)
        state = torch.get_rng_state()
        assert torch.equal(draw("a"), before)
        assert torch.equal(torch.get_rng_state(), state)

    def test_another_name_and_another_purpose_draw_others(self) -> None:
        panels = [draw("a"), draw("b"), draw("a", purpose="check"), draw("a:b", purpose="x"), draw("b", purpose="x:a")]
        for index, one in enumerate(panels[:3]):
            for other in panels[:index]:
                assert abs(float(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1])) < 0.3

    def test_they_are_standard_and_independent(self) -> None:
        panel = draw(*map(str, range(20)), rows=16, columns=200)
        flat = panel.flatten().double()
        assert abs(float(flat.mean())) < 5 / math.sqrt(len(flat))
        assert float(flat.var()) == pytest.approx(1, abs=5 * math.sqrt(2 / len(flat)))
        assert float(gram_of(panel[0]).fill_diagonal_(0).abs().max()) < 6 * math.sqrt(200)

    def test_known_numbers_stay(self) -> None:
        """A published part is computed again in a year, on another machine, to the same bytes."""
        known = [-0.312482625246048, 0.14006561040878296]
        found = draw("model.layers.0.self_attn.q_proj.weight", rows=1, columns=2)
        assert found.flatten().tolist() == pytest.approx(known, rel=1e-6)


class TestOrthonormal:
    @settings(max_examples=60, deadline=None)
    @given(
        rows=st.integers(1, 12), columns=st.integers(12, 40), condition=st.floats(0, 3), seed=st.integers(0, 2**16),
        size=st.sampled_from([1e-12, 1e-3, 1.0, 1e12]),
    )  # fmt: skip
    def test_twice_is_exact_and_keeps_the_span(
        self, rows: int, columns: int, condition: float, seed: int, size: float
    ) -> None:
        """Whatever the rows' lengths, and for directions down to a thousandth beside a random mix of them."""
        generator = torch.Generator().manual_seed(seed)
        decay = torch.logspace(0, -condition, rows)
        panel = torch.randn(1, rows, rows, generator=generator) @ (
            decay.view(-1, 1) * torch.linalg.qr(torch.randn(columns, rows, generator=generator))[0].mT
        )
        panel *= size * torch.logspace(-3, 3, rows).view(-1, 1)
        for Q in (orthonormal(orthonormal(panel)), straightened(orthonormal(panel))):
            torch.testing.assert_close(gram_of(Q[0]), torch.eye(rows).double(), rtol=0, atol=3e-6)
            outside = against(panel, Q) / panel.norm(dim=-1, keepdim=True)
            assert float(outside.abs().max()) < 1e-4

    def test_dependent_rows_become_zero(self) -> None:
        independent = draw("a", rows=3)
        mixed = draw("b", rows=8, columns=3) @ independent
        Q = orthonormal(orthonormal(mixed))[0]
        lengths = Q.norm(dim=-1)
        assert sorted(lengths.round(decimals=5).tolist()) == [0.0] * 5 + [1.0] * 3
        torch.testing.assert_close(projector(Q[lengths > 0.5]), projector(independent[0]), rtol=0, atol=1e-5)

    def test_equal_rows_are_one(self) -> None:
        Q = orthonormal(draw("a", rows=1).expand(1, 5, 50).contiguous())[0]
        assert sorted(Q.norm(dim=-1).round(decimals=5).tolist()) == [0.0] * 4 + [1.0]

    @pytest.mark.parametrize("rows", [1, 4])
    def test_nothing_becomes_of_nothing(self, rows: int) -> None:
        assert not whitener(torch.zeros(1, rows, 10)).any()
        assert not orthonormal(torch.zeros(1, rows, 10)).any()

    def test_a_zero_row_among_others_stays_one(self) -> None:
        panel = draw("a", rows=4)
        panel[0, 2] = 0
        Q = orthonormal(orthonormal(panel))[0]
        assert sorted(Q.norm(dim=-1).round(decimals=5).tolist()) == [0.0, 1.0, 1.0, 1.0]

    def test_more_rows_than_columns_span_all(self) -> None:
        Q = orthonormal(orthonormal(draw("a", rows=9, columns=4)))[0]
        torch.testing.assert_close(Q.mT @ Q, torch.eye(4), rtol=0, atol=1e-5)

    def test_matrices_of_a_batch_are_apart(self) -> None:
        panel = torch.cat([draw("a"), torch.zeros(1, 4, 50), 1e6 * draw("b")])
        together = whitener(panel)
        for index in range(3):
            torch.testing.assert_close(whitener(panel[index : index + 1])[0], together[index])


class TestStraightened:
    def test_rows_move_as_little_as_can_be(self) -> None:
        """Löwdin: of all orthonormal rows the polar factor is the nearest, nearer than what any order of Gram–Schmidt gives."""
        exact = orthonormal(orthonormal(draw("a", rows=6)))
        nearly = exact + 1e-3 * draw("b", rows=6)
        found = straightened(nearly)[0]
        U, _, Vh = torch.linalg.svd(nearly[0].double(), full_matrices=False)
        torch.testing.assert_close(found.double(), U @ Vh, rtol=0, atol=1e-6)
        by_order = torch.linalg.qr(nearly[0].mT)[0].mT
        by_order *= (by_order * nearly[0]).sum(dim=-1, keepdim=True).sign()
        assert torch.dist(found, nearly[0]) < torch.dist(by_order, nearly[0])

    def test_rows_that_are_mostly_gone_are_left_out(self) -> None:
        Q = orthonormal(orthonormal(draw("a", rows=4)))
        Q[0, 1] *= 1e-3
        found = straightened(Q)[0]
        assert sorted(found.norm(dim=-1).round(decimals=4).tolist()) == [0.0, 1.0, 1.0, 1.0]
        torch.testing.assert_close(found.mT @ found @ found.mT, found.mT, rtol=0, atol=1e-5)

    def test_zero_rows_stay(self) -> None:
        assert not straightened(torch.zeros(2, 3, 9)).any()


@pytest.mark.parametrize("names", [("a",), ("a", "b")])
def test_against_a_basis_nothing_of_it_is_left(names: tuple[str, ...]) -> None:
    Q = orthonormal(orthonormal(draw(*names, rows=5)))
    panel = draw(*names, purpose="new", rows=3)
    left = against(panel, Q)
    assert float((left @ Q.mT).abs().max()) < 1e-5
    torch.testing.assert_close(left, panel - panel @ Q.mT @ Q, rtol=1e-4, atol=1e-5)
    assert torch.equal(panel, draw(*names, purpose="new", rows=3))
