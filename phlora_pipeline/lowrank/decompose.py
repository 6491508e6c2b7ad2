"""Pairs of stored weights → norms and factors, in the memory that there is. What a task does, and a benchmark times.

A device that runs out of memory costs time, never the result: the batch is halved, then a single ΔW is formed slice by
slice, then the processor does it. The tolerance stays the same, and the notes say what happened.
"""

from __future__ import annotations

import itertools
import math
import os
import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from phlora_pipeline.lowrank.delta import CHUNK, first_nonfinite, form_delta, scale_, scale_exponent, to_host
from phlora_pipeline.lowrank.faults import out_of_memory
from phlora_pipeline.lowrank.operator import Blocked, Dense, Operator
from phlora_pipeline.lowrank.routes import PROFILES, Profile, is_blocked, planned
from phlora_pipeline.lowrank.solve import Factors, Settings, factorise

BESIDE_ENTRIES = 16 << 20
"""Matrices of so many entries or fewer are done side by side on a processor, one thread each; larger ones one after another,
on all threads. Never by how many there are: the same matrix takes the same arithmetic, alone or among others."""

Pair = tuple[Tensor, Tensor]
"""W_base and W_tuned (d, k), in their stored dtypes, on the CPU."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one pair.

    Attributes:
        base_sq, tuned_sq, delta_sq: ‖W_base‖_F², ‖W_tuned‖_F², ‖ΔW‖_F²; the last is not finite where an entry is not.
        nonfinite: how many entries are not finite, and the index of the first; None where all are.
        factors: None where ΔW is zero or not finite, or where no solver did.
        failure: why no solver did.
    """

    base_sq: float
    tuned_sq: float
    delta_sq: float
    nonfinite: tuple[int, tuple[int, ...]] | None = None
    factors: Factors | None = None
    failure: str = ""


class Workspace:
    """Buffers that live as long as a worker: fresh pages cost a processor as much as half of the arithmetic."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype, str], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """An uninitialised tensor; the next one of this name, dtype and device takes its memory."""
        key, numel = (name, dtype, str(device)), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < numel:
            self._buffers.pop(key, None)
            self._buffers[key] = torch.empty(numel, dtype=dtype, device=device)
        return self._buffers[key][:numel].view(shape)

    def clear(self) -> None:
        """Give all memory back."""
        self._buffers.clear()


def measure(pairs: list[Pair], device: torch.device) -> list[Outcome]:
    """The norms alone, of tensors of any shape, a piece at a time. `pairs` is emptied on the way, as by `decompose`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # pieces that fit the cache are not worth another one
    try:
        return [_measured(pairs.pop(0), device) for _ in range(len(pairs))]
    finally:
        torch.set_num_threads(threads)


def _measured(pair: Pair, device: torch.device) -> Outcome:
    base, tuned = (side.reshape(-1) for side in pair)
    scratch = torch.empty(min(CHUNK, base.numel()), dtype=torch.float32, device=device)
    sums = [
        form_delta(base[start : start + CHUNK], tuned[start : start + CHUNK], scratch[: base.numel() - start])
        for start in range(0, base.numel(), CHUNK)
    ]
    return _outcome(pair, to_host(torch.stack(sums).sum(dim=0) if sums else torch.zeros(3)))


def decompose(
    pairs: list[Pair],
    names: Sequence[str],
    settings: Settings,
    profile: Profile,
    device: torch.device,
    workspaces: list[Workspace] | None = None,
    formed: Callable[[], None] | None = None,
) -> list[Outcome]:
    """Factors of every pair of one shape.

    On a GPU all are done at once where they fit. On a processor each is done by itself, and small ones side by side on one
    thread each: thin products gain less from two threads than two matrices do.

    Args:
        pairs: what is stored; emptied on the way, so that a pair's bytes are given back as soon as it is done.
        names: of the tensors; they seed all that is random.
        settings: what is wanted.
        profile: rates of the device, for the route.
        device: where ΔW is formed and factorised.
        workspaces: to be used again for further calls; filled up as needed.
        formed: called on a processor once every ΔW is formed and held: other tensors may then lie where the pairs did.
            Where memory runs out after that it is an error: nothing can be formed again.

    Returns:
        One outcome per pair, in order.
    """
    spare = [] if workspaces is None else workspaces
    if device.type != "cpu":
        group = _Group(list(pairs), list(names), settings, profile, device, _one_of(spare))
        pairs.clear()
        return group.solve()

    count = itertools.count(1)

    def one_formed() -> None:
        if formed and next(count) == len(names):
            formed()

    def alone(pair: list[Pair], name: str, workspace: Workspace) -> Outcome:
        return _Group(pair, [name], settings, profile, device, workspace, one_formed if formed else None).solve()[0]

    threads = torch.get_num_threads()
    if not pairs or pairs[0][0].numel() > BESIDE_ENTRIES:
        return [alone([pairs.pop(0)], name, _one_of(spare)) for name in names]
    spare += [Workspace() for _ in range(threads - len(spare))]
    free: queue.SimpleQueue[Workspace] = queue.SimpleQueue()
    for workspace in spare:
        free.put(workspace)

    def one(index: int) -> Outcome:
        workspace = free.get()
        try:
            return alone([waiting.pop(index)], names[index], workspace)
        finally:
            free.put(workspace)

    waiting = dict(enumerate(pairs))  # by number: a thread that is held up must not take another one's pair
    pairs.clear()
    torch.set_num_threads(1)
    try:
        solving = [_solvers(os.getpid(), threads).submit(one, index) for index in range(len(names))]
        try:
            return [found.result() for found in solving]
        finally:
            for found in solving:
                if not found.cancel():
                    found.exception()
    finally:
        torch.set_num_threads(threads)


@cache
def _solvers(process: int, threads: int) -> ThreadPoolExecutor:
    # For good: every new thread would get a heap of its own, and leave what it has freed there behind. Keyed by process:
    # threads do not survive a fork.
    # Each begins with as many for LAPACK as there are processors, and would keep that up to its first large matrix.
    return ThreadPoolExecutor(threads, f"phlora-solve-{process}", torch.set_num_threads, (1,))


def _one_of(workspaces: list[Workspace]) -> Workspace:
    if not workspaces:
        workspaces.append(Workspace())
    return workspaces[0]


class _Group:
    """Pairs that are done at once."""

    def __init__(
        self,
        pairs: list[Pair],
        names: list[str],
        settings: Settings,
        profile: Profile,
        device: torch.device,
        workspace: Workspace,
        formed: Callable[[], None] | None = None,
    ) -> None:
        self._pairs, self._names, self._settings = pairs, names, settings
        self._profile, self._device, self._workspace, self._formed = profile, device, workspace, formed
        self._shape: tuple[int, int] = tuple(pairs[0][0].shape)  # type: ignore[assignment]

    def solve(self) -> list[Outcome]:
        if is_blocked(*self._shape, self._device.type):
            return self._blocked()
        try:
            return self._dense()
        except (MemoryError, RuntimeError) as error:
            if not (out_of_memory(error) and self._pairs):
                raise
        return _noted(self._smaller(), f"out of memory on {self._device.type} with {len(self._pairs)} at once")

    def _smaller(self) -> list[Outcome]:
        """What is tried next, once the error and the tensors that it held are gone."""
        self._workspace.clear()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        if len(self._pairs) > 1:
            half = len(self._pairs) // 2
            parts = ((self._pairs[:half], self._names[:half]), (self._pairs[half:], self._names[half:]))
            return [outcome for some, called in parts for outcome in self._again(some, called, self._device).solve()]
        try:
            return self._blocked()
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or self._device.type == "cpu":
                raise
        self._workspace.clear()
        return _noted(self._again(self._pairs, self._names, torch.device("cpu")).solve(), "done on the processor")

    def _again(self, pairs: list[Pair], names: list[str], device: torch.device) -> _Group:
        profile = self._profile if device == self._device else PROFILES["cpu"]
        return _Group(pairs, names, self._settings, profile, device, self._workspace)

    def _dense(self) -> list[Outcome]:
        b, (d, k) = len(self._pairs), self._shape
        low: torch.dtype = getattr(torch, self._profile.low)
        rank = min(self._settings.max_rank, d, k)
        growing = self._settings.energy is not None
        tried, _ = planned(d, k, rank, self._settings.solver, self._profile, growing=growing)
        delta = self._workspace.take("delta", (b, d, k), torch.float32, self._device)
        rounded = None
        if tried and low != torch.float32 and self._device.type == "cpu":
            rounded = self._workspace.take("rounded", (b, d, k), low, self._device)
        sums = [
            form_delta(base, tuned, delta[row], None if rounded is None else rounded[row])
            for row, (base, tuned) in enumerate(self._pairs)
        ]
        measured = to_host(torch.stack(sums))
        found = [_outcome(pair, row[:3]) for pair, row in zip(self._pairs, measured, strict=True)]
        if self._formed:
            self._pairs.clear()
            self._formed()
        wanted = _wanted(found)
        if not wanted:
            return found
        exponents = [scale_exponent(found[row].delta_sq) for row in wanted]
        # What is scaled is rounded anew, and measured where it is asked for.
        errors = None if rounded is None or any(exponents) else [math.sqrt(row[3]) for row in measured]
        for row, exponent in zip(wanted, exponents, strict=True):
            scale_(delta[row], exponent)
            if rounded is not None and exponent:
                rounded[row].copy_(delta[row])  # anew: what is tiny was rounded to few bits
        return self._finish(Dense(delta, low, rounded, errors).pick(wanted), found, wanted, exponents)

    def _blocked(self) -> list[Outcome]:
        [(base, tuned)] = self._pairs
        low: torch.dtype = getattr(torch, self._profile.low)
        op = Blocked(base, tuned, self._device, low)
        found = [_outcome((base, tuned), to_host(op.sums()))]
        wanted = _wanted(found)
        if not wanted:
            return found
        exponents = [scale_exponent(found[0].delta_sq)]
        op.exponent = exponents[0]
        return _noted(self._finish(op, found, wanted, exponents), "formed slice by slice")

    def _finish(self, op: Operator, found: list[Outcome], wanted: list[int], exponents: list[int]) -> list[Outcome]:
        scaled = [
            math.ldexp(found[row].delta_sq, 2 * exponent) for row, exponent in zip(wanted, exponents, strict=True)
        ]
        names = [self._names[row] for row in wanted]
        for row, exponent, answer in zip(
            wanted, exponents, factorise(op, names, scaled, self._settings, self._profile), strict=True
        ):
            if isinstance(answer, str):
                found[row] = replace(found[row], failure=answer)
            else:
                found[row] = replace(found[row], factors=_unscaled(answer, exponent))
        return found


def _outcome(pair: Pair, sums: Sequence[float]) -> Outcome:
    base_sq, tuned_sq, delta_sq = sums
    return Outcome(base_sq, tuned_sq, delta_sq, None if math.isfinite(delta_sq) else first_nonfinite(*pair))


def _wanted(found: Sequence[Outcome]) -> list[int]:
    return [row for row, outcome in enumerate(found) if math.isfinite(outcome.delta_sq) and outcome.delta_sq > 0]


def _unscaled(factors: Factors, exponent: int) -> Factors:
    """The factors of ΔW from those of 2^exponent·ΔW; √Σ takes an odd exponent's half by 2^(1/2)."""
    if not exponent:
        return factors
    root = 2.0 ** (-exponent / 2)
    return replace(
        factors,
        A=factors.A * root,
        B=factors.B * root,
        singular_values=tuple(math.ldexp(value, -exponent) for value in factors.singular_values),
        residual_sq=math.ldexp(factors.residual_sq, -2 * exponent),
    )


def _noted(found: Sequence[Outcome], note: str) -> list[Outcome]:
    return [
        outcome
        if outcome.factors is None
        else replace(outcome, factors=replace(outcome.factors, notes=(note, *outcome.factors.notes)))
        for outcome in found
    ]
