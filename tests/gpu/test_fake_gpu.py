"""The unit of work on a GPU that is not there: PyTorch's fake tensors know devices, dtypes and shapes, and no values.

What a machine without CUDA can find out: that nothing is multiplied across devices, that no step falls back to the CPU,
and that the factors come back to it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from phlora_pipeline import extract, lowrank
from phlora_pipeline.checkpoint import TORCH_DTYPES, TensorRef
from phlora_pipeline.plan import Block, Purpose, Task, TensorPair

CUDA = torch.device("cuda", 0)


def fake_task(purpose: Purpose, shape: tuple[int, ...], *, dtypes: tuple[str, str], count: int, max_rank: int) -> Task:
    def ref(number: int, dtype: str) -> TensorRef:
        return TensorRef(f"layers.{number}.weight", dtype, shape, "/nowhere", 0, 0, "")

    pairs = [
        TensorPair(f"layers.{number}", "linear", *(ref(number, dtype) for dtype in dtypes)) for number in range(count)
    ]
    return Task(Block("block", purpose, tuple(pairs)), "/nowhere", max_rank, "exact")


def stored(task: Task) -> list[Tensor]:
    """As `read_tensors` gives them: on the CPU, in their stored dtypes, base and fine-tune in turn."""
    refs = [ref for pair in task.block.pairs for ref in (pair.base, pair.tuned)]
    return [torch.empty(ref.shape, dtype=TORCH_DTYPES[ref.dtype]) for ref in refs]


def ones_like(shape: torch.Size) -> Any:
    """What `to_host` gives, in its form."""
    return [ones_like(shape[1:]) for _ in range(shape[0])] if shape else 1.0


class IndexByName(TorchFunctionMode):
    """`x[…]` by the operators of that name: a CPU build's own indexing asks for CUDA's runtime even of a fake tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
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
                found = found.narrow(dim, start, stop - start)
            else:
                found = found.index_select(dim, torch.tensor(index, device=found.device))
            dim += 1
        return found


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """No tensor has values any more; gives the devices from which numbers were fetched."""
    fetched: list[torch.device] = []

    def to_host(tensor: Tensor) -> Any:
        fetched.append(tensor.device)
        return ones_like(tensor.shape)

    monkeypatch.setattr(lowrank, "to_host", to_host)
    with FakeTensorMode(), IndexByName():
        yield fetched


@pytest.mark.parametrize("dtypes", [("BF16", "BF16"), ("F32", "F16"), ("F16", "F64"), ("F32", "F32")])
@pytest.mark.parametrize(("shape", "max_rank"), [((64, 48), 8), ((48, 64), 8), ((5, 40), 8), ((3000, 2000), 64)])
def test_the_whole_unit_of_work_stays_on_the_device(
    shape: tuple[int, int], max_rank: int, dtypes: tuple[str, str], fake: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    solved: list[Tensor] = []

    def recording(delta: Tensor, rank: int) -> lowrank.Svd:
        solved.append(delta)
        return lowrank.exact(delta, rank)

    monkeypatch.setitem(lowrank.SOLVERS, "exact", recording)
    task = fake_task("factor", shape, dtypes=dtypes, count=3, max_rank=max_rank)
    results, factors = extract.compute(task, stored(task), CUDA)
    (d, k), q = shape, min(max_rank, *shape)
    assert [(tuple(delta.shape), delta.dtype, delta.device) for delta in solved] == [((3, d, k), torch.float32, CUDA)]
    assert set(fake) == {CUDA}
    assert [result.status for result in results] == ["factored"] * 3
    assert set(factors) == {pair.name for pair in task.block.pairs}
    for A, B in factors.values():
        assert (A.device.type, A.dtype, tuple(A.shape)) == ("cpu", torch.float32, (q, k))
        assert (B.device.type, B.dtype, tuple(B.shape)) == ("cpu", torch.float32, (d, q))


def test_tensors_between_which_one_is_unchanged_are_gathered_on_the_device(
    fake: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    sums = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]
    to_host, answers = lowrank.to_host, iter([sums])
    monkeypatch.setattr(lowrank, "to_host", lambda tensor: next(answers, None) or to_host(tensor))
    task = fake_task("factor", (64, 48), dtypes=("F32", "F32"), count=3, max_rank=8)
    results, factors = extract.compute(task, stored(task), CUDA)
    assert [result.status for result in results] == ["factored", "unchanged", "factored"]
    assert set(factors) == {"layers.0.weight", "layers.2.weight"}


@pytest.mark.parametrize("shape", [(), (7,), (4, 5), (2, 3, 4, 5)])
def test_measuring_takes_any_shape(shape: tuple[int, ...], fake: list[torch.device]) -> None:
    task = fake_task("measure", shape, dtypes=("BF16", "F32"), count=2, max_rank=8)
    results, factors = extract.compute(task, stored(task), CUDA)
    assert [result.status for result in results] == ["measured"] * 2
    assert factors == {}
    assert fake == [CUDA]


def left_on_the_cpu(base: Tensor, tuned: Tensor, out: Tensor) -> Tensor:
    torch.sub(tuned, base, out=out)
    return torch.zeros(3, dtype=torch.float64, device=out.device)


def brought_back(delta: Tensor, rank: int) -> lowrank.Svd:
    found = lowrank.exact(delta, rank)
    return lowrank.Svd(found.U, found.S.cpu(), found.Vh)


def made_on_the_cpu(delta: Tensor, rank: int) -> lowrank.Svd:
    """As in mergekit's extract_lora: `torch.eye(rank)` beside a GPU's U."""
    found = lowrank.exact(delta, rank)
    return lowrank.Svd(found.U @ torch.eye(found.U.shape[-1]), found.S, found.Vh)


@pytest.mark.parametrize(
    ("where", "name", "mutant"),
    [
        (lowrank.__dict__, "form_delta", left_on_the_cpu),
        (lowrank.SOLVERS, "exact", brought_back),
        (lowrank.SOLVERS, "exact", made_on_the_cpu),
    ],
)
def test_a_wrong_device_is_caught(
    where: dict[str, object], name: str, mutant: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail: each of these would pass on a CPU."""
    monkeypatch.setitem(where, name, mutant)
    task = fake_task("factor", (64, 48), dtypes=("F32", "F32"), count=2, max_rank=8)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        extract.compute(task, stored(task), CUDA)
