"""One task end to end, without an engine: read a block's pairs, factorise, put the part. The unit of work.

A `Worker` is the same object in a plain loop and inside a Ray actor. It reads the next task's bytes while it computes
the current one; that is a hint, and changes no result.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from phlora_pipeline import lowrank, parts
from phlora_pipeline.checkpoint import TensorRef
from phlora_pipeline.errors import CheckpointError, DeviceError, NotFoundError, PhloraError, SourceChangedError
from phlora_pipeline.machine import has_bfloat16_units
from phlora_pipeline.metrics import note_kind
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import BLOCK_BYTES, Member, Task, TensorPair
from phlora_pipeline.reading import Reader
from phlora_pipeline.storage import Traffic, take_traffic
from phlora_pipeline.tensors import TORCH_DTYPES

STREAMED_BYTES = 64 << 20
"""A block that is only measured, and is larger than this, is read and measured piece by piece."""

PIECE = 8 << 20
"""Entries of such a piece."""

PREFETCH_BYTES = BLOCK_BYTES + BLOCK_BYTES // 8
"""One side of a block that is larger, in float32 with its scales, is not read ahead: memory before speed."""

PINNED_BYTES = 1 << 29
"""The same where it is on a GPU soon: one such, and the next, in memory that is used again. Those of a Llama of 70B fit."""

Found = TypeVar("Found")

_OF_A_SOURCE = (SourceChangedError, NotFoundError)
"""A checkpoint is not what it was when it was planned."""

_NAME = f"{socket.gethostname()}:{os.getpid()}"


@dataclass(frozen=True, slots=True)
class BlockReport:
    """What became of one member of a task.

    Attributes:
        model: its id in a zoo.
        part_url: which.
        tensors: how many its block holds.
        failed: names of tensors that failed.
        reused: whether the part was there already.
        error: why there is no part that can be used: the checkpoint is not what it was when it was planned, or the part is damaged.
        routes: solver → how many tensors it was.
        second_tries: what else was tried, as of `metrics.note_kind` → how often.
    """

    model: str
    part_url: str
    tensors: int
    failed: tuple[str, ...] = ()
    reused: bool = False
    error: PhloraError | None = None
    routes: tuple[tuple[str, int], ...] = ()
    second_tries: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class TaskReport:
    """What crosses the engine when a task is done: no tensors, no rows.

    Attributes:
        task: its id.
        blocks: one for each member.
        nbytes: tensor bytes read.
        seconds: wall time of the call.
        waited: seconds of it that the device waited for bytes.
        worker: host, process and device.
        traffic: of its process with storage since its last task.
    """

    task: str
    blocks: tuple[BlockReport, ...]
    nbytes: int
    seconds: float
    waited: float = 0.0
    worker: str = ""
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def tensors(self) -> int:
        """How many its blocks hold."""
        return sum(block.tensors for block in self.blocks)

    @property
    def failed(self) -> tuple[str, ...]:
        """Names of tensors that failed."""
        return tuple(name for block in self.blocks for name in block.failed)

    @property
    def reused(self) -> bool:
        """Whether all parts were there already."""
        return all(block.reused for block in self.blocks)


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
        self._reader = Reader(self.device, PREFETCH_BYTES if self.device.type == "cpu" else PINNED_BYTES)
        self._workspaces: list[lowrank.Workspace] = []

    def run(self, task: Task, prefetch: Task | None = None) -> TaskReport:
        """Do one task, model after model; a part that is there already is kept.

        Args:
            task: what to do.
            prefetch: the task that is likely to come next.

        Raises:
            CredentialsError, StorageError: as storage says. A checkpoint that is no longer what it was, or a part that is
                damaged, is an error of that model's alone, in the report.
        """
        began, done = time.monotonic(), dict[str, BlockReport]()
        for member in task.members:
            try:
                standing = parts.load(member.part_url).results.values()
            except NotFoundError:  # also where another run has published, and removed it just now
                continue
            except CheckpointError as error:  # damaged: this model's trouble, and of no other that the task has
                done[member.part_url] = _gone(member, error)
            else:
                done[member.part_url] = _report(member, list(standing), reused=True)
        pending = [member for member in task.members if member.part_url not in done]
        waited, nbytes = self._reader.waited, 0
        if pending and _is_streamed(task):
            nbytes = self._streamed(pending, done)
        elif pending:
            nbytes = self._resident(task, pending, prefetch, done)
        blocks = tuple(done[member.part_url] for member in task.members)
        return TaskReport(
            task.id,
            blocks,
            nbytes,
            time.monotonic() - began,
            self._reader.waited - waited,
            f"{_NAME} {self.device}",
            take_traffic(),
        )

    def _resident(
        self, task: Task, pending: Sequence[Member], prefetch: Task | None, done: dict[str, BlockReport]
    ) -> int:
        """Factors, or norms, of whole blocks. Returns bytes read."""
        hint = []
        if prefetch is not None and not _is_streamed(prefetch):
            hint = [_base(prefetch.members[0]), _tuned(prefetch.members[0])]
        nbytes = task.base_bytes
        tunes = [_tuned(member) for member in pending]
        for number, base, tuned, following in self._sides(_base(pending[0]), tunes, hint):
            member = pending[number]
            if isinstance(tuned, PhloraError):
                done[member.part_url] = _gone(member, tuned)
                continue
            nbytes += member.tuned_bytes
            formed = None
            if self.device.type == "cpu" and task.block.purpose == "factor":
                over = [tuned] if number + 1 < len(pending) else [base, tuned]
                formed = partial(self._read_in_place, over, following)
            else:
                self._reader.read_ahead(following)
            results, factors = compute(member, task.profile, base, tuned, self.device, self._workspaces, formed)
            parts.store(member.part_url, results, factors)
            done[member.part_url] = _report(member, results)
        return nbytes

    def _read_in_place(self, over: Sequence[list[Tensor]], following: Sequence[list[TensorRef]]) -> None:
        """What is likely to come next, where tensors were of which nothing is needed any more."""
        for tensors in over:
            self._reader.give_back(tensors)
        self._reader.read_ahead(following)

    def _streamed(self, pending: Sequence[Member], done: dict[str, BlockReport]) -> int:
        """Norms of tensors that are not held as a whole, piece after piece. Returns bytes read."""
        left, nbytes = list(pending), 0
        results: dict[str, list[TensorResult]] = {member.part_url: [] for member in pending}
        for row, pair in enumerate(pending[0].block.pairs):
            found: dict[str, list[lowrank.Outcome]] = {member.part_url: [] for member in left}
            noises: dict[str, list[lowrank.Noise]] = {member.part_url: [] for member in left}
            starts = range(0, pair.numel, PIECE)
            for start in starts:
                base = [pair.base.entries(start, start + PIECE)]
                after_it = () if start == starts[-1] else (pair.base, left[0].block.pairs[row].tuned)
                hint = [[side.entries(start + PIECE, start + 2 * PIECE)] for side in after_it]
                pieces = [[member.block.pairs[row].tuned.entries(start, start + PIECE)] for member in left]
                nbytes += base[0].nbytes
                for number, before, after, following in self._sides(base, pieces, hint):
                    self._reader.read_ahead(following)
                    member = left[number]
                    if isinstance(after, PhloraError):
                        done[member.part_url] = _gone(member, after)
                        continue
                    nbytes += pieces[number][0].nbytes
                    piece, stored = (before[0], after[0]), _stored(member.block.pairs[row])
                    seen, norms = lowrank.measure([piece], [stored], self.device)
                    noises[member.part_url] += seen
                    found[member.part_url] += norms
                left = [member for member in left if member.part_url not in done]
                if not left:
                    return nbytes
            for member in left:
                outcome = _joined(found[member.part_url], pair.shape)
                noise = _noise(noises[member.part_url], pair.numel)
                results[member.part_url].append(_result(member.block.pairs[row], outcome, noise))
        for member in left:
            parts.store(member.part_url, results[member.part_url], {})
            done[member.part_url] = _report(member, results[member.part_url])
        return nbytes

    def _sides(
        self, base: list[TensorRef], tuned: Sequence[list[TensorRef]], hint: Sequence[list[TensorRef]]
    ) -> Iterator[tuple[int, list[Tensor], list[Tensor] | PhloraError, Sequence[list[TensorRef]]]]:
        """The base's tensors, read once, beside those of one model after another, and what is likely to be taken next.

        A checkpoint that was replaced or removed comes as an error: one model's own, or of all that are left.
        """
        number = 0
        try:
            with self._reader.taken(base, tuned[:1]) as before:
                for number, refs in enumerate(tuned):
                    try:
                        with self._reader.taken(refs) as after:
                            yield number, before, after, tuned[number + 1 : number + 2] or hint
                    except _OF_A_SOURCE as error:
                        yield number, before, error, []
        except _OF_A_SOURCE as error:
            for left in range(number, len(tuned)):
                yield left, [], error, []


def compute(
    member: Member,
    profile: lowrank.Profile,
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    device: torch.device,
    workspaces: list[lowrank.Workspace] | None = None,
    formed: Callable[[], None] | None = None,
) -> tuple[list[TensorResult], dict[str, tuple[Tensor, Tensor]]]:
    """The pure middle of a task: tensors in, results and factors out.

    Args:
        member: its block says what the tensors are.
        profile: as planned; a built-in one gives way to that of the device at hand.
        base, tuned: the two tensors of each pair, as they were read.
        device: where ΔW is formed and factorised.
        workspaces: buffers that an earlier call has left.
        formed: as of `lowrank.decompose`.

    Returns:
        One result per pair, in the block's order, and the CPU factors of those that were factorised.
    """
    pairs, sides = member.block.pairs, list(zip(base, tuned, strict=True))
    stored = [_stored(pair) for pair in pairs]
    if member.block.purpose == "measure":
        looked, outcomes = lowrank.measure(sides, stored, device)
        return [_result(*found) for found in zip(pairs, outcomes, looked, strict=True)], {}
    noises = _beside(device, lowrank.rounding_noise, list(sides), stored)
    profile = profile if profile.name not in lowrank.PROFILES else profile_of(device)
    names = [pair.name for pair in pairs]
    outcomes = lowrank.decompose(sides, names, member.settings, profile, device, workspaces, formed)
    factors = {
        pair.name: (found.factors.A.cpu(), found.factors.B.cpu())
        for pair, found in zip(pairs, outcomes, strict=True)
        if found.factors
    }
    return [_result(*found) for found in zip(pairs, outcomes, noises(), strict=True)], factors


def _beside(device: torch.device, work: Callable[..., Found], *given: Any) -> Callable[[], Found]:
    """Done on the processor while a GPU is busy, or at once where there is none; gives what to call for the result."""
    if device.type == "cpu":
        found = work(*given)
        return lambda: found
    return _spare(os.getpid()).submit(work, *given).result


@cache
def _spare(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, f"phlora-beside-{process}", torch.set_num_threads, (1,))


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


def _noise(found: Sequence[lowrank.Noise], numel: int) -> lowrank.Noise:
    """The same of its rounding noise."""
    changed = sum(piece.changed * min(PIECE, numel - number * PIECE) for number, piece in enumerate(found))
    return lowrank.Noise(sum(piece.total_sq for piece in found), 0.0, changed / max(numel, 1))


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
    return task.block.purpose == "measure" and task.block.read_bytes > STREAMED_BYTES


def _base(member: Member) -> list[TensorRef]:
    return [pair.base for pair in member.block.pairs]


def _tuned(member: Member) -> list[TensorRef]:
    return [pair.tuned for pair in member.block.pairs]


def _stored(pair: TensorPair) -> tuple[torch.dtype, torch.dtype]:
    return TORCH_DTYPES[pair.base.dtype], TORCH_DTYPES[pair.tuned.dtype]


def _result(pair: TensorPair, found: lowrank.Outcome, noise: lowrank.Noise) -> TensorResult:
    if not math.isfinite(found.delta_sq):
        return TensorResult(pair.name, "failed", reason=_nonfinite(found, pair))
    if found.failure:
        return TensorResult(pair.name, "failed", reason=found.failure)
    norms = TensorResult(
        pair.name, "measured" if found.delta_sq else "unchanged",
        base_sq=found.base_sq, tuned_sq=found.tuned_sq, delta_sq=found.delta_sq,
        noise_sq=noise.total_sq, noise_edge=noise.edge, changed=noise.changed,
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


def _report(member: Member, results: Sequence[TensorResult], *, reused: bool = False) -> BlockReport:
    return BlockReport(
        member.model,
        member.part_url,
        len(member.block.pairs),
        tuple(result.name for result in results if result.status == "failed"),
        reused,
        routes=_counted(result.solver for result in results if result.solver),
        # Of a part that was there already they were told by who made it.
        second_tries=() if reused else _counted(note_kind(note) for result in results for note in result.notes),
    )


def _counted(names: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple(sorted(Counter(names).items()))


def _gone(member: Member, error: PhloraError) -> BlockReport:
    return BlockReport(member.model, member.part_url, len(member.block.pairs), error=error)
