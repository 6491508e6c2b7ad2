"""What will be done, decided from headers alone. Pure: no storage, no device, no engine."""

from phlora_pipeline.plan.blocks import BLOCK_BYTES, Block, Purpose, TensorPair, digest_of
from phlora_pipeline.plan.choice import some
from phlora_pipeline.plan.cohort import Share, cohorts, in_cohorts
from phlora_pipeline.plan.model import NUMERICS_REVISION, Plan, PlanSettings, make_plan, require_fits
from phlora_pipeline.plan.tasks import READ_RATE, Member, Task, largest_first

__all__ = [
    "BLOCK_BYTES", "NUMERICS_REVISION", "READ_RATE", "Block", "Member", "Plan", "PlanSettings", "Purpose", "Share", "Task", "TensorPair",
    "cohorts", "digest_of", "in_cohorts", "largest_first", "make_plan", "require_fits", "some",
]  # fmt: skip
