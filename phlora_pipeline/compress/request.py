"""What is asked of a compression, checked before a factor is read."""

from __future__ import annotations

import os
from dataclasses import dataclass

from phlora_pipeline import adapter, lora, storage, targets
from phlora_pipeline.compress.choice import checked
from phlora_pipeline.errors import RequestError
from phlora_pipeline.lora import Adapter
from phlora_pipeline.plan import digest_of
from phlora_pipeline.ranks import Budget, Policy
from phlora_pipeline.targets import Dialect

REVISION = 1
"""Of the numerics: it is raised where the same adapter would give other bytes."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked, checked: of which adapter, how many ranks, in which form."""

    lora: Adapter
    out: str
    rank: int | None
    policy: Policy
    dialect: Dialect
    dtype: str
    base_name: str

    @property
    def version(self) -> str:
        policy = [self.rank, self.policy.energy, self.policy.budget.words() if self.policy.budget else None]
        return digest_of([self.lora.fingerprint, policy, self.dialect, self.dtype, self.base_name, REVISION])


def requested(
    url: str, out: str, rank: int | None, energy: float | None, budget: str | None, dialect: Dialect | None, dtype: str, base_name: str
) -> Request:  # fmt: skip
    given = {"rank": rank, "energy": energy, "budget": budget}
    if len(named := [name for name, value in given.items() if value is not None]) != 1:
        told = f"{' and '.join(named)} are different ways to choose ranks" if named else "no rank is asked for"
        raise RequestError(told, remedy="give one of --rank, --energy and --budget")
    if energy is not None and not 0 < energy <= 1:
        raise RequestError(f"energy is a share between 0 and 1, got {energy:g}", remedy="such as --energy 0.95")
    try:
        policy = Policy(energy=energy, budget=Budget.parse(budget) if budget is not None else None)
    except ValueError as error:
        raise RequestError(str(error), remedy="see phlora compress --help") from error
    opened, out = lora.open_adapter(url), storage.normalize(out)
    _require_elsewhere(opened, out)
    _require_no_groups(opened)
    dialect = dialect or ("kohya" if opened.kohya else "portable")
    if targets.server_rules("", dialect).unets_only != opened.kohya:
        theirs, wanted = ("kohya", "PEFT") if opened.kohya else ("PEFT", "kohya")
        raise RequestError(
            f"the keys of {opened.url} are {theirs}'s, and --for {dialect} reads {wanted}'s",
            remedy="compress it as it is: leave --for out",
        )
    request = Request(opened, out, rank, policy, dialect, _dtype(opened, dtype), base_name or opened.base_name)
    checked(opened, rank, policy, dialect, request.dtype)
    return request


def _require_elsewhere(opened: Adapter, out: str) -> None:
    """With --overwrite the source would be removed before it is read."""
    source = opened.weights.rpartition("/")[0]
    if source == out or (out.startswith("/") and os.path.realpath(source) == os.path.realpath(out)):
        raise RequestError(f"{out} is where the adapter itself lies", remedy="choose another output folder")


def _require_no_groups(opened: Adapter) -> None:
    """PEFT's A of a grouped convolution is mostly zeros, and stays as large as they are at any rank."""
    if grouped := [name for name, module in opened.modules.items() if module.form == "groups"]:
        raise RequestError(
            f"{opened.url} adapts grouped convolutions, which are not compressed: {grouped[0]}, {len(grouped)} of {len(opened.modules)} modules",
            remedy="extract it from its checkpoints at the smaller rank: phlora extract --conv-groups",
        )


def _dtype(opened: Adapter, asked: str) -> str:
    """What was asked for, or for `auto` that of most of its entries."""
    of_factors = ((module.A.dtype, module.numel) for module in opened.modules.values())
    return asked if asked != "auto" else adapter.dtype_of_most(of_factors)
