"""Pairs in, certified factors out, whatever their size, their norm and the memory that there is."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from phlora_pipeline import lowrank
from phlora_pipeline.lowrank import PROFILES, Factors, Outcome, Settings, Workspace, beside, checks, measure, routes
from phlora_pipeline.lowrank import operator as operators
from tests.lowrank.cases import (  # fmt: skip
    CPU,
    SHORT,
    SPECTRA,
    delta_of,
    energies_of,
    factors_of,
    left_by,
    outcomes,
    pair_of,
    projector,
    same_bytes,
)
from tests.toys import with_spectrum

decomposing = importlib.import_module("phlora_pipeline.lowrank.decompose")  # the package's attribute is its function
SOLVERS = list(lowrank.SOLVERS)
SIDES = st.integers(1, 90) | st.integers(48, 120)
SHAPES = [(12, 12), (40, 9), (9, 40), (1, 7), (7, 1), (1, 1), (70, 54), (54, 70)]


def assert_is_best(found: Factors, delta: Tensor, rank: int) -> None:
    """Eckart–Young within the certificate, and eq. 4: BᵀB = AAᵀ = Σ_r."""
    d, k = delta.shape
    q = min(rank, d, k)
    energies = energies_of(delta)
    total = float(energies.sum())
    assert (found.A.shape, found.B.shape, len(found.singular_values)) == ((q, k), (d, q), q)
    assert list(found.singular_values) == sorted(found.singular_values, reverse=True)
    left, tail = left_by(found, delta), float(energies[q:].sum())
    assert tail - 1e-6 * total <= left <= tail + (found.certificate + 1e-7) * total
    assert found.residual_sq == pytest.approx(left, rel=1e-3, abs=1e-10 * total)
    sigma = torch.tensor(found.singular_values, dtype=torch.float64)
    for product in (found.B.double().mT @ found.B.double(), found.A.double() @ found.A.double().mT):
        assert float((product - torch.diag(sigma)).abs().max()) <= 2e-5 * found.singular_values[0]
    kept = float(sigma.square().sum())
    assert kept <= float(energies[:q].sum()) + 1e-5 * total
    assert kept >= float(energies[:q].sum()) - (found.certificate + 1e-5) * total


@pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
@pytest.mark.parametrize("solver", SOLVERS)
class TestTheorems:
    @pytest.mark.parametrize("spectrum", SPECTRA)
    @pytest.mark.parametrize(("d", "k"), SHAPES)
    def test_no_rank_r_matrix_is_closer_than_the_certificate_says(
        self, d: int, k: int, spectrum: str, solver: Any, profile: Any
    ) -> None:
        delta = delta_of(d, k, spectrum)
        for rank in (3, 100):
            found = factors_of(delta, rank, solver=solver, profile=profile)
            assert_is_best(found, delta, rank)
            assert found.certificate <= 1e-3

    @settings(max_examples=15, deadline=None)
    @given(
        d=SIDES, k=SIDES, rank=st.integers(1, 9) | st.integers(1, 90), seed=st.integers(0, 999), name=st.text(max_size=8),
        sigma=st.lists(st.floats(0, 1), min_size=1, max_size=90).filter(lambda values: max(values) > 1e-3),
        tolerance=st.sampled_from([1e-3, 0.05, 1.0]),
    )  # fmt: skip
    def test_of_any_spectrum(
        self, d: int, k: int, rank: int, seed: int, name: str, sigma: list[float], tolerance: float, solver: Any, profile: Any
    ) -> None:  # fmt: skip
        m = min(d, k)
        values = torch.tensor([*sorted(sigma, reverse=True), *[0.0] * m], dtype=torch.float64)[:m]
        delta = with_spectrum(d, k, values, seed=seed).float()
        found = factors_of(delta, rank, solver=solver, profile=profile, name=name, tolerance=tolerance)
        assert_is_best(found, delta, rank)
        assert found.certificate <= tolerance or not found.solver.startswith("krylov")

    def test_the_subspace_is_the_true_one(self, solver: Any, profile: Any) -> None:
        """Vectors have free signs and rotations; the projector has not."""
        sigma = torch.cat([torch.tensor([5.0, 4.0, 4.0]), torch.linspace(0.05, 0.01, 60)])
        for d, k in ((63, 80), (80, 63)):
            delta = with_spectrum(d, k, sigma).float()
            found = factors_of(delta, 3, solver=solver, profile=profile)
            U, _, Vh = torch.linalg.svd(delta.double())
            assert torch.dist(projector(found.B.mT), U[:, :3] @ U[:, :3].mT) < 1e-4
            assert torch.dist(projector(found.A), Vh[:3].mT @ Vh[:3]) < 1e-4

    @pytest.mark.parametrize("size", [1e-30, 1e-18, 1e-6, 1.0, 1e7, 1e15, 1e30])
    def test_norms_in_all_of_float32s_range(self, size: float, solver: Any, profile: Any) -> None:
        plain = delta_of(70, 54, "power") / delta_of(70, 54, "power").norm()
        delta = (plain.double() * size).float()
        assert_is_best(factors_of(delta, 4, solver=solver, profile=profile), delta, 4)

    @pytest.mark.parametrize("doubling", [-100, -48, -10, 10, 60, 120])
    def test_a_power_of_two_more_is_a_power_of_two_more(self, doubling: int, solver: Any, profile: Any) -> None:
        """Scaling is exact, and so is everything that follows from it."""
        delta = delta_of(70, 54, "power")
        plain, scaled = (
            factors_of(each, 4, solver=solver, profile=profile, tolerance=0.05)
            for each in (delta, delta * 2.0**doubling)
        )
        assert scaled.solver == plain.solver
        assert scaled.singular_values == pytest.approx(
            [math.ldexp(value, doubling) for value in plain.singular_values], rel=1e-6
        )
        assert scaled.certificate == pytest.approx(plain.certificate, rel=1e-3)
        torch.testing.assert_close(
            scaled.A, plain.A * 2.0 ** (doubling / 2), rtol=1e-4, atol=1e-6 * 2.0 ** (doubling / 2)
        )

    def test_batch_size_changes_no_bit(self, solver: Any, profile: Any) -> None:
        """Not of those that are certified at once, and not of those that need more."""
        deltas = [delta_of(100, 130, name) for name in ("power", "flat", "steep", "rank two", "clustered")]
        names = ["a", "b", "c", "d", "e"]
        wanted = Settings(6, solver=solver, tolerance=2e-2)
        together = outcomes(deltas, wanted, profile=profile, names=names)
        backwards = outcomes(deltas[::-1], wanted, profile=profile, names=names[::-1])[::-1]
        for delta, name, one, other in zip(deltas, names, together, backwards, strict=True):
            [alone] = outcomes([delta], wanted, profile=profile, names=[name])
            assert same_bytes(alone.factors, one.factors)
            assert same_bytes(alone.factors, other.factors)

    def test_buffers_of_an_earlier_call_change_no_bit(self, solver: Any, profile: Any) -> None:
        workspaces: list[Workspace] = []
        delta, wanted = delta_of(70, 54, "power"), Settings(4, solver=solver)
        [fresh] = outcomes([delta], wanted, profile=profile)
        outcomes([delta_of(90, 80, "huge")], wanted, profile=profile, workspaces=workspaces)
        [found] = outcomes([delta], wanted, profile=profile, workspaces=workspaces)
        outcomes([delta_of(90, 80, "flat")], wanted, profile=profile, workspaces=workspaces)
        assert same_bytes(found.factors, fresh.factors)
        assert len(workspaces) == 1

    def test_factors_of_a_smaller_rank_are_slices(self, solver: Any, profile: Any) -> None:
        delta = delta_of(70, 54, "steep")
        large, small = (factors_of(delta, rank, solver=solver, profile=profile) for rank in (8, 3))
        torch.testing.assert_close(large.B[:, :3] @ large.A[:3], small.B @ small.A, rtol=0, atol=1e-3)
        assert large.singular_values[:3] == pytest.approx(small.singular_values, rel=1e-4)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_stored_in_any_dtype(self, dtype: torch.dtype, solver: Any, profile: Any) -> None:
        base = (0.1 * delta_of(70, 54, "flat", seed=3)).to(dtype)
        tuned = (base.double() + delta_of(70, 54, "power").double()).to(dtype)
        wanted = Settings(4, solver=solver, tolerance=0.05)
        [found] = lowrank.decompose([(base, tuned)], ["w"], wanted, profile, CPU)
        delta = (tuned.double() - base.double()).float()
        [same] = outcomes([delta], wanted, profile=profile, names=["w"])
        assert (found.factors.solver, found.factors.notes) == (same.factors.solver, ())
        assert_is_best(found.factors, delta, 4)
        assert found.delta_sq == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
        assert found.base_sq == pytest.approx(float(base.double().square().sum()), rel=1e-5)


@pytest.mark.parametrize("solver", SOLVERS)
class TestNothingToDo:
    def test_no_change_has_no_factors(self, solver: Any) -> None:
        base = delta_of(20, 30, "power")
        [found] = lowrank.decompose([(base, base.clone())], ["w"], Settings(4, solver=solver), PROFILES["cpu"], CPU)
        assert found == Outcome(found.base_sq, found.base_sq, 0.0)

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_an_entry_that_is_no_number_has_no_factors(self, value: float, solver: Any) -> None:
        tuned = delta_of(20, 30, "power")
        tuned[3, 4] = value
        [found] = outcomes([tuned], Settings(4, solver=solver))
        assert not math.isfinite(found.delta_sq)
        assert (found.factors, found.failure, found.nonfinite) == (None, "", (1, (3, 4)))

    def test_among_others_neither_changes_anything(self, solver: Any) -> None:
        good, bad = delta_of(20, 30, "power"), torch.full((20, 30), math.nan)
        found = grouped([bad, good, torch.zeros(20, 30), good], Settings(4, solver=solver))
        assert [outcome.factors is not None for outcome in found] == [False, True, False, True]
        assert_is_best(found[1].factors, good, 4)

    def test_all_of_a_group_unchanged(self, solver: Any) -> None:
        assert [each.factors for each in grouped([torch.zeros(5, 6)] * 3, Settings(4, solver=solver))] == [None] * 3


def grouped(
    deltas: Sequence[Tensor], wanted: Settings, *, profile: Any = SHORT["cpu"], device: torch.device = CPU
) -> list[Outcome]:
    """All at once, as on a GPU."""
    pairs = [pair_of(delta) for delta in deltas]
    names = [f"w{number}" for number in range(len(deltas))]
    return decomposing._Group(pairs, names, wanted, profile, device, Workspace()).solve()


def out_of_memory(*_: object, **__: object) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


class TestMemory:
    """The ladder: half of the batch, slices, the processor. It costs time, never the result."""

    DELTAS = (
        delta_of(70, 54, "power"), delta_of(70, 54, "steep"), delta_of(70, 54, "flat"), delta_of(70, 54, "clustered"),
        delta_of(70, 54, "rank two"),
    )  # fmt: skip

    def assert_all_are_right(self, found: Sequence[Outcome], rank: int = 4) -> None:
        for outcome, delta in zip(found, self.DELTAS, strict=True):
            assert_is_best(outcome.factors, delta, rank)
            assert outcome.delta_sq == pytest.approx(float(delta.double().square().sum()), rel=1e-5)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_group_is_as_good_as_each_alone(self, solver: Any) -> None:
        found = grouped(self.DELTAS, Settings(4, solver=solver))
        self.assert_all_are_right(found)
        assert not any(note for outcome in found for note in outcome.factors.notes if "memory" in note)

    @pytest.mark.parametrize("largest", [1, 2])
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_batch_that_is_too_large_is_halved(
        self, solver: Any, largest: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        to_long = operators.Dense.to_long
        monkeypatch.setattr(
            operators.Dense, "to_long", lambda self, *panel, **how: (out_of_memory if self.shape[0] > largest else to_long)(self, *panel, **how)
        )  # fmt: skip
        found = grouped(self.DELTAS, Settings(4, solver=solver))
        self.assert_all_are_right(found)
        for outcome in found:
            assert outcome.factors.notes[0] == "out of memory on cpu with 5 at once"
            assert not any("slice" in note for note in outcome.factors.notes)

    def test_halving_gives_the_bytes_of_the_halves(self, monkeypatch: pytest.MonkeyPatch) -> None:
        alone = outcomes(self.DELTAS, Settings(4, solver="krylov", tolerance=0.05))
        gram, to_long = operators.Dense.gram, operators.Dense.to_long
        for name, original in (("gram", gram), ("to_long", to_long)):
            monkeypatch.setattr(
                operators.Dense, name,
                lambda self, *panel, original=original, **how: (out_of_memory if self.shape[0] > 1 else original)(self, *panel, **how),
            )  # fmt: skip
        found = grouped(self.DELTAS, Settings(4, solver="krylov", tolerance=0.05))
        for one, other in zip(alone, found, strict=True):
            assert torch.equal(one.factors.A, other.factors.A)
            assert torch.equal(one.factors.B, other.factors.B)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_matrix_that_does_not_fit_is_formed_slice_by_slice(
        self, solver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("to_long", "to_short", "gram"):
            monkeypatch.setattr(operators.Dense, name, out_of_memory)
        monkeypatch.setattr(operators, "CHUNK", 200)
        found = outcomes(self.DELTAS, Settings(4, solver=solver))
        self.assert_all_are_right(found)
        for outcome in found:
            assert outcome.factors.notes[:2] == ("out of memory on cpu with 1 at once", "formed slice by slice")

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_a_device_that_has_no_room_at_all_leaves_it_to_the_processor(
        self, solver: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        take, sums = Workspace.take, operators.Blocked.sums
        monkeypatch.setattr(
            Workspace, "take", lambda self, *what: (take if CPU in what else out_of_memory)(self, *what)
        )
        monkeypatch.setattr(
            operators.Blocked, "sums", lambda self: (sums if self.device == CPU else out_of_memory)(self)
        )
        found = grouped(self.DELTAS, Settings(4, solver=solver), device=torch.device("meta"))
        self.assert_all_are_right(found)
        for outcome in found:
            notes = outcome.factors.notes
            assert notes[0] == "out of memory on meta with 5 at once"
            assert "done on the processor" in notes
            assert not any("cpu" in note for note in notes)

    @pytest.mark.parametrize(
        "error",
        [
            torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
            RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("CUDA error: out of memory"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate(handle)`"),
        ],
        ids=["cuda", "python", "cpu", "pinned", "cublas", "cusolver"],
    )  # fmt: skip
    def test_every_way_to_say_it_is_understood(self, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(operators.Dense, "to_long", refuse)
        self.assert_all_are_right(outcomes(self.DELTAS, Settings(4)))

    def test_another_error_is_none_of_memory(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*_: object, **__: object) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

        monkeypatch.setattr(operators.Dense, "to_long", refuse)
        with pytest.raises(RuntimeError, match="illegal memory access"):
            outcomes(self.DELTAS, Settings(4))

    def test_a_processor_without_memory_for_slices_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Workspace, "take", out_of_memory)
        monkeypatch.setattr(operators.Blocked, "sums", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            outcomes(self.DELTAS[:1], Settings(4))

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    @pytest.mark.parametrize("solver", SOLVERS)
    def test_what_is_huge_is_never_resident(self, solver: Any, profile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "RESIDENT_BYTES", 4 * 70 * 54 - 1)
        monkeypatch.setattr(operators, "CHUNK", 200)
        monkeypatch.setattr(Workspace, "take", out_of_memory)
        found = outcomes(self.DELTAS, Settings(4, solver=solver), profile=profile)
        self.assert_all_are_right(found)
        assert {outcome.factors.notes[0] for outcome in found} == {"formed slice by slice"}

    @pytest.mark.parametrize("size", [1e-30, 1e30])
    def test_slices_of_any_norm(self, size: float, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "RESIDENT_BYTES", 1)
        delta = (self.DELTAS[0].double() * size).float()
        for solver in SOLVERS:
            assert_is_best(factors_of(delta, 4, solver=solver), delta, 4)

    def test_slices_with_nothing_in_them_and_with_what_is_no_number(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(routes, "RESIDENT_BYTES", 1)
        same, bad = outcomes([torch.zeros(9, 8), torch.full((9, 8), math.nan)], Settings(4))
        assert (same.delta_sq, same.factors) == (0.0, None)
        assert not math.isfinite(bad.delta_sq)
        assert bad.factors is None


class TestSideBySide:
    """A processor takes as many matrices at a time as it has threads for; who comes first changes nothing."""

    DELTAS = tuple(delta_of(100, 130, name) for name in ("power", "flat", "steep", "rank two", "clustered"))

    @pytest.fixture(autouse=True)
    def _two_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("solver", SOLVERS)
    def test_each_gets_its_own_factors(self, solver: Any) -> None:
        workspaces: list[Workspace] = []
        found = outcomes(self.DELTAS, Settings(4, solver=solver), workspaces=workspaces)
        for outcome, delta in zip(found, self.DELTAS, strict=True):
            assert_is_best(outcome.factors, delta, 4)
        assert len(workspaces) == 2
        again = outcomes(self.DELTAS, Settings(4, solver=solver), workspaces=workspaces)
        assert all(same_bytes(one.factors, other.factors) for one, other in zip(found, again, strict=True))
        assert len(workspaces) == 2

    def test_a_thread_that_is_held_up_takes_nobody_elses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The first to be asked comes last, as it may on a busy machine."""

        class HeldUp(ThreadPoolExecutor):
            def submit(self, call: Any) -> Any:  # type: ignore[override]
                return super().submit(lambda: (time.sleep(0.2 * (call.args == (0,))), call())[1])

        monkeypatch.setattr(beside, "_pool", lambda _, threads: HeldUp(threads))
        for outcome, delta in zip(outcomes(self.DELTAS, Settings(4)), self.DELTAS, strict=True):
            assert outcome.delta_sq == pytest.approx(float(delta.double().square().sum()), rel=1e-5)
            assert_is_best(outcome.factors, delta, 4)

    @pytest.mark.parametrize("solver", ["krylov", "exact"])
    def test_how_many_there_are_changes_no_bit(self, solver: Any) -> None:
        deltas = [delta_of(200, 260, name) for name in ("power", "steep")]
        wanted = Settings(8, solver=solver, tolerance=2e-2)
        together = outcomes(deltas, wanted, names=["a", "b"])
        for delta, name, found in zip(deltas, "ab", together, strict=True):
            [alone] = outcomes([delta], wanted, names=[name])
            assert same_bytes(alone.factors, found.factors)

    def test_stored_bytes_are_given_back_on_the_way(self) -> None:
        for count in (1, 5):
            pairs = [pair_of(delta) for delta in self.DELTAS[:count]]
            lowrank.decompose(pairs, list("abcde")[:count], Settings(4), SHORT["cpu"], CPU)
            assert pairs == []

    @pytest.mark.parametrize("profile", SHORT.values(), ids=SHORT)
    @pytest.mark.parametrize("solver", ["krylov", "gram", "exact"])
    def test_once_all_are_formed_the_pairs_are_not_needed(self, solver: Any, profile: Any) -> None:
        """What was read next lies there by then, and no bit of the factors is of it."""
        pairs = [pair_of(delta.clone()) for delta in self.DELTAS]
        stored, calls = [side for pair in pairs for side in pair], []

        def formed() -> None:
            calls.append(len(pairs))
            for side in stored:
                side.fill_(float("nan"))

        wanted, names = Settings(4, solver=solver), [f"w{number}" for number in range(len(pairs))]
        expected = outcomes(self.DELTAS, wanted, profile=profile, names=names)
        found = lowrank.decompose(pairs, names, wanted, profile, CPU, None, formed)
        assert calls == [0]
        for one, other in zip(found, expected, strict=True):
            assert same_bytes(one.factors, other.factors)
            assert one.delta_sq == other.delta_sq

    def test_memory_that_runs_out_after_that_is_an_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(operators.Dense, "to_long", out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            lowrank.decompose([pair_of(self.DELTAS[0])], ["w"], Settings(4), SHORT["cpu"], CPU, None, lambda: None)

    def test_threads_are_as_before_whatever_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        outcomes(self.DELTAS, Settings(4))
        assert torch.get_num_threads() == 2
        monkeypatch.setattr(decomposing, "factorise", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            outcomes(self.DELTAS, Settings(4))
        assert torch.get_num_threads() == 2

    def test_large_ones_are_done_one_after_another(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """On all threads, in one workspace: what decides is the size, and not the number."""
        monkeypatch.setattr(decomposing, "BESIDE_ENTRIES", 100 * 130 - 1)
        monkeypatch.setattr(decomposing, "side_by_side", None)
        workspaces: list[Workspace] = []
        found = outcomes(self.DELTAS, Settings(4), workspaces=workspaces)
        assert len(workspaces) == 1
        for outcome, delta in zip(found, self.DELTAS, strict=True):
            assert_is_best(outcome.factors, delta, 4)


class TestFailure:
    def test_a_failure_is_a_reason_and_the_others_are_done(self, monkeypatch: pytest.MonkeyPatch) -> None:
        problems, calls = checks.problems, []

        def suspicious(found: Any, norms_sq: Sequence[float], *others: Any) -> list[str]:
            told = problems(found, norms_sq, *others)
            calls.append(norms_sq)
            return ["cursed" if norm_sq == norm else text for text, norm_sq in zip(told, norms_sq, strict=True)]

        deltas = [delta_of(20, 30, name) for name in ("power", "steep")]
        norm = outcomes(deltas, Settings(4))[0].delta_sq
        monkeypatch.setattr(checks, "problems", suspicious)
        one, two = outcomes(deltas, Settings(4))
        assert one.factors is None
        assert "cursed" in one.failure
        assert (one.delta_sq, two.failure) == (norm, "")
        assert_is_best(two.factors, deltas[1], 4)


class TestMeasure:
    @pytest.mark.parametrize("shape", [(), (7,), (0, 4), (4, 5), (2, 3, 4, 5)])
    def test_norms_of_any_shape(self, shape: tuple[int, ...]) -> None:
        base, tuned = torch.rand(shape), torch.rand(shape)
        pairs = [(base, tuned), (base, base)]
        noises, [one, two] = measure(pairs, [(torch.bfloat16, torch.bfloat16)] * 2, CPU)
        assert noises == lowrank.rounding_noise(pairs, [(torch.bfloat16, torch.bfloat16)] * 2)
        wanted = [float(values.double().square().sum()) for values in (base, tuned, tuned - base)]
        assert [one.base_sq, one.tuned_sq, one.delta_sq] == pytest.approx(wanted, rel=1e-6)
        assert (two.delta_sq, two.factors) == (0.0, None)

    def test_threads_are_as_before_whatever_happens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        try:
            stored = [(torch.float32, torch.float32)]
            measure([pair_of(torch.ones(3, 4))], stored, CPU)
            assert torch.get_num_threads() == 2
            monkeypatch.setattr(decomposing, "form_delta", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                measure([pair_of(torch.ones(3, 4))], stored, CPU)
            assert torch.get_num_threads() == 2
        finally:
            torch.set_num_threads(before)


class TestWorkspace:
    def test_memory_is_taken_once_for_all_that_fits_in_it(self) -> None:
        workspace = Workspace()
        large = workspace.take("delta", (10, 10), torch.float32, CPU)
        small = workspace.take("delta", (3, 5), torch.float32, CPU)
        assert (tuple(small.shape), small.data_ptr()) == ((3, 5), large.data_ptr())
        larger = workspace.take("delta", (20, 10), torch.float32, CPU)
        assert tuple(larger.shape) == (20, 10)

    def test_another_name_and_another_dtype_are_other_memory(self) -> None:
        workspace = Workspace()
        taken = [
            workspace.take(name, (10,), dtype, CPU)
            for name, dtype in (("a", torch.float32), ("b", torch.float32), ("a", torch.bfloat16))
        ]
        assert len({tensor.data_ptr() for tensor in taken}) == 3

    def test_nothing_and_a_scalar_have_their_shapes(self) -> None:
        workspace = Workspace()
        assert workspace.take("a", (0, 4), torch.float32, CPU).shape == (0, 4)
        assert workspace.take("a", (), torch.float32, CPU).shape == ()

    def test_clearing_gives_all_back(self) -> None:
        workspace = Workspace()
        workspace.take("a", (10,), torch.float32, CPU)
        workspace.clear()
        assert not workspace._buffers
