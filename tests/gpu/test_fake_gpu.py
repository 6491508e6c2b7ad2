"""The unit of work on a GPU that is not there: PyTorch's fake tensors know devices, dtypes and shapes, and no values.

What a machine without CUDA can find out: that nothing is multiplied across devices, that no step falls back to the CPU,
that nothing as large as a weight comes back before it is asked for, and that the factors do.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from phlora_pipeline import extract, lowrank
from phlora_pipeline.checkpoint import TORCH_DTYPES, TensorRef
from phlora_pipeline.lowrank import beside, checks, full, noise, operator, panels, small
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import Block, Member, Purpose, Task, TensorPair

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
PROFILES = {
    name: replace(lowrank.PROFILES[name], name=f"fake {name}")  # of one's own: kept, whatever device there is
    for name in ("sm90", "other")
}
RANK = 8


def fake_task(
    purpose: Purpose, shape: tuple[int, ...], *, dtypes: tuple[str, str] = ("BF16", "BF16"), count: int = 3, profile: str = "sm90",
    max_rank: int = RANK, **wanted: Any
) -> Task:  # fmt: skip
    def ref(number: int, dtype: str) -> TensorRef:
        return TensorRef(f"layers.{number}.weight", dtype, shape, "/nowhere", 0, 0, "")

    pairs = [
        TensorPair(f"layers.{number}", "linear", *(ref(number, dtype) for dtype in dtypes)) for number in range(count)
    ]
    settings = lowrank.Settings(max_rank, **wanted)
    return Task((Member("", Block("block", purpose, tuple(pairs)), "/nowhere", settings),), PROFILES[profile])


def stored(task: Task) -> list[Tensor]:
    """As `read_tensors` gives them: on the CPU, in their stored dtypes, base and fine-tune in turn."""
    refs = [ref for pair in task.block.pairs for ref in (pair.base, pair.tuned)]
    return [torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype]) for ref in refs]


def computed(task: Task, given: list[Tensor]) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The task's only member, on the device that is not there."""
    return extract.compute(task.members[0], task.profile, given[::2], given[1::2], CUDA)


def ones_like(shape: torch.Size) -> Any:
    """What `to_host` gives, in its form."""
    return [ones_like(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class Here(Executor):
    """No other thread: a mode is its own thread's."""

    def submit(self, call: Any, /, *given: Any, **named: Any) -> Any:
        found: Future[Any] = Future()
        found.set_result(call(*given, **named))
        return found


class Undrawn:
    """A generator of a device that is not there: none."""

    def manual_seed(self, seed: int) -> None:
        assert 0 <= seed < 2**63


class ByOtherNames(TorchFunctionMode):
    """`x[…]`, `contiguous` and `copy_` by other operators: a CPU build's own ask for CUDA's runtime, even of a fake tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else args[0].clone(memory_format=torch.contiguous_format)
        if func is Tensor.copy_ and args[0].device.type == "cuda":
            return torch.add(args[1].to(args[0].device, args[0].dtype), 0, out=args[0])
        if func is not Tensor.__getitem__:
            return func(*args, **(kwargs or {}))
        found, wanted = args
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        if wanted[0] is Ellipsis:
            wanted = (slice(None),) * (found.ndim - len(wanted) + 1) + wanted[1:]
        dim = 0
        for index in wanted:
            if isinstance(index, int):
                found = found.select(dim, index)
                continue
            if isinstance(index, slice):
                start, stop, step = index.indices(found.shape[dim])
                assert step == 1
                found = found.narrow(dim, start, max(stop - start, 0))
            else:
                found = found.index_select(dim, torch.tensor(index, device=found.device))
            dim += 1
        return found


class Traffic(TorchDispatchMode):
    """Every operation whose result is on the CPU, and every copy that crosses over.

    Attributes:
        here: (operator, shape) of what was computed on the CPU; views are none.
        there: (dtype of the source, dtype of the copy, shape) of what went to the GPU.
        back: (operator, shape) of what came from it.
        unawaited: shapes of what came from it, and may be read here before it is there.
    """

    def __init__(self) -> None:
        super().__init__()
        self.here: list[tuple[str, tuple[int, ...]]] = []
        self.there: list[tuple[torch.dtype, torch.dtype, tuple[int, ...]]] = []
        self.back: list[tuple[str, tuple[int, ...]]] = []
        self.unawaited: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        for result in (each for each in tree_leaves(found) if isinstance(each, Tensor)):
            shape = tuple(result.shape)
            if result.device.type == "cpu":
                if not func.is_view:
                    self.here.append((str(func), shape))
                if any(each.device.type == "cuda" for each in given):
                    self.back.append((str(func), shape))
                    self.unawaited += [shape] * bool((kwargs or {}).get("non_blocking"))
            elif result.device.type == "cuda":
                self.there += [
                    (each.dtype, result.dtype, shape) for each in given if each.device.type == "cpu" and each.ndim
                ]
        return found

    def largest_here(self) -> int:
        return max((torch.Size(shape).numel() for _, shape in self.here), default=0)


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """No tensor has values any more; gives the devices from which numbers were fetched. Checks are made, and believed."""
    fetched: list[torch.device] = []

    def to_host(tensor: Tensor) -> Any:
        fetched.append(tensor.device)
        return ones_like(tensor.shape)

    for name, module in list(sys.modules.items()):
        if name.startswith("phlora_pipeline.lowrank") and hasattr(module, "to_host"):
            monkeypatch.setattr(module, "to_host", to_host)
    for name in [name for name in vars(checks) if name.endswith("_problem")]:
        monkeypatch.setattr(checks, name, lambda *_: "")
    monkeypatch.setattr(
        noise, "to_host", lambda tensor: ones_like(tensor.shape)
    )  # its numbers are on the CPU, by intent
    monkeypatch.setattr(noise, "_SAMPLE", 64 * 256)  # toys are looked at as large weights are: never as a whole
    monkeypatch.setattr(beside, "_pool", lambda *_: Here())
    monkeypatch.setattr(panels, "_generator", lambda _: Undrawn())
    monkeypatch.setattr(extract, "_beside", lambda _, work, *given: partial(work, *given))  # modes are a thread's own
    monkeypatch.setattr(small, "_beside", lambda solve, symmetric: [solve(symmetric)])
    with FakeTensorMode(), ByOtherNames():
        yield fetched


def failing_drivers(monkeypatch: pytest.MonkeyPatch, count: int) -> list[tuple[str | None, torch.device, torch.dtype]]:
    """The first SVDs do not converge; gives driver, device and dtype of every call."""
    svd, calls = torch.linalg.svd, []

    def recording(A: Tensor, full_matrices: bool = True, *, driver: str | None = None) -> Any:
        calls.append((driver, A.device, A.dtype))
        if len(calls) <= count:
            raise torch.linalg.LinAlgError("did not converge")
        return svd(A, full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", recording)
    return calls


def assert_factors(task: Task, results: Any, factors: Any) -> None:
    d, k = task.block.shape
    q = min(task.members[0].settings.max_rank, d, k)
    assert [result.status for result in results] == ["factored"] * len(task.block.pairs)
    assert set(factors) == {pair.name for pair in task.block.pairs}
    for A, B in factors.values():
        assert (A.device.type, A.dtype, tuple(A.shape)) == ("cpu", torch.float32, (q, k))
        assert (B.device.type, B.dtype, tuple(B.shape)) == ("cpu", torch.float32, (d, q))


DTYPES = [("BF16", "BF16"), ("F32", "F16"), ("F16", "F64"), ("F32", "F32")]
WEIGHTS = [((400, 300), DTYPES[0]), ((300, 400), DTYPES[1]), ((5, 400), DTYPES[2]), ((1, 1), DTYPES[3])]


@pytest.mark.parametrize(("shape", "dtypes"), WEIGHTS)
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_the_whole_unit_of_work_stays_on_the_device(
    solver: Any, profile: str, shape: tuple[int, int], dtypes: tuple[str, str]
) -> None:
    task = fake_task("factor", shape, dtypes=dtypes, solver=solver, profile=profile)
    given = stored(task)
    with Traffic() as traffic:
        results, factors = computed(task, given)
    assert_factors(task, results, factors)
    (d, k), routes = shape, {result.solver.partition(" ")[0] for result in results}
    assert routes == {solver} if solver != "auto" and min(shape) > 160 else routes <= {"krylov", "gram", "exact"}
    if min(shape) > 160:
        # Random rows are drawn here, and Gram matrices of what was kept are looked at: no step is as large as a weight.
        assert traffic.largest_here() < d * k
        brought = [shape for _, shape in traffic.back if torch.Size(shape).numel() >= d * k / 4]
        assert brought == []


@pytest.mark.parametrize("sides", [(CUDA, CUDA), (CUDA, CPU), (CPU, CUDA)])
@pytest.mark.parametrize(
    ("purpose", "solver"), [*(("factor", solver) for solver in lowrank.SOLVERS), ("measure", "auto")]
)
def test_what_the_reader_has_brought_there_stays_there(
    purpose: Purpose, solver: Any, sides: tuple[torch.device, torch.device]
) -> None:
    """Both sides, where they fit beside what is computed; one, where there was no room for the other."""
    task = fake_task(purpose, (400, 300), solver=solver)
    given = [tensor.to(sides[number % 2]) for number, tensor in enumerate(stored(task))]
    with Traffic() as traffic:
        results, factors = computed(task, given)
    if purpose == "factor":
        assert_factors(task, results, factors)
    assert {result.status for result in results} == {"factored" if purpose == "factor" else "measured"}
    assert traffic.largest_here() < 400 * 300
    assert traffic.unawaited == []


@pytest.mark.parametrize("sides", [(CUDA, CUDA), (CUDA, CPU), (CPU, CUDA)])
def test_what_is_not_finite_is_looked_for_wherever_the_sides_are(sides: tuple[torch.device, torch.device]) -> None:
    """Each fetched number is 1: one entry, with one before it."""
    assert lowrank.first_nonfinite(*(torch.empty(4, 5, device=device) for device in sides)) == (1, (0, 1))


@pytest.mark.parametrize(("profile", "low"), [("sm90", torch.bfloat16), ("other", torch.float32)])
def test_krylov_looks_for_its_subspace_in_the_devices_low_precision(
    profile: str, low: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, torch.dtype, torch.device]] = []
    product = operator.product

    def recording(left: Tensor, right: Tensor) -> Tensor:
        if 300 in right.shape[1:] and 400 in right.shape[1:]:
            seen.append((left.dtype, right.dtype, right.device))
        return product(left, right)

    monkeypatch.setattr(operator, "product", recording)
    task = fake_task("factor", (400, 300), solver="krylov", profile=profile)
    assert_factors(task, *computed(task, stored(task)))
    assert {device for *_, device in seen} == {CUDA}
    assert {(left, right) for left, right, _ in seen} == {(low, low), (torch.float32, torch.float32)}
    low_ones = [left for left, *_ in seen].count(low)
    assert low_ones > len(seen) / 2


@pytest.mark.parametrize(("profile", "dtype"), [("sm90", torch.float64), ("other", torch.float32)])
def test_the_gram_matrix_is_of_float64_where_the_device_is_good_at_it(
    profile: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    eigh, seen = torch.linalg.eigh, []
    monkeypatch.setattr(torch.linalg, "eigh", lambda G: seen.append((G.dtype, G.device, tuple(G.shape))) or eigh(G))
    task = fake_task("factor", (400, 300), solver="gram", profile=profile)
    assert_factors(task, *computed(task, stored(task)))
    assert seen[0] == (dtype, CUDA, (3, 300, 300))


@pytest.mark.parametrize(("failures", "route"), [(0, "exact gesvda"), (1, "exact gesvd"), (2, "exact"), (3, "gram")])
@pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
def test_drivers_are_tried_in_turn_and_the_processor_last(
    shape: tuple[int, int], failures: int, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = failing_drivers(monkeypatch, failures)
    task = fake_task("factor", shape, solver="exact", count=1)
    results, factors = computed(task, stored(task))
    assert_factors(task, results, factors)
    assert {result.solver for result in results} == {route}
    assert all(len(result.notes) == failures for result in results)
    ladder = [("gesvda", CUDA, torch.float32), ("gesvd", CUDA, torch.float32), (None, CPU, torch.float64)]
    assert calls == ladder[: failures + 1]


def test_where_the_first_driver_refuses_auto_takes_the_gram_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing_drivers(monkeypatch, 1)
    task = fake_task("factor", (400, 300), count=1)
    results, factors = computed(task, stored(task))
    assert_factors(task, results, factors)
    assert [result.solver for result in results] == ["gram"]
    assert [driver for driver, *_ in calls] == ["gesvda"]


def test_a_batch_that_is_refused_for_the_sake_of_one_is_done_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = failing_drivers(monkeypatch, 2)  # all three, and then the first alone
    task = fake_task("factor", (400, 300), solver="exact")
    results, factors = computed(task, stored(task))
    assert_factors(task, results, factors)
    assert [result.solver for result in results] == ["exact gesvd", "exact gesvda", "exact gesvda"]
    assert [len(result.notes) for result in results] == [1, 0, 0]
    assert [driver for driver, *_ in calls] == ["gesvda"] * 4 + ["gesvd"]


def test_a_tolerance_that_is_not_met_widens_the_basis_and_then_takes_all(monkeypatch: pytest.MonkeyPatch) -> None:
    task = fake_task("factor", (400, 500), solver="krylov", tolerance=1e-12)
    results, factors = computed(task, stored(task))
    assert_factors(task, results, factors)
    widths = [note.partition(":")[0] for note in results[0].notes]
    assert len(widths) > 1
    assert all(width.startswith("krylov ") for width in widths)
    assert {result.solver.partition(" ")[0] for result in results} <= {"gram", "exact"}


def test_a_threshold_of_energy_stays_there_too() -> None:
    """Each fetched energy is 1 of a norm of 1: one triplet is enough."""
    task = fake_task("factor", (400, 500), solver="krylov", energy=0.9, max_rank=64)
    results, factors = computed(task, stored(task))
    assert [result.status for result in results] == ["factored"] * 3
    assert {tuple(A.shape) for A, _ in factors.values()} == {(1, 500)}


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
@pytest.mark.parametrize("dtypes", DTYPES[:2])
def test_what_goes_to_the_device_goes_as_it_is_stored(solver: Any, dtypes: tuple[str, str]) -> None:
    """Half of the bytes to move, and no conversion on the processor: ΔW is formed over there."""
    task = fake_task("factor", (400, 300), dtypes=dtypes, solver=solver)
    given = stored(task)
    with Traffic() as traffic:
        computed(task, given)
    # But for the few entries that are left of runs.
    weights = [(one, other) for one, other, shape in traffic.there if torch.Size(shape).numel() >= 400 * 299]
    assert len(weights) == 6
    assert all(one == other for one, other in weights)
    assert {one for one, _ in weights} == {TORCH_DTYPES[dtype] for dtype in dtypes}


def answering(monkeypatch: pytest.MonkeyPatch, *answers: Any) -> None:
    """The first numbers that are fetched for ΔW are these; the others are ones, and all is true."""
    waiting = iter(answers)

    def answered(tensor: Tensor, others: Any) -> Any:
        return (None if tensor.dtype == torch.bool else next(waiting, None)) or others(tensor)

    for name, module in list(sys.modules.items()):
        if name.startswith("phlora_pipeline.lowrank") and hasattr(module, "to_host") and not name.endswith(".noise"):
            others = module.to_host
            monkeypatch.setattr(module, "to_host", partial(answered, others=others))


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
@pytest.mark.parametrize("profile", PROFILES)
def test_tensors_between_which_one_is_unchanged_are_gathered_on_the_device(
    profile: str, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    answering(monkeypatch, [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    task = fake_task("factor", (400, 300), dtypes=("F32", "F32"), solver=solver, profile=profile)
    results, factors = computed(task, stored(task))
    assert [result.status for result in results] == ["factored", "unchanged", "factored"]
    assert set(factors) == {"layers.0.weight", "layers.2.weight"}


@pytest.mark.parametrize("solver", lowrank.SOLVERS)
def test_tiny_and_huge_norms_are_scaled_on_the_device(solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, [[1.0, 1.0, 1e-60], [1.0, 1.0, 1e60], [1.0, 1.0, 1.0]])
    task = fake_task("factor", (400, 300), solver=solver)
    assert_factors(task, *computed(task, stored(task)))


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 4, 5)])
def test_measuring_takes_any_shape(shape: tuple[int, ...], fake: list[torch.device]) -> None:
    task = fake_task("measure", shape, dtypes=("BF16", "F32"), count=2)
    results, factors = computed(task, stored(task))
    assert [result.status for result in results] == ["measured"] * 2
    assert factors == {}
    assert set(fake) == {CUDA}


class TestMemory:
    """The ladder, as far as a machine without a GPU can climb it."""

    @pytest.fixture(autouse=True)
    def _no_runtime(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def full_from(self, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """A device that has room for fewer than so many matrices."""
        take = lowrank.Workspace.take

        def limited(self: Any, name: str, shape: tuple[int, ...], *what: Any) -> Tensor:
            if CUDA in what and shape[0] >= count:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return take(self, name, shape, *what)

        monkeypatch.setattr(lowrank.Workspace, "take", limited)

    @pytest.mark.parametrize("solver", lowrank.SOLVERS)
    def test_a_batch_is_halved_on_the_device(self, solver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full_from(2, monkeypatch)
        task = fake_task("factor", (400, 300), solver=solver)
        given = stored(task)
        with Traffic() as traffic:
            results, factors = computed(task, given)
        assert_factors(task, results, factors)
        assert all(result.notes[0] == "out of memory on cuda with 3 at once" for result in results)
        assert not any("processor" in note or "slice" in note for result in results for note in result.notes)
        assert traffic.largest_here() < 400 * 300

    @pytest.mark.parametrize("shape", [(400, 300), (300, 400)])
    @pytest.mark.parametrize("solver", lowrank.SOLVERS)
    def test_slices_are_formed_on_the_device(
        self, solver: Any, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.full_from(1, monkeypatch)
        monkeypatch.setattr(operator, "CHUNK", 12_000)
        task = fake_task("factor", shape, solver=solver, count=1)
        given = stored(task)
        with Traffic() as traffic:
            results, factors = computed(task, given)
        assert_factors(task, results, factors)
        assert results[0].notes[:2] == ("out of memory on cuda with 1 at once", "formed slice by slice")
        assert traffic.largest_here() < 400 * 300

    @pytest.mark.parametrize("resident", [True, False])
    @pytest.mark.parametrize("side", [CPU, CUDA])
    def test_the_processor_is_last_and_says_so(
        self, side: torch.device, resident: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Whole or slice by slice; what has to come back for it is waited for."""
        self.full_from(1, monkeypatch)
        monkeypatch.setattr(lowrank.routes, "RESIDENT_BYTES", 4 * 400 * 300 * resident)
        sums = operator.Blocked.sums

        def nowhere(self: Any) -> Tensor:
            if self.device == CUDA:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return sums(self)

        monkeypatch.setattr(operator.Blocked, "sums", nowhere)
        monkeypatch.setattr(
            lowrank.delta, "_form_cached", lambda *_: torch.ones(3, dtype=torch.float64)
        )  # it looks at values
        task = fake_task("factor", (400, 300), count=2)
        given = [tensor.to(side) for tensor in stored(task)]
        with Traffic() as traffic:
            results, factors = computed(task, given)
        assert_factors(task, results, factors)
        assert all("done on the processor" in result.notes for result in results)
        assert traffic.unawaited == []


def left_on_the_cpu(base: Tensor, tuned: Tensor, out: Tensor, *_: object) -> Tensor:
    torch.sub(tuned, base, out=out)
    return torch.zeros(3, dtype=torch.float64, device=out.device)


def drawn_and_left_there(names: Any, _purpose: str, rows: int, columns: int, _device: torch.device) -> Tensor:
    return torch.randn(len(names), rows, columns)


def made_on_the_cpu(panel: Tensor) -> Tensor:
    """As in mergekit's extract_lora: `torch.eye(rank)` beside a GPU's U."""
    return torch.eye(panel.shape[1]) @ panel


def brought_back(*arguments: Any, original: Any = full.exact) -> Any:
    found, *others = original(*arguments)
    return replace(found, long=found.long.cpu()), *others


@pytest.mark.parametrize(
    ("where", "name", "mutant", "solver"),
    [
        ("decompose", "form_delta", left_on_the_cpu, "krylov"),
        ("decompose", "form_delta", left_on_the_cpu, "exact"),
        ("krylov", "gaussian", drawn_and_left_there, "krylov"),
        ("certificate", "gaussian", drawn_and_left_there, "krylov"),
        ("solve", "gaussian", drawn_and_left_there, "exact"),
        ("solve", "gaussian", drawn_and_left_there, "gram"),
        ("krylov", "orthonormal", made_on_the_cpu, "krylov"),
        ("full", "exact", brought_back, "exact"),
    ],
)
def test_a_wrong_device_is_caught(
    where: str, name: str, mutant: Any, solver: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: each of these would pass on a CPU."""
    monkeypatch.setattr(sys.modules[f"phlora_pipeline.lowrank.{where}"], name, mutant)
    task = fake_task("factor", (400, 300), dtypes=("F32", "F32"), count=2, solver=solver)
    with pytest.raises(RuntimeError, match=r"Expected all tensors to be on the same device|found (two|at least two)"):
        computed(task, stored(task))


def test_a_step_that_is_done_on_the_processor_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """No error tells of it: the result is right, and the GPU waits."""
    gram = operator.Dense.gram
    monkeypatch.setattr(operator.Dense, "gram", lambda self, dtype: gram(operator.Dense(self.dense().cpu(), torch.float32), dtype).to(CUDA))  # fmt: skip
    task = fake_task("factor", (400, 300), solver="gram")
    given = stored(task)
    with Traffic() as traffic:
        assert_factors(task, *computed(task, given))
    assert traffic.largest_here() >= 400 * 300
    assert any(torch.Size(shape).numel() >= 400 * 300 for _, shape in traffic.back)
