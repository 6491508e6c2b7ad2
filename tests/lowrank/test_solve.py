"""The ladder: a route that does not do, or lies, is caught and followed by another, and the notes say so."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor

from phlora_pipeline.lowrank import full, krylov, operator, ritz, solve
from phlora_pipeline.lowrank.operator import Blocked, Dense
from phlora_pipeline.lowrank.routes import rounds
from phlora_pipeline.lowrank.solve import Factors, Settings, factorise
from tests.lowrank.cases import CPU, SHORT, delta_of, energies_of, left_by, loss_of, same_bytes
from tests.toys import with_spectrum

SHAPE = (100, 130)
RANK = 6
WIDTHS = [step.width for step in rounds(min(SHAPE), RANK, SHORT["cpu"])]
assert len(WIDTHS) == 2, "two sizes of basis fit these matrices"


def climbed(
    deltas: Sequence[Tensor], wanted: Settings, *, profile: Any = SHORT["cpu"], names: Sequence[str] = ()
) -> list[Factors | str]:
    op = Dense(torch.stack(list(deltas)), getattr(torch, profile.low))
    norms_sq = [float(delta.double().square().sum()) for delta in deltas]
    return factorise(op, names or [f"w{number}" for number in range(len(deltas))], norms_sq, wanted, profile)


def climbed_one(
    delta: Tensor, rank: int = RANK, *, profile: Any = SHORT["cpu"], name: str = "w", **wanted: Any
) -> Factors:
    [found] = climbed([delta], Settings(rank, **wanted), profile=profile, names=[name])
    assert isinstance(found, Factors), found
    return found


class Calls:
    """How often each route was gone."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        for name, original in (("exact", full.exact), ("gram", full.gram_eigen)):
            monkeypatch.setattr(full, original.__name__, self._counted(name, original))
        monkeypatch.setattr(solve, "KrylovBasis", self._counted("krylov", krylov.KrylovBasis))

    def _counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **settings: Any) -> Any:
            self.names.append(name)
            return original(*arguments, **settings)

        return counting


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


class TestRoutes:
    def test_krylov_that_suffices_is_all_that_runs(self, calls: Calls) -> None:
        found = climbed_one(delta_of(*SHAPE, "steep"), solver="krylov")
        assert calls.names == ["krylov"]
        assert found.solver.startswith("krylov ")
        assert loss_of(found, delta_of(*SHAPE, "steep")) <= found.certificate

    @pytest.mark.parametrize("solver", ["exact", "gram"])
    def test_a_named_route_alone(self, solver: Any, calls: Calls) -> None:
        found = climbed_one(delta_of(*SHAPE, "power"), solver=solver)
        assert calls.names == [solver]
        assert (found.solver, found.notes) == (solver, ())

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    def test_a_tolerance_that_a_basis_does_not_meet_asks_for_a_wider_one(self, profile: Any) -> None:
        delta = delta_of(*SHAPE, "power")
        easy = climbed_one(delta, solver="krylov", tolerance=0.9, profile=profile)
        assert (easy.solver, easy.notes) == (f"krylov {WIDTHS[0]}", ())
        tolerance = 0.2 * easy.certificate
        strict = climbed_one(delta, solver="krylov", tolerance=tolerance, profile=profile)
        assert strict.solver == f"krylov {WIDTHS[1]}"
        assert strict.notes == (f"krylov {WIDTHS[0]}: certificate {easy.certificate:.1e} over {tolerance:.1e}",)
        assert loss_of(strict, delta) <= strict.certificate <= tolerance

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    def test_a_tolerance_that_no_basis_meets_takes_the_whole_route_and_says_why(self, profile: Any) -> None:
        found = climbed_one(delta_of(*SHAPE, "flat"), solver="krylov", tolerance=1e-9, profile=profile)
        assert found.solver in {"gram", "exact"}
        assert [note.partition(":")[0] for note in found.notes] == [f"krylov {width}" for width in WIDTHS]
        assert all("certificate" in note and "over 1.0e-09" in note for note in found.notes)
        assert abs(loss_of(found, delta_of(*SHAPE, "flat"))) < 1e-6

    def test_there_is_no_basis_for_a_rank_like_the_matrix(self, calls: Calls) -> None:
        climbed_one(delta_of(40, 50, "power"), 40, solver="krylov")
        assert "krylov" not in calls.names


def shorter(found: ritz.Triplets) -> ritz.Triplets:
    """Singular values that are a little too small, and vectors that fit them."""
    return ritz.Triplets(found.short * 0.9, found.long * 0.9, found.energies * 0.9**4)


def turned(found: ritz.Triplets) -> ritz.Triplets:
    """Right values, vectors in the wrong places."""
    return ritz.Triplets(found.short.roll(1, dims=-1), found.long, found.energies)


def not_finite(found: ritz.Triplets) -> ritz.Triplets:
    return ritz.Triplets(found.short / 0, found.long, found.energies)


LIES = [shorter, turned, not_finite]


def lying(monkeypatch: pytest.MonkeyPatch, name: str, lie: Callable[[ritz.Triplets], ritz.Triplets]) -> None:
    where = {"exact": full, "gram_eigen": full, "refine": solve}[name]
    original = getattr(where, name)

    def wrong(*arguments: Any, **settings: Any) -> Any:
        triplets, *others = original(*arguments, **settings)
        return lie(triplets), *others

    monkeypatch.setattr(where, name, wrong)


@pytest.mark.parametrize("lie", LIES)
class TestLies:
    """Libraries have returned wrong factorisations with no error."""

    @pytest.mark.parametrize(
        ("liar", "solver", "next_one"),
        [("exact", "exact", "gram"), ("gram_eigen", "gram", "exact"), ("refine", "krylov", "gram")],
    )
    def test_the_next_route_is_taken(
        self, liar: str, solver: Any, next_one: str, lie: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        delta = delta_of(*SHAPE, "power")
        lying(monkeypatch, liar, lie)
        found = climbed_one(delta, solver=solver)
        assert found.solver in {next_one, "exact", "gram"} - {solver}
        assert found.notes
        assert all(note.startswith(solver) for note in found.notes)
        assert abs(loss_of(found, delta)) < 1e-6

    def test_where_all_lie_there_is_a_reason_and_no_crash(self, lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("exact", "gram_eigen", "refine"):
            lying(monkeypatch, name, lie)
        for solver in ("auto", "krylov", "gram", "exact"):
            [told] = climbed([delta_of(*SHAPE, "power")], Settings(RANK, solver=solver))
            assert isinstance(told, str)
            assert told.startswith("no solver gave a factorisation that stands its checks: ")
            assert "exact: " in told
            assert "gram: " in told


def test_a_leading_value_that_is_left_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is a right factorisation, of triplets that do not lead: the rest of the spectrum does not add up."""
    svd = torch.linalg.svd

    def without_the_first(delta: Tensor, **settings: Any) -> tuple[Tensor, ...]:
        U, S, Vh = svd(delta, **settings)
        return U[..., 1:], S[..., 1:], Vh[..., 1:, :]

    monkeypatch.setattr(torch.linalg, "svd", without_the_first)
    found = climbed_one(delta_of(*SHAPE, "power"), solver="exact")
    assert found.solver == "gram"


def fail_to_converge(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError(
        "linalg.svd: The algorithm failed to converge\n because the input is ill-conditioned"
    )


def refuse_its_size(*_: object, **__: object) -> None:
    raise RuntimeError(
        "cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling `cusolverDnSgesvdj_bufferSize(handle)`"
    )


class TestNoConvergence:
    @pytest.mark.parametrize(
        ("name", "solver", "next_one"),
        [("svd", "exact", "gram"), ("eigh", "gram", "exact"), ("eigh", "krylov", "exact")],
    )
    def test_it_moves_on(self, name: str, solver: Any, next_one: str, monkeypatch: pytest.MonkeyPatch) -> None:
        delta = delta_of(*SHAPE, "power")
        monkeypatch.setattr(torch.linalg, name, fail_to_converge)
        found = climbed_one(delta, solver=solver)
        assert found.solver == next_one
        assert found.notes[0].startswith(solver)
        assert "failed to converge because" in found.notes[0]
        assert abs(loss_of(found, delta)) < 1e-6

    @pytest.mark.parametrize(
        ("name", "solver", "next_one"),
        [("svd", "exact", "gram"), ("eigh", "gram", "exact"), ("eigh", "krylov", "exact")],
    )
    def test_a_library_that_refuses_the_matrix_is_no_end(
        self, name: str, solver: Any, next_one: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """cuSOLVER's workspaces outgrow its integers; torch has no type for that."""
        monkeypatch.setattr(torch.linalg, name, refuse_its_size)
        found = climbed_one(delta_of(*SHAPE, "power"), solver=solver)
        assert found.solver == next_one
        assert "CUSOLVER_STATUS_INVALID_VALUE" in found.notes[0]

    @pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
    def test_memory_and_a_broken_device_are_for_others_to_mend(
        self, solver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for words in (
            "CUDA error: an illegal memory access was encountered",
            "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
        ):
            for name in ("svd", "eigh"):
                monkeypatch.setattr(torch.linalg, name, Mock(side_effect=RuntimeError(words)))
            with pytest.raises(RuntimeError, match=words):
                climbed_one(delta_of(*SHAPE, "power"), solver=solver)

    def test_where_nothing_converges_there_is_a_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("svd", "eigh"):
            monkeypatch.setattr(torch.linalg, name, fail_to_converge)
        for solver in ("gram", "exact"):
            [told] = climbed([delta_of(*SHAPE, "power")], Settings(8, solver=solver))
            assert isinstance(told, str)
            assert told.count("failed to converge") == 2

    def test_other_errors_are_not_swallowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(full, "exact", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            climbed_one(delta_of(*SHAPE, "power"), solver="exact")


class TestBatch:
    """Each matrix's way depends on that matrix alone."""

    @pytest.fixture
    def mixed(self) -> list[Tensor]:
        """Some are certified at once, some need a wider basis, some another route."""
        return [
            delta_of(*SHAPE, "steep"), delta_of(*SHAPE, "flat"), with_spectrum(*SHAPE, torch.tensor([2.0, 1.0])).float(),
            delta_of(*SHAPE, "power"), delta_of(*SHAPE, "clustered", seed=2),
        ]  # fmt: skip

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    @pytest.mark.parametrize("solver", ["auto", "krylov", "gram", "exact"])
    def test_the_way_is_the_same_in_every_company(self, solver: Any, profile: Any, mixed: list[Tensor]) -> None:
        wanted = Settings(6, solver=solver, tolerance=1e-4)
        names = ["a", "b", "c", "d", "e"]
        together = climbed(mixed, wanted, names=names, profile=profile)
        for delta, name, found, unique in zip(mixed, names, together, (True, False, True, True, False), strict=True):
            [alone] = climbed([delta], wanted, names=[name], profile=profile)
            assert isinstance(alone, Factors)
            assert isinstance(found, Factors)
            assert (found.solver, len(found.notes)) == (alone.solver, len(alone.notes))
            # Of equal σ any directions will do, and which they are hangs on the last digits of products.
            assert not unique or torch.dist(found.B @ found.A, alone.B @ alone.A) <= 2e-2 * (alone.B @ alone.A).norm()
            assert loss_of(found, delta) <= found.certificate + 1e-12
        if solver == "krylov":
            assert len({found.solver for found in together if isinstance(found, Factors)}) > 1

    def test_one_that_no_route_can_do_spoils_no_other(
        self, monkeypatch: pytest.MonkeyPatch, mixed: list[Tensor]
    ) -> None:
        problems = solve.checks.problems

        def suspicious(found: Any, norms_sq: Sequence[float], *others: Any) -> list[str]:
            told = problems(found, norms_sq, *others)
            return ["cursed" if norm_sq == norms[1] else text for text, norm_sq in zip(told, norms_sq, strict=True)]

        norms = [float(delta.double().square().sum()) for delta in mixed]
        monkeypatch.setattr(solve.checks, "problems", suspicious)
        found = climbed(mixed, Settings(6))
        assert [isinstance(each, str) for each in found] == [False, True, False, False, False]
        assert "cursed" in found[1]


def first_above(shares: Sequence[float], threshold: float) -> int:
    return 1 + next((index for index, share in enumerate(shares) if share >= threshold), len(shares) - 1)


class TestEnergy:
    THRESHOLDS = (0.05, 0.3, 0.6, 0.9, 0.999)
    WIDE = replace(SHORT["cpu"], steps=5)

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    @pytest.mark.parametrize("solver", ["auto", "krylov", "gram", "exact"])
    @pytest.mark.parametrize("spectrum", ["power", "steep", "clustered", "rank two"])
    def test_it_is_the_smallest_rank_that_reaches_the_threshold(self, spectrum: str, solver: Any, profile: Any) -> None:
        delta, profile = delta_of(*SHAPE, spectrum), replace(profile, steps=5)
        energies = energies_of(delta)
        shares = (energies.cumsum(0) / energies.sum()).tolist()
        for threshold in self.THRESHOLDS:
            found = climbed_one(delta, 100, solver=solver, energy=threshold, profile=profile)
            rank = len(found.singular_values)
            smallest = first_above(shares, threshold - 1e-6)
            # A basis that loses something may need more triplets: as many as its certificate allows.
            assert smallest <= rank <= first_above(shares, threshold + found.certificate + 1e-6)
            assert found.A.shape == (rank, 130)
            kept = 1 - left_by(found, delta) / float(energies.sum())
            assert kept >= threshold - 1e-6

    def test_no_whole_decomposition_where_a_basis_suffices(self, calls: Calls) -> None:
        found = climbed_one(delta_of(200, 260, "steep"), 64, solver="krylov", energy=0.99, profile=self.WIDE)
        assert set(calls.names) == {"krylov"}
        assert found.solver.startswith("krylov")
        assert len(found.singular_values) == 4

    def test_the_basis_grows_until_the_threshold_is_met(self, calls: Calls) -> None:
        """Of 16 equal leading values a first basis of that rank holds less than was asked for; no failure, and not told as one."""
        sigma = torch.cat([torch.ones(24), torch.full((400,), 0.01)])
        delta = with_spectrum(424, 500, sigma).float()
        found = climbed_one(delta, 128, solver="krylov", energy=0.98, profile=self.WIDE)
        assert calls.names == ["krylov"]
        assert len(found.singular_values) == 24
        assert not any("threshold" in note or "energy" in note for note in found.notes)

    def test_the_cap_is_kept_where_the_threshold_is_out_of_reach(self) -> None:
        for solver in ("auto", "krylov", "gram", "exact"):
            found = climbed_one(delta_of(*SHAPE, "flat"), 8, solver=solver, energy=0.9)
            assert len(found.singular_values) == 8

    def test_all_of_it_is_asked_for(self) -> None:
        found = climbed_one(delta_of(12, 9, "power"), 50, energy=1.0)
        assert len(found.singular_values) <= 9
        assert left_by(found, delta_of(12, 9, "power")) < 1e-6


class TestFactors:
    @pytest.mark.parametrize("sign", [1.0, -1.0])
    @pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
    def test_the_largest_entry_of_each_left_vector_is_positive(self, solver: Any, sign: float) -> None:
        for shape in (SHAPE, SHAPE[::-1]):
            B = climbed_one(sign * delta_of(*shape, "power"), 6, solver=solver).B
            assert (B.gather(0, B.abs().argmax(dim=0, keepdim=True)) > 0).all()

    @pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
    def test_ranks_below_are_slices_within_the_certificate(self, solver: Any) -> None:
        """One number holds for every smaller adapter that is cut from the same part."""
        for spectrum in ("power", "clustered", "steep"):
            delta = delta_of(*SHAPE, spectrum)
            found, energies = climbed_one(delta, 8, solver=solver, tolerance=0.1), energies_of(delta)
            for rank in range(1, 9):
                left = float((delta.double() - found.B[:, :rank].double() @ found.A[:rank].double()).square().sum())
                loss = (left - float(energies[rank:].sum())) / float(energies.sum())
                assert -1e-6 < loss <= found.certificate

    @pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
    @pytest.mark.parametrize("spectrum", ["power", "rank two", "steep"])
    def test_the_residual_is_what_is_left(self, spectrum: str, solver: Any) -> None:
        """Where nearly all is kept, too: a difference of equal numbers would have no digits."""
        delta = delta_of(*SHAPE, spectrum)
        for rank in (2, 8):
            found = climbed_one(delta, rank, solver=solver)
            total = float(energies_of(delta).sum())
            assert found.residual_sq == pytest.approx(left_by(found, delta), rel=1e-3, abs=1e-11 * total)
            assert found.residual_sq >= 0

    def test_factors_share_no_memory_with_what_they_were_made_from(self) -> None:
        op = Dense(torch.stack([delta_of(*SHAPE, "power")]), torch.float32)
        [found] = factorise(op, ["w"], [float(energies_of(op.dense()[0]).sum())], Settings(8), SHORT["cpu"])
        before = found.A.clone(), found.B.clone()
        op.dense().zero_()
        assert torch.equal(found.A, before[0])
        assert torch.equal(found.B, before[1])
        for factor in (found.A, found.B):
            assert factor.untyped_storage().nbytes() == factor.nbytes


@pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
@pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])
def test_a_matrix_that_is_formed_slice_by_slice_meets_the_same_tolerance(
    shape: tuple[int, int], solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta = delta_of(*shape, "power")
    base = delta_of(*shape, "flat", seed=5)
    tuned = base + delta
    delta = tuned - base
    monkeypatch.setattr(operator, "CHUNK", 500)
    for profile in SHORT.values():
        wanted = Settings(6, solver=solver, tolerance=2e-2)
        op = Blocked(base, tuned, CPU, getattr(torch, profile.low))
        [found] = factorise(op, ["w"], [float(energies_of(delta).sum())], wanted, profile)
        [dense] = climbed([delta], wanted, profile=profile, names=["w"])
        assert found.solver == dense.solver
        assert -1e-6 < loss_of(found, delta) <= found.certificate
        assert solver != "krylov" or found.certificate <= 2e-2
        assert found.residual_sq == pytest.approx(left_by(found, delta), rel=1e-3)


def test_the_same_name_gives_the_same_bytes_and_another_name_other_random_numbers() -> None:
    delta = delta_of(*SHAPE, "power")
    one, again, other = (climbed_one(delta, solver="krylov", tolerance=0.5, name=name) for name in ("a", "a", "b"))
    assert same_bytes(one, again)
    assert not torch.equal(one.A, other.A)
    assert abs(loss_of(one, delta) - loss_of(other, delta)) < 0.5


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("solver", "profile"), [("krylov", "cpu-bf16"), ("gram", "cpu")])
def test_thread_counts_agree_to_rounding(solver: Any, profile: str) -> None:
    delta = delta_of(130, 170, "power")
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(climbed_one(delta, 6, solver=solver, tolerance=2e-2, profile=SHORT[profile]))
    one, two = found
    assert one.solver == two.solver
    assert one.singular_values == pytest.approx(two.singular_values, rel=1e-3 if solver == "krylov" else 1e-5)
    for each in found:
        assert loss_of(each, delta) <= each.certificate


def test_every_certificate_is_a_finite_share() -> None:
    for spectrum, solver in itertools.product(("power", "flat", "rank two"), ("krylov", "gram", "exact")):
        c = climbed_one(delta_of(*SHAPE, spectrum), solver=solver).certificate
        assert math.isfinite(c)
        assert 0 <= c < 1


class TestNearly:
    """What misses the tolerance by little is looked at more closely before more is built."""

    PROFILE = SHORT["cpu"]

    def degrees(self, monkeypatch: pytest.MonkeyPatch) -> list[int]:
        asked: list[int] = []
        estimate = solve.tail_bound

        def noted(*arguments: Any) -> list[float]:
            asked.append(arguments[-1])
            return estimate(*arguments)

        monkeypatch.setattr(solve, "tail_bound", noted)
        return asked

    def tail_alone(self) -> tuple[Tensor, float, float]:
        """A matrix, and its certificates by a polynomial of low degree and by one of twice as high a degree."""
        delta = delta_of(*SHAPE, "power")
        profile = replace(self.PROFILE, degree=3)
        low = climbed_one(delta, solver="krylov", tolerance=1.0, profile=profile).certificate
        high = climbed_one(delta, solver="krylov", tolerance=1.0, profile=replace(profile, degree=7)).certificate
        assert low < 1
        assert low / 4 < 0.9 * low
        assert high < low
        return delta, low, high

    def test_a_sharper_tail_may_be_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delta, low, high = self.tail_alone()
        tolerance = max(0.3 * low, (low * high) ** 0.5)
        asked = self.degrees(monkeypatch)
        found = climbed_one(delta, solver="krylov", tolerance=tolerance, profile=replace(self.PROFILE, degree=3))
        assert asked == [3, 7]
        assert found.solver == f"krylov {WIDTHS[0]}"
        assert found.notes == (f"krylov {WIDTHS[0]}: certificate {low:.1e} over {tolerance:.1e}",)
        assert loss_of(found, delta) <= found.certificate <= tolerance

    def test_what_is_far_off_is_not_looked_at_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delta, low, _ = self.tail_alone()
        asked = self.degrees(monkeypatch)
        climbed_one(delta, solver="krylov", tolerance=low / 5, profile=replace(self.PROFILE, degree=3))
        assert asked[:2] == [3, 7]  # the second round's own
        assert len(asked) in {2, 3}

    def test_of_a_batch_only_those_that_nearly_did(self, monkeypatch: pytest.MonkeyPatch) -> None:
        delta, low, high = self.tail_alone()
        tolerance = max(0.3 * low, (low * high) ** 0.5)
        rows: list[int] = []
        bound = solve.optimum_bound

        def noted(found: ritz.Compression, tails: Sequence[float], rank: int) -> list[list[float]]:
            rows.append(len(found.V))
            return bound(found, tails, rank)

        monkeypatch.setattr(solve, "optimum_bound", noted)
        deltas, names = [delta_of(*SHAPE, "rank two"), delta], ["x", "w"]
        done = climbed(
            deltas, Settings(RANK, "krylov", tolerance), profile=replace(self.PROFILE, degree=3), names=names
        )
        assert rows == [2, 1]
        alone = climbed_one(delta, solver="krylov", tolerance=tolerance, profile=replace(self.PROFILE, degree=3))
        assert isinstance(done[1], Factors)
        assert done[1].solver == alone.solver
        assert done[1].certificate == pytest.approx(alone.certificate, rel=1e-2)


class TestFlat:
    """Where no direction stands out no basis will be certified, and `auto` does not build one."""

    SLOW = replace(SHORT["cpu"], name="slow decompositions", svd_rate=1e7, eigh_rate=1e7)
    """Rates with which `auto` tries a basis even here."""

    def test_only_what_is_flat_leaves_the_batch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        grown: list[int] = []
        grow = krylov.KrylovBasis.grow

        def noted(self: krylov.KrylovBasis, width: int) -> None:
            grown.append(self.rows.shape[0])
            grow(self, width)

        monkeypatch.setattr(krylov.KrylovBasis, "grow", noted)
        noise = torch.randn(*SHAPE, generator=torch.Generator().manual_seed(3))
        deltas = [delta_of(*SHAPE, "flat"), delta_of(*SHAPE, "power"), noise / noise.norm()]
        found = climbed(deltas, Settings(RANK), profile=self.SLOW)
        assert grown == [1]
        for answer, delta, flat in zip(found, deltas, (True, False, True), strict=True):
            assert isinstance(answer, Factors)
            assert answer.solver.startswith("krylov") != flat
            assert any("no direction stands out" in note for note in answer.notes) == flat
            assert -1e-6 <= loss_of(answer, delta) <= answer.certificate + 1e-6
        alone = climbed_one(deltas[1], name="w1", profile=self.SLOW)
        same = found[1]
        assert isinstance(same, Factors)
        assert (alone.solver, alone.notes) == (same.solver, same.notes)
        assert torch.dist(alone.B @ alone.A, same.B @ same.A) <= 1e-3 * (alone.B @ alone.A).norm()

    def test_who_asks_for_krylov_gets_its_bases(self) -> None:
        found = climbed_one(delta_of(*SHAPE, "flat"), solver="krylov")
        assert any(note.startswith("krylov") and "stands out" not in note for note in found.notes)

    def test_a_coarse_tolerance_may_be_met_by_a_basis(self) -> None:
        found = climbed_one(delta_of(*SHAPE, "flat"), tolerance=0.5, profile=self.SLOW)
        assert found.solver.startswith("krylov")
        assert loss_of(found, delta_of(*SHAPE, "flat")) <= found.certificate <= 0.5
