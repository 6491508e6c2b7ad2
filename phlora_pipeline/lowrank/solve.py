"""One route after another until a factorisation is checked and certified: the ladder every solver stands on.

A batch goes through the rounds of block Krylov that its plan allows; whatever is not certified within the tolerance, or
fails a check, goes on to the next round, then to the route that decomposes all of ΔW, then to the other one. Each matrix's
way depends on that matrix alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from phlora_pipeline.lowrank import checks, full
from phlora_pipeline.lowrank.certificate import certificate, optimum_bound, tail_bound
from phlora_pipeline.lowrank.delta import to_host
from phlora_pipeline.lowrank.faults import refused
from phlora_pipeline.lowrank.krylov import KrylovBasis
from phlora_pipeline.lowrank.operator import Operator
from phlora_pipeline.lowrank.panels import gaussian
from phlora_pipeline.lowrank.ritz import Compression, Triplets, refine, signs_fixed
from phlora_pipeline.lowrank.routes import CHECK_ROWS, Profile, Round, Solver, planned

_FLAT = 6.0
"""No σ² is above so many times their mean: the matrix looks like noise (4 in a square one) or has equal σ, and no basis that is
smaller than the matrix will be certified."""

_CLOSER = 4.0
"""Times the tolerance: a certificate that a polynomial of twice the degree may bring under it, where the tail is all that is amiss."""

_CANCELS = 1e-3
"""A residual below this share of ‖ΔW‖_F² is not taken as a difference of two nearly equal numbers."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is wanted of a factorisation.

    Attributes:
        max_rank: triplets at most; min(max_rank, d, k) are returned, or fewer where `energy` is reached before.
        solver: route, or `auto`.
        tolerance: of the certificate: a share of ‖ΔW‖_F².
        energy: E_r that is enough, in (0, 1]; None for max_rank triplets whatever their energy.
    """

    max_rank: int
    solver: Solver = "auto"
    tolerance: float = 1e-3
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Factors:
    """LoRA factors of one ΔW; those of a smaller rank are their first rows and columns.

    Attributes:
        A: (q, k) float32, √ΣVᵀ.
        B: (d, q) float32, U√Σ; the entry of largest magnitude of each column is positive.
        singular_values: q of them, descending.
        residual_sq: ‖ΔW − B·A‖_F².
        certificate: c with E_r(optimal) − E_r(ours) ≤ c for every r ≤ q: probabilistic, see `certificate`.
        solver: the route that gave them.
        notes: what else was tried, and why it did not do.
    """

    A: Tensor
    B: Tensor
    singular_values: tuple[float, ...]
    residual_sq: float
    certificate: float
    solver: str
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """A route's answer for a batch.

    Attributes:
        triplets: as many as it has.
        bounds: whose first i add up to a bound of λ_1 + … + λ_i, i ≤ rank.
        psi, seen: random rows and their products with D, or with Dᵀ, on whose side they are.
        turned: whether it is Dᵀ.
        rank: triplets that may be taken.
        last_resort: whether it is taken whatever its certificate.
        totals: of all λ, where they are known.
    """

    triplets: Triplets
    bounds: Sequence[Sequence[float]]
    psi: Tensor
    seen: Tensor
    turned: bool
    rank: int
    last_resort: bool
    totals: Sequence[float] | None = None


def factorise(
    op: Operator, names: Sequence[str], norms_sq: Sequence[float], settings: Settings, profile: Profile
) -> list[Factors | str]:
    """LoRA factors of every ΔW of a batch (eq. 3 and 4), certified, or the reason why there are none.

    Args:
        op: the batch, finite, none of it zero, of norms near 1.
        names: of the tensors; they seed all that is random.
        norms_sq: ‖ΔW‖_F² of each.
        settings: what is wanted.
        profile: of the device.
    """
    return _Ladder(op, names, norms_sq, settings, profile).climb()


_Whole = Callable[[Operator, Tensor, Sequence[float]], tuple[Triplets, Tensor, Tensor, Tensor]]
"""(D, ψ, ‖D‖_F²) → the triplets, bounds of λ_i (b, rank), ψ·D, and all λ (b, m)."""


class _Ladder:
    def __init__(
        self, op: Operator, names: Sequence[str], norms_sq: Sequence[float], settings: Settings, profile: Profile
    ) -> None:
        self._op, self._names, self._norms_sq = op, names, norms_sq
        self._settings, self._profile = settings, profile
        self._q = min(settings.max_rank, op.shape[1])
        self._done: dict[int, Factors] = {}
        self._missed: dict[int, float] = {}
        self._notes: list[list[str]] = [[] for _ in names]

    def climb(self) -> list[Factors | str]:
        _, m, n = self._op.shape
        growing = self._settings.energy is not None
        rounds, last = planned(m, n, self._q, self._settings.solver, self._profile, growing=growing)
        try:
            self._krylov(rounds)
        except RuntimeError as error:
            if not refused(error):
                raise
            self._note("krylov", error, self._pending)
        if self._pending:
            self._whole(last)
        return [self._done.get(index) or self._failure(index) for index in range(len(self._names))]

    @property
    def _pending(self) -> list[int]:
        return [index for index in range(len(self._names)) if index not in self._done]

    def _krylov(self, rounds: Sequence[Round]) -> None:
        if not rounds:
            return
        basis = KrylovBasis(self._op, self._names, rounds[0].block, rounds[0].width)
        inside = self._pending
        flat = self._flat(basis) if self._settings.solver == "auto" else set[int]()
        for step in rounds:
            pending = [index for index in self._near(self._pending, step.after) if index not in flat]
            if not pending:
                return
            op, names = self._op.pick(pending), [self._names[index] for index in pending]
            basis = basis.pick([inside.index(index) for index in pending], op)
            inside = pending
            basis.grow(step.width)
            psi = gaussian(names, "check", CHECK_ROWS, op.shape[2], op.device)
            triplets, compression, seen = refine(op, basis.leading(step.kept), psi)
            self._certify(step, pending, triplets, compression, psi, seen)
            near = self._near(pending, _CLOSER)
            if near:  # a sharper look at the tail costs less than a wider basis
                rows = [pending.index(index) for index in near]
                sharper = replace(step, degree=2 * step.degree + 1)
                self._certify(sharper, near, triplets.pick(rows), compression.pick(rows), psi[rows], seen[rows])

    def _certify(
        self, step: Round, pending: list[int], triplets: Triplets, compression: Compression, psi: Tensor, seen: Tensor
    ) -> None:
        names, norms_sq = [self._names[index] for index in pending], [self._norms_sq[index] for index in pending]
        guesses = to_host(triplets.energies[:, -1])
        tails = tail_bound(self._op.pick(pending), compression.V, names, guesses, norms_sq, step.degree)
        bounds = optimum_bound(compression, tails, step.rank)
        found = _Found(triplets, bounds, psi, seen, turned=True, rank=step.rank, last_resort=False)
        self._judge(f"krylov {step.width}", found, pending)

    def _near(self, pending: Sequence[int], times: float) -> list[int]:
        """Those whose certificate has missed the tolerance by no more than so many times."""
        limit = times * self._settings.tolerance
        return [index for index in pending if index not in self._done and self._missed.get(index, math.inf) <= limit]

    def _flat(self, basis: KrylovBasis) -> set[int]:
        """Matrices with no direction that stands out, where the tolerance is too fine for that."""
        _, m, _ = self._op.shape
        shares = [largest / norm_sq for largest, norm_sq in zip(basis.largest(), self._norms_sq, strict=True)]
        found = {
            index
            for index, share in enumerate(shares)
            if share * m < _FLAT and share * self._q > _FLAT * self._settings.tolerance
        }
        for index in found:
            self._notes[index].append(
                f"krylov: no direction stands out, the first has {shares[index] * m:.1f} of the mean σ²"
            )
        return found

    def _whole(self, first: str) -> None:
        gram, exact = self._attempts("gram"), self._attempts("exact")
        ways = gram + exact if first == "gram" else exact + gram
        if first == "exact" and self._settings.solver == "auto":
            ways = exact[:1] + gram + exact[1:]  # a GPU's further drivers take ten times as long
        for attempt, run in ways:
            pending = self._pending
            if not pending:
                return
            alone = len(pending) == 1
            if not self._tried(attempt, run, pending, alone=alone) and not alone:
                for index in pending:  # a library refuses all for the sake of one
                    self._tried(attempt, run, [index], alone=True)

    def _tried(self, attempt: str, run: _Whole, rows: list[int], *, alone: bool) -> bool:
        """Whether a route takes these matrices; where one `alone` is refused, that is noted."""
        psi = gaussian([self._names[index] for index in rows], "check", CHECK_ROWS, self._op.shape[1], self._op.device)
        try:
            norms_sq = [self._norms_sq[index] for index in rows]
            triplets, bounds, seen, spectrum = run(self._op.pick(rows), psi, norms_sq)
        except RuntimeError as error:
            if not refused(error):
                raise
            if alone:
                self._note(attempt, error, rows)
            return False
        totals = to_host(spectrum.sum(dim=1))
        found = _Found(
            triplets, to_host(bounds), psi, seen, turned=False, rank=self._q, last_resort=True, totals=totals
        )
        self._judge(attempt, found, rows)
        return True

    def _note(self, attempt: str, error: Exception, rows: Sequence[int]) -> None:
        for index in rows:
            self._notes[index].append(f"{attempt}: {' '.join(str(error).split())[:120]}")

    def _attempts(self, name: str) -> list[tuple[str, _Whole]]:
        if name == "gram":
            good = self._profile.float64_rate >= self._profile.float32_rate / 4
            dtype = torch.float64 if good else torch.float32
            return [("gram", lambda op, psi, _: full.gram_eigen(op, self._q, psi, dtype))]
        return [
            (f"exact {driver}" if driver else "exact", partial(self._exact, driver))
            for driver in full.drivers(self._op.device)
        ]

    def _exact(
        self, driver: str | None, op: Operator, psi: Tensor, norms_sq: Sequence[float]
    ) -> tuple[Triplets, Tensor, Tensor, Tensor]:
        triplets, bounds, singular_values = full.exact(op, self._q, driver, norms_sq)
        return triplets, bounds, op.to_long(psi, precise=True), singular_values.square()

    def _judge(self, attempt: str, found: _Found, pending: Sequence[int]) -> None:
        """Keep what is checked, certified and enough of these matrices; note why the rest is not."""
        norms_sq = [self._norms_sq[index] for index in pending]
        cut = found.triplets.leading(found.rank)
        asked = cut.turned() if found.turned else cut
        wrong = checks.problems(asked, norms_sq, found.psi, found.seen, found.totals)
        energies = to_host(cut.energies)
        for row, index in enumerate(pending):
            norm_sq = norms_sq[row]
            rank, enough = self._rank(energies[row], norm_sq)
            if wrong[row]:
                self._notes[index].append(f"{attempt}: {wrong[row]}")
                continue
            c = certificate(math.fsum(found.bounds[row][:rank]), math.fsum(energies[row][:rank]), norm_sq)
            if not enough and not found.last_resort:
                continue  # the threshold asks for a larger basis: no failure
            if not c <= self._settings.tolerance and not found.last_resort:
                self._missed[index] = c
                self._notes[index].append(f"{attempt}: certificate {c:.1e} over {self._settings.tolerance:.1e}")
                continue
            short, long = cut.short[row, :rank], cut.long[row, :rank]
            left, right = (long, short) if self._op.turned else (short, long)
            B, A = signs_fixed(left, right)
            self._done[index] = Factors(
                A=A,
                B=B,
                singular_values=tuple(math.sqrt(energy) for energy in energies[row][:rank]),
                residual_sq=self._residual_sq(index, short, long, energies[row][:rank]),
                certificate=c,
                solver=attempt,
                notes=tuple(self._notes[index]),
            )

    def _residual_sq(self, index: int, short: Tensor, long: Tensor, energies: Sequence[float]) -> float:
        """‖ΔW‖² − Σσ², which the checks have tested; measured entry by entry where nearly all of it would cancel."""
        norm_sq = self._norms_sq[index]
        left = norm_sq - math.fsum(energies)
        return left if left > _CANCELS * norm_sq else float(to_host(self._op.residual_sq(index, short, long)))

    def _rank(self, energies: Sequence[float], norm_sq: float) -> tuple[int, bool]:
        """The smallest rank that preserves the energy asked for, and whether more triplets would be of use."""
        if self._settings.energy is None:
            return len(energies), True
        total = 0.0
        for index, energy in enumerate(energies):
            total += energy
            if total >= self._settings.energy * norm_sq:
                return index + 1, True
        return len(energies), len(energies) >= self._q

    def _failure(self, index: int) -> str:
        return "no solver gave a factorisation that stands its checks: " + "; ".join(self._notes[index])
