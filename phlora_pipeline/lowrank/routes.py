"""Which solver a weight takes: a pure function of its shape, the rank and the kind of device. Costs, not races.

A `Profile` holds the rates of one kind of device. Those below were measured once and are committed, so that the same
checkpoint takes the same route tonight and next year; `phlora calibrate` measures a profile of one's own. Only
deterministic facts (the certificate, the checks, out of memory) change a route later on, and the part says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from phlora_pipeline.lowrank.certificate import PROBES
from phlora_pipeline.lowrank.operator import slice_bytes
from phlora_pipeline.lowrank.rounded import both_ways

Solver = Literal["auto", "krylov", "gram", "exact"]
SOLVERS: tuple[Solver, ...] = ("auto", "krylov", "gram", "exact")

CHECK_ROWS = 8
"""Random rows that every factorisation is checked with."""

_FIRST, _BEFORE_EXACT, _FURTHER = 0.8, 0.5, 0.6
"""Shares of the time of the route behind, up to which `auto` tries the first round, or one of a growing rank; the first before an SVD,
which of a small matrix is up to twice as fast as its rate says; and a further one."""

_ANYWAY, _NEAR = 0.1, 6.0
"""The share up to which a further round is tried whatever came before it; and how near a dearer one's certificate must have been:
this over its share, times the tolerance. Twice the basis takes what has a spectrum that falls at all a thousandfold lower."""

_DEEP = 6
"""Blocks that are enough where each has as many rows as triplets are wanted."""

_LAST = 1.5
"""Times the width of the round before, that the last one is at least wider."""

_FIRST_RANK = 16
_DOUBLINGS = 4

_WAITED_FOR = 46
"""So many times as long the certificate's own eigenproblems take, which a processor solves while a GPU waits."""

_TOGETHER_BYTES = 96 << 20
"""ΔW of which a GPU is given at once: what its matrices are launched with, they share."""

_MANY = 12
"""Matrices of a batch from which on cuSOLVER's SVD takes two steps in the time of one."""

RESIDENT_BYTES = 1 << 30
"""A ΔW that is larger in float32 is not held on a processor's side: it is formed slice by slice."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Rates of one kind of device, in floating-point operations, bytes and seconds.

    Attributes:
        name: of the kind: `cpu`, `cpu-bf16`, `sm80`, `sm90`, `other`, or of a user's own file.
        low: dtype of the range finder's products: `bfloat16` where the device has units for it, else `float32`.
        block_per_rank: rows of a Krylov block, as a share of the rank: narrow where a product costs what its columns
            cost, wide where it costs a launch.
        steps: blocks that the basis starts with; fewer where they are wide for the rank.
        degree: of the polynomial that estimates the tail, in the first round.
        low_rate, float32_rate, float64_rate: of products, per second; the first of thin panels.
        eigh_rate: of a float64 eigendecomposition, taken as 9m³ operations.
        svd_rate: of a float32 SVD, taken as 6mn² + 20n³ operations.
        stream_rate: bytes per second that a product reads of a matrix.
        call: seconds that any operation takes.
        row: seconds that each row of an eigenproblem or an SVD takes, besides its operations: a GPU does one after another.
        least_block: rows that a Krylov block has at least, where the matrix is large enough: as many as cost no more than fewer.
    """

    name: str
    low: Literal["bfloat16", "float32"]
    block_per_rank: float
    steps: int
    degree: int
    low_rate: float
    float32_rate: float
    float64_rate: float
    eigh_rate: float
    svd_rate: float
    stream_rate: float
    call: float
    row: float = 0.0
    least_block: int = 8

    def __post_init__(self) -> None:
        """Refuse rates that are none: a cost of them would be nonsense."""
        rates = (self.low_rate, self.float32_rate, self.float64_rate, self.eigh_rate, self.svd_rate, self.stream_rate)
        positive = all(0 < value < math.inf for value in (*rates, self.call, self.block_per_rank))
        if not (positive and 0 <= self.row < math.inf and self.steps >= 2):
            raise ValueError(
                f"a profile's rates are positive numbers, and its basis starts with 2 blocks or more: {self}"
            )


# Two cores of a Zen 4 server with AVX-512 BF16; measured by `phlora calibrate`.
_CPU_BF16 = Profile("cpu-bf16", "bfloat16", 0.5, 9, 9, 4e11, 1.3e11, 5e10, 4.5e10, 1.0e11, 1.8e10, 2e-5, least_block=16)
# The same, without its units for bfloat16: ratios between the rates matter here, not the rates.
_CPU = Profile("cpu", "float32", 0.5, 9, 9, 1.3e11, 1.3e11, 5e10, 4.5e10, 1.0e11, 1.8e10, 2e-5)
# From the vendors' peak rates, halved, and an H100's time per row; no such device has been measured yet.
_SM80 = Profile("sm80", "bfloat16", 1.25, 5, 11, 1e14, 1e13, 8e12, 2e12, 4e12, 1e12, 3e-5, 1e-5)
# An H100 with torch 2.11, 2026-11-23: products and calls by `phlora calibrate`, the decompositions from the times of whole routes
# at nine shapes, which it gives as 15 % more for eigh and a row, and half as much again for an SVD.
_SM90 = Profile("sm90", "bfloat16", 1.25, 5, 11, 5.8e14, 4.1e13, 3.3e13, 6e12, 1.2e13, 2e12, 3e-5, 8e-6)
_OTHER = Profile("other", "float32", 1.25, 5, 11, 1e13, 1e13, 3e11, 1e11, 1e11, 3e11, 3e-5, 1e-5)
PROFILES = {profile.name: profile for profile in (_CPU, _CPU_BF16, _SM80, _SM90, _OTHER)}


@dataclass(frozen=True, slots=True)
class Round:
    """One size of the Krylov basis, with the effort that goes into its certificate.

    Attributes:
        rank: triplets that may be taken from it.
        block: rows of each block.
        width: rows of the basis.
        kept: its leading directions that are used in float32.
        degree: of the polynomial that estimates the tail.
        after: the round before must have come so near: its certificate is at most so many times the tolerance.
    """

    rank: int
    block: int
    width: int
    kept: int
    degree: int
    after: float = math.inf


def rounds(m: int, rank: int, profile: Profile, *, growing: bool = False) -> list[Round]:
    """The sizes that are tried one after another: each twice the last, and at the end half of the matrix.

    Args:
        m: the shorter side.
        rank: triplets wanted, at most m.
        profile: of the device.
        growing: whether the rank, too, doubles from 16 up to `rank`, for a threshold of energy.
    """
    first = min(rank, _FIRST_RANK) if growing else rank
    block, steps = _blocks(m, first, profile)
    found: list[Round] = []
    for doubling in range(_DOUBLINGS if not growing else 2 * _DOUBLINGS):
        width = min(block * steps << doubling, m // 2 // block * block)
        usable = min(first << doubling, rank) if growing else rank
        kept = 2 * width // 5
        if width < (_LAST * found[-1].width if found else block * steps) or kept < usable:
            break
        degree = (
            profile.degree << min(doubling, _DOUBLINGS) | 1
        )  # odd: the many directions that D ends in zero count for nothing
        found.append(Round(usable, block, width, kept, degree))
    return found


def _blocks(m: int, rank: int, profile: Profile) -> tuple[int, int]:
    """Rows of a block, and how many blocks there are at first."""
    narrow = 8 * math.ceil(profile.block_per_rank * rank / 8)
    for block in (max(narrow, profile.least_block), narrow):
        steps = profile.steps if block < rank else min(profile.steps, _DEEP)
        if block * steps <= m // 2:
            break
    return block, steps


def krylov_seconds(m: int, n: int, step: Round, profile: Profile) -> float:
    """Time of one matrix from the start to the end of this round."""
    low, precise = krylov_work(m, n, step)
    L, p = step.width, step.kept
    products = 2 * L // step.block + step.degree
    small = 4 * L * L * m + 2 * L * L * n + 8 * p * p * (m + n)
    grams = 4 * step.block * L * m + 4 * p * p * (m + n)
    itemsize = 2 if profile.low == "bfloat16" else 4
    spectra = 16 * 3 * p**3 * (_WAITED_FOR if profile.row else 1)
    return (
        low / profile.low_rate
        + products * itemsize * m * n / profile.stream_rate
        + (precise + small) / profile.float32_rate
        + grams / profile.float64_rate
        + (9 * L**3 + 4 * 9 * p**3 + spectra) / profile.eigh_rate
        + profile.row * 6 * L
        + profile.call * (30 * L // step.block + 4 * step.degree + 200) / _together(m, n, profile)
    )


def _together(m: int, n: int, profile: Profile) -> int:
    """How many a GPU is given at once."""
    return max(1, _TOGETHER_BYTES // (4 * m * n)) if profile.row else 1


def krylov_work(m: int, n: int, step: Round) -> tuple[float, float]:
    """Floating-point operations of the products with ΔW: those in low precision, and those in float32."""
    low = 2.0 * m * n * (2 * step.width + PROBES * step.degree)
    return low, 2.0 * m * n * (2 * step.kept + CHECK_ROWS)


def gram_seconds(m: int, n: int, rank: int, profile: Profile) -> float:
    """Time of the Gram route on one matrix."""
    return (
        2.0 * m * m * n / profile.float64_rate
        + 9.0 * m**3 / profile.eigh_rate
        + 4.0 * m * n * rank / profile.float32_rate
        + 9.0 * rank**3 / profile.eigh_rate
        + profile.row * (m + rank)
        + 20 * profile.call
    )


def exact_flops(d: int, k: int) -> float:
    """Floating-point operations of a thin SVD of one (d, k) matrix: QR first, then divide and conquer.

    Golub and Van Loan, *Matrix Computations*, table 8.6.1 (R-SVD with U₁ and V): 6 m n² + 20 n³ for m ≥ n.
    """
    m, n = max(d, k), min(d, k)
    return 6.0 * m * n * n + 20.0 * n**3


def exact_seconds(m: int, n: int, profile: Profile) -> float:
    """Time of the exact route on one matrix."""
    rows = m / 2 if _together(m, n, profile) >= _MANY else m
    return exact_flops(m, n) / profile.svd_rate + profile.row * rows + 20 * profile.call


def whole(d: int, k: int, rank: int, profile: Profile) -> tuple[Literal["gram", "exact"], float]:
    """The cheaper of the two routes that decompose all of ΔW, and its time."""
    m, n = min(d, k), max(d, k)
    gram, exact = gram_seconds(m, n, min(rank, m), profile), exact_seconds(m, n, profile)
    return ("gram", gram) if gram < 0.9 * exact else ("exact", exact)


def planned(
    d: int, k: int, rank: int, solver: Solver, profile: Profile, *, growing: bool = False
) -> tuple[list[Round], Literal["gram", "exact"]]:
    """The rounds of Krylov that are tried, perhaps none, and the route that is taken when they do not do.

    `auto` tries a first round where it costs less than the route behind it, and further ones where they cost next to nothing
    beside that, or little and the one before nearly did: what the first does not certify is mostly flat, and then none will.
    `krylov` tries every round that there is.
    """
    m, n = min(d, k), max(d, k)
    if solver in {"gram", "exact"}:
        return [], "gram" if solver == "gram" else "exact"
    last, limit = whole(d, k, rank, profile)
    tried = rounds(m, min(rank, m), profile, growing=growing)
    if solver == "auto":
        first = _FIRST if growing or last == "gram" else _BEFORE_EXACT
        shares = [krylov_seconds(m, n, step, profile) / limit for step in tried]
        tried = list(_worthwhile(tried, shares, first, _FIRST if growing else _FURTHER, growing=growing))
    return tried, last


def _worthwhile(
    tried: Sequence[Round], shares: Sequence[float], first: float, further: float, *, growing: bool
) -> Iterator[Round]:
    for number, (step, share) in enumerate(zip(tried, shares, strict=True)):
        if share >= (further if number else first):
            return
        yield replace(step, after=_NEAR / share) if number and share > _ANYWAY and not growing else step


@lru_cache(4096)  # a zoo has few shapes
def seconds(d: int, k: int, rank: int, solver: Solver, profile: Profile) -> float:
    """What one (d, k) matrix is planned to take: its first route."""
    m, n = min(d, k), max(d, k)
    tried, last = planned(d, k, rank, solver, profile)
    if tried:
        return krylov_seconds(m, n, tried[0], profile)
    return gram_seconds(m, n, min(rank, m), profile) if last == "gram" else exact_seconds(m, n, profile)


@lru_cache(4096)  # a zoo has few shapes
def flops(d: int, k: int, rank: int, solver: Solver, profile: Profile) -> float:
    """Floating-point operations of the first route."""
    m, n = min(d, k), max(d, k)
    tried, last = planned(d, k, rank, solver, profile)
    if tried:
        return sum(krylov_work(m, n, tried[0]))
    return 2.0 * m * m * n + 9.0 * m**3 if last == "gram" else exact_flops(d, k)


def is_blocked(d: int, k: int, device: str) -> bool:
    """Whether ΔW is formed slice by slice from the start, and never resident in float32."""
    return device == "cpu" and 4 * d * k > RESIDENT_BYTES


def worker_bytes(d: int, k: int, rank: int, solver: Solver, profile: Profile) -> int:
    """Peak bytes of factorising one matrix on a processor: of the planned route, and of the one behind it."""
    tried, _ = planned(d, k, rank, solver, profile)
    each = 4 + (4 if tried else 0) + (2 if tried and both_ways(d, k, "cpu") else 0)
    copies = None if is_blocked(d, k, "cpu") else each * d * k
    return _peak_bytes(d, k, rank, solver, profile, copies)


def device_bytes(d: int, k: int, rank: int, solver: Solver, profile: Profile, *, sliced: bool = False) -> int:
    """The same on a GPU: with ΔW resident in float32 and in the low precision, or `sliced`, where it does not fit."""
    tried, _ = planned(d, k, rank, solver, profile)
    low = 2 if tried and profile.low == "bfloat16" else 0
    return _peak_bytes(d, k, rank, solver, profile, None if sliced else (4 + low) * d * k)


def _peak_bytes(d: int, k: int, rank: int, solver: Solver, profile: Profile, copies: int | None) -> int:
    """Of ΔW's own copies, None where it is formed slice by slice, and what a route holds beside them."""
    m, n = min(d, k), max(d, k)
    tried, last = planned(d, k, rank, solver, profile)
    panels = 4 * 3 * tried[0].width * (m + n) if tried else 0
    dense = 4 * m * n if copies is None else 0  # the exact route has it whole after all
    behind = 8 * 3 * m * m if last == "gram" else 4 * (2 * m * n + 6 * m * m) + dense
    return (slice_bytes(m) if copies is None else copies) + max(panels, behind)
