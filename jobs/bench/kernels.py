"""6a: one matrix in memory → factors. Our solvers beside the libraries', over shapes, ranks and spectra.

A kernel's time starts at two bf16 tensors and ends at A and B: ΔW formed, factors, and for ours the certificate and the
checks of the result as well. Every method starts from the same two; all run in this process, one after another.

- `auto` in every cell: the median of five or more.
- `krylov` and `gram` in every cell where they take another route than `auto`: the median of five, of three above two
  seconds, one run above ten.
- `torch.linalg.svd` and `exact` cost the same whatever the rank, and nearly the same whatever the spectrum: once per shape,
  at α = 0.4, the median of five, `torch.linalg.svd` at its faster thread count.
- Where `auto` comes near `exact`, the two are timed again in turn, in that very cell.
- The other libraries at α = 0.4, repeated as `krylov` and `gram` are; r = 512 up to 2048×2048 only: they take minutes there.

Energies are measured afterwards, in float64.

With `--device cuda` the two tensors are in the GPU's memory, as a worker's reader brings them there, and its matrices are done
as a worker is given them: a block of 96 MiB at once, of 24 at most. The libraries that know no GPU are left out: their times are in the other table. `krylov` and `gram` are timed
at α = 0.4 alone, the drivers of the full SVD at r = 32; every time is the median of five calls.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from phlora_pipeline import lowrank
from phlora_pipeline.extract import profile_of
from phlora_pipeline.lowrank import Solver
from phlora_pipeline.machine import processors
from phlora_pipeline.plan import BLOCK_BYTES

from . import measure, pairs, peers, truth
from .measure import BenchError, Timing
from .settings import Bench

OURS = lowrank.SOLVERS  # `auto` first
REFERENCE, REFERENCE_RANK = "power-0.4", 32
"""What is timed only once per shape is timed here."""

Found = TypeVar("Found")
_WORKSPACES: list[lowrank.Workspace] = []

TOGETHER = 24
"""Matrices that a GPU is given at once, at most."""

NEAR = 0.75
"""Of the time of `exact`: from here on `auto` is compared with it in the same cell."""


@dataclass(frozen=True, slots=True)
class Ours:
    """The one call into the package: two stored tensors → A (r, k), B (d, r), certificate, route.

    Buffers are used again from call to call, as a worker does. Matrices that a worker does side by side, one thread each, or
    together on a GPU, are done so here: the time of one is that of all over their number.

    Attributes:
        name: of the tensor; it seeds what is random.
        solver: one of `OURS`.
    """

    base: Tensor
    tuned: Tensor
    name: str
    rank: int
    solver: Solver

    @property
    def matrices(self) -> int:
        """How many it does."""
        if self.base.is_cuda:
            return min(TOGETHER, max(1, BLOCK_BYTES // (4 * self.base.numel())))
        return torch.get_num_threads() if self.base.numel() <= lowrank.BESIDE_ENTRIES else 1

    def __call__(self) -> tuple[Tensor, Tensor, float, str]:
        """Do them.

        Raises:
            BenchError: no solver did.
        """
        settings, device = lowrank.Settings(self.rank, self.solver), self.base.device
        pairs_, names = [(self.base, self.tuned)] * self.matrices, [self.name] * self.matrices
        found, *_ = lowrank.decompose(pairs_, names, settings, profile_of(device), device, _WORKSPACES)
        if self.base.is_cuda:
            torch.cuda.synchronize(device)
        if found.factors is None:
            raise BenchError(f"{self.name}, rank {self.rank}, {self.solver}: {found.failure or 'nothing to factorise'}")
        return found.factors.A, found.factors.B, found.factors.certificate, found.factors.solver


def run(bench: Bench) -> None:
    """Every shape, saved one by one."""
    for d, k in bench.sizes.shapes:
        bench.say(f"kernels: {d}×{k}")
        bench.save({f"{d}x{k}": measured(bench, d, k)})


def measured(bench: Bench, d: int, k: int) -> dict[str, Any]:
    """All that is told about one shape."""
    torch.set_num_threads(processors())
    spectra, ranks = bench.sizes.spectra, [rank for rank in bench.sizes.ranks if rank <= min(d, k)]
    reference = REFERENCE if REFERENCE in spectra else spectra[0]
    base, tuned = _pair(bench, reference, d, k)
    baseline, threads = _baseline(base, tuned)
    exact = measure.timed(Ours(base, tuned, "exact", REFERENCE_RANK, "exact"), at_least=5)
    rows = [row for spectrum in spectra for row in _cells(bench, spectrum, d, k, ranks, exact)]
    if bench.others:
        rows += _peers(bench, reference, d, k, ranks)
    return {
        **measure.stamp(bench.device),
        "threads": torch.get_num_threads(),
        "baseline": {"method": peers.BASELINE, "threads": threads, **asdict(baseline)},
        "exact": asdict(exact),
        "rows": rows,
    }


def _baseline(base: Tensor, tuned: Tensor) -> tuple[Timing, int]:
    """`torch.linalg.svd` at the thread count that is faster in one try, and that count."""
    before, counts = torch.get_num_threads(), sorted({1, processors()})
    call = _awaited(partial(peers.full_svd, base, tuned, REFERENCE_RANK), base)
    if base.is_cuda:
        return measure.timed(call, at_least=5), before
    tries = []
    for threads in counts:
        torch.set_num_threads(threads)
        measure.seconds_of(call)
        tries.append((measure.seconds_of(call), threads))
    _, threads = min(tries)
    torch.set_num_threads(threads)
    found = measure.timed(call, at_least=5)
    torch.set_num_threads(before)
    return found, threads


def _cells(bench: Bench, spectrum: str, d: int, k: int, ranks: list[int], exact: Timing) -> list[dict[str, Any]]:
    """Our solvers on one matrix, at every rank; those that come to the route of `auto` are not timed again."""
    base, tuned = _pair(bench, spectrum, d, k)
    best = truth.known_optimal(bench.root, spectrum, base, tuned, ranks)
    rows = []
    for rank in ranks:
        if rank > 64 and d * k > 2048 * 2048 and spectrum != REFERENCE:
            continue
        planned = ""
        for solver in OURS if bench.others and (bench.device == "cpu" or spectrum == REFERENCE) else OURS[:1]:
            call = Ours(base, tuned, f"{spectrum}-{d}x{k}", rank, solver)
            if solver == "exact":
                continue
            (A, B, certificate, route), first = _first(call)
            if route == planned:
                continue
            told: dict[str, Any] = {"certificate": certificate, "route": route}
            if solver == "auto":
                planned = route
            if solver == "auto" and first > NEAR * exact.seconds:
                again = Ours(base, tuned, f"{spectrum}-{d}x{k}", rank, "exact")
                spent, rival = measure.in_turn(call, again, measure.repeats(first))
                told["exact_here"] = asdict(rival)
            else:
                spent = _timed(call, first, base)
            rows.append(_row(spectrum, rank, solver, spent, truth.captured(base, tuned, A, B), best[rank]) | told)
    return rows


def _peers(bench: Bench, spectrum: str, d: int, k: int, ranks: list[int]) -> list[dict[str, Any]]:
    """The libraries' low-rank solvers and the full SVD itself, at the reference spectrum."""
    base, tuned = _pair(bench, spectrum, d, k)
    best = truth.known_optimal(bench.root, spectrum, base, tuned, ranks)
    rows = []
    for rank in ranks:
        if rank > 64 and d * k > 2048 * 2048:
            continue
        for name, method in peers.available(bench.device).items():
            if peers.takes(name, (d, k), rank) and (rank == REFERENCE_RANK or name not in peers.WHOLE):
                call = _awaited(partial(method, base, tuned, rank), base)
                (A, B), first = _first(call)
                spent = _timed(call, first, base)
                rows.append(_row(spectrum, rank, name, spent, truth.captured(base, tuned, A, B), best[rank]))
    return rows


def _pair(bench: Bench, spectrum: str, d: int, k: int) -> tuple[Tensor, Tensor]:
    base, tuned = pairs.weight_pair(spectrum, d, k)
    return base.to(bench.device), tuned.to(bench.device)


def _awaited(call: Callable[[], Found], where: Tensor) -> Callable[[], Found]:
    """A call that ends when its device has done it."""

    def done() -> Found:
        found = call()
        if where.is_cuda:
            torch.cuda.synchronize(where.device)
        return found

    return done


def _timed(call: Callable[[], Any], first: float, where: Tensor) -> Timing:
    """As often as a processor's noise wants it; a GPU's calls are many matrices each, and five will do."""
    return measure.timed(call, at_least=5, first=1.0) if where.is_cuda else measure.timed(call, first=first)


def _first(call: Callable[[], Found]) -> tuple[Found, float]:
    """What a first call returns, and its seconds, per matrix."""
    began = time.perf_counter()
    found = call()
    return found, (time.perf_counter() - began) / getattr(call, "matrices", 1)


def _row(spectrum: str, rank: int, method: str, spent: Timing, captured: float, optimal: float) -> dict[str, Any]:
    return {
        "spectrum": spectrum, "rank": rank, "method": method, **asdict(spent),
        "captured": captured, "optimal": optimal, "captured_to_optimal": captured / optimal, "loss": optimal - captured,
    }  # fmt: skip
