"""Open → plan: two checkpoints' headers and the user's settings, refused or made into a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from phlora_pipeline import adapter, experts, lowrank, names, policy, storage
from phlora_pipeline.adapter import Layout
from phlora_pipeline.checkpoint import Checkpoint, open_checkpoint
from phlora_pipeline.config import RunConfig, read_profile
from phlora_pipeline.errors import DeviceError
from phlora_pipeline.extract import checked_device, profile_of
from phlora_pipeline.plan import Plan, PlanSettings, make_plan
from phlora_pipeline.targets import Selection

PARTS = "_parts"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Two opened checkpoints and the plan that they make."""

    base: Checkpoint
    tuned: Checkpoint
    plan: Plan
    base_name: str
    asked_dtype: str

    @property
    def dtype(self) -> str:
        """Of the adapter."""
        return adapter.pick_dtype(self.asked_dtype, self.plan.adapted)

    def draft(self, plan: Plan, ranks: Mapping[str, int]) -> Layout:
        """The adapter's layout with these ranks, if every tensor has changed."""
        everything = frozenset(self.tuned.tensors)
        return adapter.drafting(everything, self.base.tensors, self.tuned.tensors)(plan, ranks)

    def outlook(self) -> policy.Outlook:
        """What can be said of the adapter's file before a tensor is read."""
        return policy.outlook(self.plan, self.draft, self.dtype)


def plan(config: RunConfig) -> Prepared:
    """Open both checkpoints and plan: reads headers only, writes nothing.

    Raises:
        RequestError: the pair, or a setting, is wrong.
    """
    return prepare(config, open_checkpoint(config.base), storage.join(config.out, PARTS))


def prepare(config: RunConfig, base: Checkpoint, parts_url: str, model: str = "") -> Prepared:
    """The same for a base that is open already: many models share one.

    Args:
        config: what is wanted.
        base: the checkpoint at `config.base`.
        parts_url: folder of parts.
        model: its id in a zoo.
    """
    base, tuned = experts.apart(base, open_checkpoint(config.tuned))
    tuned = names.by_the_names_of(base, tuned)
    base_name = config.base_name or adapter.base_name_from(tuned.config) or adapter.base_name_from(base.config)
    settings = PlanSettings(
        selection=Selection(config.targets, config.include, config.exclude),
        dialect=config.dialect,
        rank=config.most_rank,
        factors=lowrank.Settings(config.max_rank, config.solver, config.tolerance, config.energy),
        profile=_profile(config),
        parts_url=parts_url,
        identity=(("dtype", config.dtype), ("base_name", base_name)),
        model=model,
        carry=config.carry,
        policy=config.policy,
    )
    prepared = Prepared(base, tuned, make_plan(base, tuned, settings), base_name, config.dtype)
    policy.require_budget(prepared.plan, prepared.draft, prepared.dtype)
    return prepared


def _profile(config: RunConfig) -> lowrank.Profile:
    """Of the file that the user names, or of the device that the work is meant for."""
    if config.profile:
        return read_profile(config.profile)
    try:
        return profile_of(checked_device(config.device))
    except DeviceError:  # it may be on another machine; if not, the run says so before it reads
        return lowrank.PROFILES["other"]
