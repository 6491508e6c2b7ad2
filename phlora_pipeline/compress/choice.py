"""How many ranks each pair keeps: what is asked is checked against what is stored, before and after the factors are read. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from phlora_pipeline import adapter, ranks, targets
from phlora_pipeline.compress.factors import Compact, Sigma
from phlora_pipeline.compress.layout import make_layout, metadata_of, written_rank
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora import Adapter, LoraModule
from phlora_pipeline.ranks import Policy, Spectrum
from phlora_pipeline.targets import Dialect


def checked(lora: Adapter, rank: int | None, policy: Policy, dialect: Dialect, dtype: str) -> None:
    """Refuse what cannot be had of this adapter.

    Raises:
        RequestError: the rank is above what is stored, or the budget below the smallest adapter.
    """
    if rank is not None and not 1 <= rank <= lora.rank:
        raise RequestError(
            f"rank {rank} is more than {lora.url} stores: its largest is {lora.rank}"
            if rank > 0
            else f"rank {rank} is no rank",
            remedy=f"ask for 1 to {lora.rank}",
        )
    if policy.budget is not None:
        least = size(lora, dict.fromkeys(lora.modules, 1), policy, dialect, dtype)
        if least > policy.budget.amount:
            raise RequestError(
                f"a budget of {policy.budget.words()} does not hold the smallest adapter: rank 1 of {len(lora.modules)} modules in {dtype} takes {policy.budget.words(least)}",
                remedy=f"allow {policy.budget.words(least)}, or a narrower --dtype",
            )


def most(rank: int | None, policy: Policy) -> Callable[[LoraModule, Sigma], int]:
    """The most ranks that a module may have, when its singular values are known and others' are not."""

    def of(module: LoraModule, sigma: Sigma) -> int:
        spectrum = _spectrum(module, sigma)
        if policy.energy is not None:
            return ranks.by_energy(spectrum, policy.energy)
        return ranks.fixed(spectrum, rank) if rank is not None else spectrum.most

    return of


def choose(lora: Adapter, found: Mapping[str, Compact], policy: Policy, dialect: Dialect, dtype: str) -> dict[str, int]:
    """Module → its rank: what was kept of it, or what the budget pays for."""
    if policy.budget is None:
        return {name: compact.A.shape[1] for name, compact in found.items()}
    spectra = {name: _spectrum(compact.module, compact.singular_values) for name, compact in found.items()}
    amount, rules = policy.budget.amount, targets.server_rules("", dialect)
    steps = sorted({step for step in rules.rank_grid or range(1, lora.rank) if step < lora.rank} | {lora.rank})
    find = ranks.within if rules.per_tensor_ranks else ranks.largest_even
    chosen = find(spectra, steps, lambda own: size(lora, own, policy, dialect, dtype) <= amount)
    assert chosen is not None  # `checked` has seen to it
    return chosen


def size(lora: Adapter, own: Mapping[str, int], policy: Policy, dialect: Dialect, dtype: str) -> int:
    """What the file takes with these ranks, in the budget's unit; bytes where there is no budget."""
    layout = make_layout(lora, own, dialect)
    if policy.budget is not None and policy.budget.counts == "parameters":
        return adapter.parameters(layout)
    return adapter.file_bytes(layout, dtype, metadata_of(lora, written_rank(own, dialect)))


def _spectrum(module: LoraModule, sigma: Sigma) -> Spectrum:
    total = sum(value * value for value in sigma)
    return Spectrum(sigma, total, module.experts * (module.inputs + module.outputs), least=1)
