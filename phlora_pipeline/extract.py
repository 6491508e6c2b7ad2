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
from phlora_pipeline.machine import has_bfloat16_units
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import BLOCK_BYTES, Task, TensorPair

STREAMED_BYTES = 64 << 20
"""A block that is only measured, and is larger than this, is read and measured piece by piece."""

PIECE = 8 << 20
"""Entries of such a piece."""

PREFETCH_BYTES = 2 * BLOCK_BYTES
"""A next task larger than this is not read ahead: memory before speed."""


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
        self._workspaces: list[lowrank.Workspace] = []
        on_gpu = self.device.type == "cuda"
        self._copies = torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]
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
        if _is_streamed(task):
            results, factors = [self._streamed(pair) for pair in task.block.pairs], dict[str, tuple[Tensor, Tensor]]()
        else:
            stored = self._take(task)
            self._start_reading(prefetch)
            results, factors = compute(task, stored, self.device, self._workspaces)
        parts.store(task.part_url, results, factors)
        return _report(task, results, began, reused=False)

    def _take(self, task: Task) -> list[Tensor]:
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == task.part_url:
            return ahead[1].result()
        return self._read(task)

    def _start_reading(self, task: Task | None) -> None:
        if task is not None and task.block.nbytes <= PREFETCH_BYTES and not _is_streamed(task):
            self._ahead = (task.part_url, self._reader.submit(self._read, task))

    def _read(self, task: Task) -> list[Tensor]:
        """A task's tensors: in the processor's memory, or on a GPU already, where they fit beside what is computed there."""
        stored = _read(task)
        if self._copies is None:
            return stored
        try:
            return _on_device(stored, self.device, self._copies)
        except torch.OutOfMemoryError:
            return stored  # they go there one by one, when their turn comes

    def _streamed(self, pair: TensorPair) -> TensorResult:
        """Norms of a pair that is not held as a whole: one piece is measured while the next one is read."""
        pieces = [
            (pair.base.entries(start, start + PIECE), pair.tuned.entries(start, start + PIECE))
            for start in range(0, pair.numel, PIECE)
        ]
        found, ahead = [], self._reader.submit(read_tensors, pieces[0])
        for following in [*pieces[1:], None]:
            base, tuned = ahead.result()
            if following:
                ahead = self._reader.submit(read_tensors, following)
            found += lowrank.measure([(base, tuned)], self.device)
        return _result(pair, _joined(found, pair.shape))


def compute(
    task: Task, stored: list[Tensor], device: torch.device, workspaces: list[lowrank.Workspace] | None = None
) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The pure middle of a task: tensors in, results and factors out.

    Args:
        task: its block says what the tensors are.
        stored: base and fine-tuned tensor of each pair in turn, in their stored dtypes. Emptied on the way: a pair's
            bytes are given back as soon as it is done.
        device: where ΔW is formed and factorised.
        workspaces: buffers that an earlier call has left.

    Returns:
        One result per pair, in the block's order, and the CPU factors of those that were factorised.
    """
    sides = list(zip(stored[::2], stored[1::2], strict=True))
    stored.clear()
    if task.block.purpose == "measure":
        outcomes = lowrank.measure(sides, device)
    else:
        names = [pair.name for pair in task.block.pairs]
        profile = task.profile if task.profile.name not in lowrank.PROFILES else profile_of(device)
        outcomes = lowrank.decompose(sides, names, task.settings, profile, device, workspaces)
    results = [_result(*found) for found in zip(task.block.pairs, outcomes, strict=True)]
    factors = {
        pair.name: (found.factors.A.cpu(), found.factors.B.cpu())
        for pair, found in zip(task.block.pairs, outcomes, strict=True)
        if found.factors
    }
    return results, factors


def _joined(found: Sequence[lowrank.Outcome], shape: tuple[int, ...]) -> lowrank.Outcome:
    """The outcome of a whole tensor from those of its pieces of `PIECE` entries."""
    count, first = 0, 0
    for number, piece in enumerate(found):
        if piece.nonfinite:
            first = first if count else number * PIECE + piece.nonfinite[1][0]
            count += piece.nonfinite[0]
    return lowrank.Outcome(
        sum(piece.base_sq for piece in found),
        sum(piece.tuned_sq for piece in found),
        sum(piece.delta_sq for piece in found),
        (count, lowrank.unravelled(first, shape)) if count else None,
    )


def profile_of(device: torch.device) -> lowrank.Profile:
    """The committed rates of this kind of device."""
    if device.type == "cpu":
        return lowrank.PROFILES["cpu-bf16" if has_bfloat16_units() else "cpu"]
    major, minor = torch.cuda.get_device_capability(device)
    return lowrank.PROFILES.get(f"sm{major}{minor}", lowrank.PROFILES["other"])


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


def _is_streamed(task: Task) -> bool:
    return task.block.purpose == "measure" and task.block.nbytes > STREAMED_BYTES


def _on_device(stored: list[Tensor], device: torch.device, copies: torch.cuda.Stream) -> list[Tensor]:
    """Copied from pinned memory on a stream of their own, while the device computes on another."""
    with torch.cuda.stream(copies):
        moved = [tensor.pin_memory().to(device, non_blocking=True) for tensor in stored]
    copies.synchronize()
    for tensor in moved:
        tensor.record_stream(
            torch.cuda.default_stream(device)
        )  # their memory is not given out again before it has read them
    return moved


def _read(task: Task) -> list[Tensor]:
    return read_tensors([ref for pair in task.block.pairs for ref in (pair.base, pair.tuned)])


def _result(pair: TensorPair, found: lowrank.Outcome) -> TensorResult:
    if not math.isfinite(found.delta_sq):
        return TensorResult(pair.name, "failed", reason=_nonfinite(found, pair))
    if found.failure:
        return TensorResult(pair.name, "failed", reason=found.failure)
    norms = TensorResult(
        pair.name, "measured" if found.delta_sq else "unchanged",
        base_sq=found.base_sq, tuned_sq=found.tuned_sq, delta_sq=found.delta_sq,
    )  # fmt: skip
    if found.factors is None:
        return norms
    return replace(
        norms,
        status="factored",
        residual_sq=found.factors.residual_sq,
        singular_values=found.factors.singular_values,
        solver=found.factors.solver,
        certificate=found.factors.certificate,
        notes=found.factors.notes,
    )


def _nonfinite(found: lowrank.Outcome, pair: TensorPair) -> str:
    norms = (("base", found.base_sq), ("fine-tune", found.tuned_sq))
    wrong = [side for side, norm_sq in norms if not math.isfinite(norm_sq)]
    count, index = found.nonfinite or (0, ())
    where = " and ".join(wrong) or "difference (both sides are finite)"
    return f"{count} of {pair.numel} entries of the {where} are NaN or infinite, the first at index {list(index)}"


def _report(task: Task, results: Sequence[TensorResult], began: float, *, reused: bool) -> TaskReport:
    failed = tuple(result.name for result in results if result.status == "failed")
    nbytes = 0 if reused else task.block.nbytes
    return TaskReport(task.block.id, len(task.block.pairs), nbytes, time.monotonic() - began, failed, reused)
