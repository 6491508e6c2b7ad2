"""From a policy and spectra to the ranks that a dialect's adapter has; and before that, what a budget asks at the least. Pure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from phlora_pipeline import adapter, convolutions, lowrank, ranks, targets
from phlora_pipeline.adapter import Layout
from phlora_pipeline.errors import RequestError
from phlora_pipeline.parts import TensorResult
from phlora_pipeline.plan import Plan, some
from phlora_pipeline.ranks import Budget, Spectrum
from phlora_pipeline.summary import percent

Draft = Callable[[Plan, Mapping[str, int]], Layout]
"""The layout of a plan's adapter whose tensors have these ranks; those that are not named have no pair of their own."""

BELOW_PRECISION = "update below storage precision"
_DROWNED = f"{BELOW_PRECISION}: no singular value stands above the edge of its rounding noise"


@dataclass(frozen=True, slots=True)
class Chosen:
    """What the policy has come to.

    Attributes:
        plan: with the rank that the adapter has.
        ranks: tensor → its rank, of those that have one.
        without: tensor → why it has none.
        notes: tensor → what its rank is to be taken with.
        natural_bytes: what the file would be, if each pair could be written at its own rank.
        warnings: in words.
    """

    plan: Plan
    ranks: Mapping[str, int]
    without: Mapping[str, str]
    notes: Mapping[str, str]
    natural_bytes: int
    warnings: tuple[str, ...]


def choose(plan: Plan, results: Mapping[str, TensorResult], draft: Draft, dtype: str) -> Chosen:
    """Each tensor's rank.

    Args:
        plan: with the policy.
        results: of the tensors that have factors.
        draft: makes layouts.
        dtype: of the adapter.
    """
    spectra = _spectra(plan, results)
    without: dict[str, str] = {}
    notes: dict[str, str] = {}
    if plan.policy.budget is not None:
        found = _within(plan, plan.policy.budget, spectra, draft, dtype)
        without = {name: f"not worth a rank within {plan.policy.budget.words()}" for name in results if not found[name]}
    elif plan.policy.noise:
        found = {name: ranks.above_noise(one) for name, one in spectra.items()}
        without = {name: _DROWNED for name in results if not found[name]}
        notes = {name: _masked(one) for name, one in results.items() if lowrank.below_precision(one.changed)}
    elif plan.policy.energy is not None:
        found = {name: one.most for name, one in spectra.items()}  # the solver stopped where it was enough
    else:
        shares = {pair.name: _of_each(plan, pair.module, plan.rank) for pair in plan.adapted}
        found = {name: ranks.fixed(one, shares[name]) for name, one in spectra.items()}
    own = {name: rank for name, rank in found.items() if rank}
    warnings = tuple(_warnings(plan, results, found))
    if plan.policy.chooses:
        plan = plan.of_rank(max(own.values(), default=1))
    return Chosen(plan, own, without, notes, adapter.file_bytes(draft(_unpadded(plan), own), dtype), warnings)


def require_budget(plan: Plan, draft: Draft, dtype: str) -> None:
    """Refuse a budget that does not hold rank 1 of every target, with all that would be kept whole.

    Raises:
        RequestError: says what the least is. Nothing has been read.
    """
    budget = plan.policy.budget
    if budget is None:
        return
    least = _amount(budget, draft(plan.of_rank(1), {pair.name: 1 for pair in plan.adapted}), dtype)
    if least > budget.amount:
        kept = f", {len(plan.carried)} tensors that are kept whole among it" if plan.carried else ""
        raise RequestError(
            f"a budget of {budget.words()} does not hold the smallest adapter: rank 1 of {len(plan.adapted)} tensors in {dtype} takes {budget.words(least)}{kept}",
            remedy=f"allow {budget.words(least)}, or adapt fewer tensors: --targets, --exclude",
        )


@dataclass(frozen=True, slots=True)
class Outlook:
    """What can be said of the file before any tensor is read, taking every target as changed.

    Attributes:
        rank: the same for all: as asked for, the largest that fits a budget, or else the most that may be.
        file_bytes: of the adapter at that rank, as written: padded where servers want that.
        natural_bytes: the same, if each pair could be written at its own rank.
        least_bytes: at rank 1.
        most_bytes: of whatever the policy may choose; under a budget of parameters without the header.
    """

    rank: int
    file_bytes: int
    natural_bytes: int
    least_bytes: int
    most_bytes: int


def outlook(plan: Plan, draft: Draft, dtype: str) -> Outlook:
    """The file at one rank for all."""

    def layout(rank: int, made: Plan = plan) -> Layout:
        return draft(made, {pair.name: min(_of_each(plan, pair.module, rank), *pair.shape) for pair in plan.adapted})

    rank, budget = plan.rank, plan.policy.budget
    if budget is not None:
        even = steps(plan)
        count = ranks.prefix(
            len(even),
            lambda n: _amount(budget, layout(even[n - 1], plan.of_rank(even[n - 1])), dtype) <= budget.amount,
        )
        rank = even[max(count, 1) - 1]
    made, least = plan.of_rank(rank), plan.of_rank(1)
    files = layout(rank, made), layout(rank, _unpadded(made)), layout(1, least)
    written, natural, smallest = (adapter.file_bytes(each, dtype) for each in files)
    most = written
    if budget is not None and plan.per_tensor_ranks and rank < plan.rank:
        most = budget.amount * (1 if budget.counts == "bytes" else adapter.DTYPES[dtype][1].itemsize)
    return Outlook(rank, written, natural, smallest, most)


def _of_each(plan: Plan, module: str, rank: int) -> int:
    """What a matrix has of a rank: that which is asked for a convolution is shared by its groups, a chosen one is each's own."""
    return rank if plan.policy.chooses else convolutions.rank_of_one(module, rank)


def _unpadded(plan: Plan) -> Plan:
    """The same with each pair at its own rank, whether servers take that or not."""
    return replace(plan, per_tensor_ranks=True, rank_grid=(), written_rank=plan.rank)


def steps(plan: Plan) -> list[int]:
    """Ranks that all tensors may have together, ascending: the servers' grid up to the most that is computed, and that."""
    return sorted({step for step in plan.rank_grid or range(1, plan.rank) if step < plan.rank} | {plan.rank})


def _spectra(plan: Plan, results: Mapping[str, TensorResult]) -> dict[str, Spectrum]:
    whole = targets.server_rules(plan.model_type, plan.dialect).whole_families
    biases = {place.module for place in plan.carried.values() if place.how == "bias"}
    made = {}
    for pair in plan.adapted:
        if (result := results.get(pair.name)) is None:
            continue
        unit = pair.rows + pair.shape[1]
        twice = 2 if plan.tied and pair.module == plan.tied[0] else 1
        # A family must be whole: with rank 0 it would take a zero pair's bytes for nothing.
        least = int(plan.policy.budget is not None and (whole or pair.module in biases))
        made[pair.name] = Spectrum(result.singular_values, result.delta_sq, unit * twice, result.noise_edge, least)
    return made


def _within(plan: Plan, budget: Budget, spectra: Mapping[str, Spectrum], draft: Draft, dtype: str) -> dict[str, int]:
    def fits(own: Mapping[str, int]) -> bool:
        made = plan.of_rank(max(own.values(), default=1) or 1)
        layout = draft(made, {name: rank for name, rank in own.items() if rank})
        return _amount(budget, layout, dtype) <= budget.amount

    find = ranks.within if plan.per_tensor_ranks else ranks.largest_even
    found = find(spectra, steps(plan), fits)
    assert found is not None  # `require_budget` has seen to it
    return found


def _amount(budget: Budget, layout: Layout, dtype: str) -> int:
    return adapter.file_bytes(layout, dtype) if budget.counts == "bytes" else adapter.parameters(layout)


def _masked(result: TensorResult) -> str:
    return f"{BELOW_PRECISION}: {percent(result.changed)} of the entries of its rows that moved differ"


def _warnings(plan: Plan, results: Mapping[str, TensorResult], found: Mapping[str, int]) -> Iterator[str]:
    policy = plan.policy
    noisy = [
        name for name, one in results.items() if found[name] and one.singular_values[found[name] - 1] <= one.noise_edge
    ]
    if policy.energy is not None and noisy:
        yield f"{len(noisy)} of {len(results)} tensors reach {policy.energy:g} of their energy only with rounding noise ({some(noisy)}); --rank auto keeps what stands above it"
    drowned = [name for name in results if policy.noise and not found[name]]
    if drowned:
        yield f"{BELOW_PRECISION}: {len(drowned)} of {len(results)} tensors get no rank ({some(drowned)}), with {_share(drowned, results)} of ‖ΔW‖² between them; --rank N and --budget keep their first directions all the same"
    masked = [
        name for name in results if policy.noise and found[name] and lowrank.below_precision(results[name].changed)
    ]
    if masked:
        yield f"{BELOW_PRECISION}: in {len(masked)} of {len(results)} tensors ({some(masked)}), with {_share(masked, results)} of ‖ΔW‖² between them, fewer than half of the entries differ; they keep what stands above the rounding noise, and a few ranks more or less may be better"
    capped = [pair.name for pair in plan.adapted if found.get(pair.name) == plan.rank < min(pair.shape)]
    if policy.noise and capped:
        yield f"{len(capped)} tensors may have more above the noise than the largest rank allowed, {plan.rank} ({some(capped)}); raise --max-rank"


def _share(names: Collection[str], results: Mapping[str, TensorResult]) -> str:
    return percent(sum(results[name].delta_sq for name in names) / sum(one.delta_sq for one in results.values()))
