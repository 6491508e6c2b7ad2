"""One task end to end, without an engine: read a block's pairs, factorise, put the part. The unit of work.

A `Worker` is the same object in a plain loop and inside a Ray actor. It reads the next task's bytes while it computes
the current one; that is a hint, and changes no result.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from phlora_pipeline import lowrank, parts, storage
from phlora_pipeline.checkpoint import read_tensors
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import BLOCK_BYTES, Task, TensorPair

PREFETCH_BYTES = 2 * BLOCK_BYTES
"""A next task larger than this is not read ahead: memory before speed."""

_CPU_BATCH_BYTES = 64 << 20
"""ΔW that is given to the solver at once on a CPU, where LAPACK takes the matrices one by one anyway."""


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What crosses the engine when a task is done: no tensors, no rows.

    Attributes:
        block_id: which.
        tensors: how many it held.
        nbytes: tensor bytes read; 0 where the part was there already.
        seconds: wall time of the call.
        failed: names of tensors that failed.
        reused: whether the part was there already.
    """

    block_id: str
    tensors: int
    nbytes: int
    seconds: float
    failed: tuple[str, ...]
    reused: bool


class Worker:
    """Does tasks one after another on one device, with the next one's bytes on their way."""

    def __init__(self, device: str, threads: int) -> None:
        """Set up torch for this process.

        Args:
            device: `cpu`, `cuda` or `cuda:N`.
            threads: processor threads of torch; results are the same for the same number.

        Raises:
            DeviceError: the device is not there.
        """
        self.device = checked_device(device)
        torch.set_num_threads(threads)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="phlora-prefetch")
        self._ahead: tuple[str, Future[list[Tensor]]] | None = None

    def run(self, task: Task, prefetch: Task | None = None) -> TaskReport:
        """Do one task; a part that is there already is kept.

        Args:
            task: what to do.
            prefetch: the task that is likely to come next.

        Raises:
            SourceChangedError: a checkpoint was replaced since it was planned.
            CredentialsError, StorageError: as storage says. No part is written.
        """
        began = time.monotonic()
        reused = storage.stat(task.part_url) is not None
        if reused:
            found = tuple(parts.load(task.part_url).results.values())
            return _report(task, found, began, reused=True)
        stored = self._take(task)
        self._start_reading(prefetch)
        results, factors = compute(task, stored, self.device)
        parts.store(task.part_url, results, factors)
        return _report(task, results, began, reused=False)

    def _take(self, task: Task) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == task.part_url:
            return ahead[1].result()
        return _read(task)

    def _start_reading(self, task: Task | None) -> None:
        if task is not None and task.block.nbytes <= PREFETCH_BYTES:
            self._ahead = (task.part_url, self._reader.submit(_read, task))


def compute(
    task: Task, stored: list[Tensor], device: torch.device
) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The pure middle of a task: tensors in, results and factors out.

    Args:
        task: its block says what the tensors are.
        stored: base and fine-tuned tensor of each pair in turn, in their stored dtypes. The list is emptied on the
            way: a block's stored bytes are given back before the solver needs the room.
        device: where ΔW is formed and factorised.

    Returns:
        One result per pair, in the block's order, and the CPU factors of those that were factorised.
    """
    pairs = task.block.pairs
    delta = torch.empty(len(pairs), *task.block.shape, dtype=torch.float32, device=device)  # (b, …)
    sums = torch.stack([lowrank.form_delta(stored.pop(0), stored.pop(0), out) for out in delta])  # (b, 3)
    results = [_measured(*found) for found in zip(pairs, lowrank.to_host(sums), delta, strict=True)]
    if task.block.purpose == "measure":
        return results, {}
    wanted = [index for index, result in enumerate(results) if result.status == "measured"]
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in _batches(wanted, delta):
        found = lowrank.factorise(_gathered(delta, batch), task.max_rank, lowrank.SOLVERS[task.solver])
        residuals, values = lowrank.to_host(found.residual_sq), lowrank.to_host(found.singular_values)
        for row, index in enumerate(batch):
            results[index] = replace(
                results[index],
                status="factored",
                residual_sq=residuals[row],
                singular_values=tuple(values[row]),
                solver=task.solver,
            )
            factors[pairs[index].name] = (found.A[row].cpu(), found.B[row].cpu())
    return results, factors


def checked_device(device: str) -> torch.device:
    """`cpu`, or a CUDA device that is there; `auto` takes CUDA where there is one.

    Raises:
        DeviceError: it is not there, or has an unknown name.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise DeviceError(f"unknown device {device!r}", remedy="use cpu, cuda or cuda:N") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceError(
            f"device {device} is not there: torch sees {torch.cuda.device_count()} CUDA devices",
            remedy="use --device cpu, or install a CUDA build of torch",
        )
    if wanted.type not in {"cpu", "cuda"}:
        raise DeviceError(f"device {device} is not supported", remedy="use cpu, cuda or cuda:N")
    return wanted


def _read(task: Task) -> list[Tensor]:
    return read_tensors([ref for pair in task.block.pairs for ref in (pair.base, pair.tuned)])


def _measured(pair: TensorPair, sums: Sequence[float], delta: Tensor) -> TensorResult:
    base_sq, tuned_sq, delta_sq = sums
    if not math.isfinite(delta_sq):
        return TensorResult(pair.name, "failed", reason=_nonfinite(base_sq, tuned_sq, delta))
    return TensorResult(
        pair.name, "measured" if delta_sq else "unchanged", base_sq=base_sq, tuned_sq=tuned_sq, delta_sq=delta_sq
    )


def _nonfinite(base_sq: float, tuned_sq: float, delta: Tensor) -> str:
    sides = [side for side, norm_sq in (("base", base_sq), ("fine-tune", tuned_sq)) if not math.isfinite(norm_sq)]
    count, index = lowrank.first_nonfinite(delta) or (0, ())
    where = " and ".join(sides) or "difference (both sides are finite)"
    return f"{count} of {delta.numel()} entries of the {where} are NaN or infinite, the first at index {list(index)}"


def _batches(indices: Sequence[int], delta: Tensor) -> list[Sequence[int]]:
    """Indices in batches that the solver takes at once: all on a GPU, a few on a CPU. No result depends on it."""
    each = len(indices) if delta.is_cuda else max(1, _CPU_BATCH_BYTES // (4 * delta[0].numel()))
    return [indices[start : start + each] for start in range(0, len(indices), max(each, 1))]


def _gathered(delta: Tensor, batch: Sequence[int]) -> Tensor:
    """Rows of the stack, as a view where they are neighbours: a copy would double the largest tensor."""
    if list(batch) == list(range(batch[0], batch[0] + len(batch))):
        return delta[batch[0] : batch[0] + len(batch)]
    return delta[list(batch)]


def _report(task: Task, results: Sequence[TensorResult], began: float, *, reused: bool) -> TaskReport:
    failed = tuple(result.name for result in results if result.status == "failed")
    nbytes = 0 if reused else task.block.nbytes
    return TaskReport(task.block.id, len(task.block.pairs), nbytes, time.monotonic() - began, failed, reused)
