"""How many ranks each tensor gets: policies over singular values. Pure numbers: no torch, no files, no dialects.

What a rank costs is the caller's to say, as a predicate `fits` over whole assignments, which sees headers, padding and zero
pairs; it must be monotone: where some ranks fit, so do smaller ones. Two items of energy compete by σ²/unit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Fits = Callable[[Mapping[str, int]], bool]
"""Whether what has these ranks, by tensor, is small enough."""

_UNITS = {
    **{name: 1000**power for power, name in enumerate(("b", "kb", "mb", "gb", "tb"))},
    **{name: 1024**power for power, name in enumerate(("b", "kib", "mib", "gib", "tib"))},
    **{f"{name}-params": 1000**power for power, name in enumerate(("", "k", "m", "b"))},
}


@dataclass(frozen=True, slots=True)
class Spectrum:
    """What is known of one tensor's update.

    Attributes:
        singular_values: σ, descending, up to max_rank of them.
        delta_sq: ‖ΔW‖_F², of which Σσ² is a part.
        unit: parameters that one rank costs: d + k of the stored factors, twice that where they are stored twice.
        edge: singular values up to it are rounding noise.
        least: ranks that it has whatever they cost: 1 where servers want its whole family.
    """

    singular_values: tuple[float, ...]
    delta_sq: float
    unit: int
    edge: float = 0.0
    least: int = 0

    @property
    def most(self) -> int:
        """Ranks that it can have."""
        return len(self.singular_values)


@dataclass(frozen=True, slots=True)
class Budget:
    """What an adapter may take: bytes of its weights' file as written, or numbers in it."""

    amount: int
    counts: Literal["bytes", "parameters"]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """From what people write; units count in any case.

        >>> Budget.parse("200MB"), Budget.parse("64 MiB").amount, Budget.parse("1.5M-params")
        (Budget(amount=200000000, counts='bytes'), 67108864, Budget(amount=1500000, counts='parameters'))

        Raises:
            ValueError: it is no size.
        """
        match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([a-z-]+)", text.strip().lower())
        scale = _UNITS.get(match[2]) if match else None
        amount = int(float(match[1]) * scale) if match and scale else 0
        if amount < 1:
            raise ValueError(
                f"a budget is a size of the adapter's file, such as 200MB or 64MiB, or a number of parameters, such as 12M-params; got {text!r}"
            )
        return cls(amount, "parameters" if text.strip().lower().endswith("params") else "bytes")

    def words(self, amount: int | None = None) -> str:
        """It, or another amount of its kind, exactly.

        >>> Budget(200_000_000, "bytes").words(), Budget(5, "parameters").words(7)
        ('200,000,000 bytes', '7 parameters')
        """
        return f"{self.amount if amount is None else amount:,} {self.counts}"


@dataclass(frozen=True, slots=True)
class Policy:
    """How ranks are chosen; at most one of the three, and without any each tensor has the rank that was asked for.

    Attributes:
        energy: each tensor's smallest rank with E_r of this or more.
        noise: each tensor's singular values above the rounding noise: `auto`.
        budget: the most energy of all tensors together that it pays for.
    """

    energy: float | None = None
    noise: bool = False
    budget: Budget | None = None

    @property
    def name(self) -> Literal["fixed", "energy", "auto", "budget"]:
        """For people and manifests."""
        if self.energy is not None:
            return "energy"
        return "auto" if self.noise else "budget" if self.budget else "fixed"

    @property
    def words(self) -> str:
        """How it chooses, as the end of a sentence.

        >>> Policy(energy=0.9).words
        'to keep 0.9 of the energy of each tensor'
        """
        if self.energy is not None:
            return f"to keep {self.energy:g} of the energy of each tensor"
        if self.budget is not None:
            return f"to keep the most energy within {self.budget.words()}"
        return "to keep what stands above the rounding noise" if self.noise else "by hand"

    @property
    def identity(self) -> dict[str, object]:
        """What distinguishes its adapters from others of the same parts and the same largest rank."""
        if self.budget is not None:
            return {"policy": "budget", "amount": self.budget.amount, "counts": self.budget.counts}
        return {"policy": "auto"} if self.noise else {}  # a threshold has factorisations of its own

    @property
    def chooses(self) -> bool:
        """Whether ranks are known only when all tensors are factorised."""
        return self.name != "fixed"


FIXED = Policy()


def spread_words(own: Iterable[int]) -> str:
    """Some ranks, in words.

    >>> spread_words([3, 40, 12]), spread_words([6, 6])
    ('3 to 40, median 12', '6')
    """
    ordered = sorted(own)
    if ordered[0] == ordered[-1]:
        return str(ordered[0])
    return f"{ordered[0]} to {ordered[-1]}, median {ordered[len(ordered) // 2]}"


def fixed(spectrum: Spectrum, rank: int) -> int:
    """The rank itself, or all there is."""
    return max(spectrum.least, min(rank, spectrum.most))


def by_energy(spectrum: Spectrum, share: float) -> int:
    """The smallest r with E_r ≥ share; all that are known, where that is not reached.

    >>> by_energy(Spectrum((3.0, 2.0, 1.0), 14.0, 1), 0.9)
    2
    """
    total, wanted = 0.0, share * spectrum.delta_sq
    for index, value in enumerate(spectrum.singular_values):
        total += value * value
        if total >= wanted:
            return index + 1
    return spectrum.most


def above_noise(spectrum: Spectrum) -> int:
    """How many σ stand above the edge of the rounding noise: 0 where the update drowns in it.

    >>> above_noise(Spectrum((3.0, 0.5, 0.4), 9.5, 1, edge=0.5))
    1
    """
    return sum(value > spectrum.edge for value in spectrum.singular_values)


def energy(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int]) -> float:
    """Σσ² of what these ranks keep."""
    return math.fsum(
        value * value for name, spectrum in spectra.items() for value in spectrum.singular_values[: ranks[name]]
    )


def largest_even(spectra: Mapping[str, Spectrum], steps: Sequence[int], fits: Fits) -> dict[str, int] | None:
    """The same rank for all, clipped to what each has: the largest step that fits, or None.

    Args:
        spectra: by tensor.
        steps: ranks that may be taken, ascending.
        fits: monotone.
    """
    count = prefix(len(steps), lambda n: fits({name: fixed(one, steps[n - 1]) for name, one in spectra.items()}))
    return {name: fixed(one, steps[count - 1]) for name, one in spectra.items()} if count else None


def spread(spectra: Mapping[str, Spectrum], fits: Fits) -> dict[str, int] | None:
    """Ranks that preserve the most energy of all tensors together: the greedy of the knapsack, densest σ²/unit first.

    Within a tensor σ descends, so what is taken of it is a prefix. Where the first item that does not fit leaves nothing
    over, or there is none, no assignment keeps more; otherwise none keeps more by as much as that item. What is left is
    filled with cheaper items. None where not even the least ranks fit.
    """
    taken = {name: one.least for name, one in spectra.items()}
    if not fits(taken):
        return None
    waiting = sorted(
        (
            (-value * value / one.unit, name, one.unit)
            for name, one in spectra.items()
            for value in one.singular_values[one.least :]
        ),
        key=lambda item: item[:2],
    )
    while waiting:
        count = prefix(len(waiting), lambda n: fits(_with(taken, waiting[:n])))  # noqa: B023
        taken = _with(taken, waiting[:count])
        # What costs as much as the first that does not fit, will not fit either: the room left only shrinks.
        waiting = [item for item in waiting[count:] if item[2] < waiting[count][2]]
    return taken


def within(spectra: Mapping[str, Spectrum], steps: Sequence[int], fits: Fits) -> dict[str, int] | None:
    """The better of `spread` and `largest_even`, so that a budget never keeps less than a fixed rank of the same size."""
    found = [ranks for ranks in (spread(spectra, fits), largest_even(spectra, steps, fits)) if ranks is not None]
    return max(found, key=lambda ranks: energy(spectra, ranks), default=None)


def prefix(count: int, fits: Callable[[int], bool]) -> int:
    """The largest n ≤ count with fits(n), or 0; fits is monotone.

    >>> prefix(10, lambda n: n * n <= 20)
    4
    """
    low, high = 0, count
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def _with(taken: Mapping[str, int], items: Sequence[tuple[float, str, int]]) -> dict[str, int]:
    more = dict(taken)
    for _, name, _ in items:
        more[name] += 1
    return more
