"""What will be done, decided from headers alone: which tensors, in which blocks, and which are left out and why. Pure.

No storage, no device, no engine: two opened checkpoints and the user's choices in, a `Plan` of frozen values out. Bad
pairs are refused here, before a tensor is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from phlora_pipeline import lowrank, targets
from phlora_pipeline.carry import Carry, Place
from phlora_pipeline.checkpoint import Checkpoint
from phlora_pipeline.errors import RequestError
from phlora_pipeline.plan.blocks import BLOCK_BYTES, TensorPair, digest_of, make_blocks
from phlora_pipeline.plan.checks import (
    nothing_matches,
    one_rank_for_all,
    require_names_apart,
    require_same_model,
    require_served,
    shares_a_rank,
    warnings_about,
)
from phlora_pipeline.plan.choice import choose, keep_whole, multimodal, of_convolutions, pair_up, tied_modules
from phlora_pipeline.plan.tasks import Member, Task, largest_first
from phlora_pipeline.ranks import FIXED, Policy
from phlora_pipeline.targets import Dialect, Selection

NUMERICS_REVISION = 5
"""Raised when results change, so that an upgrade recomputes a zoo only where it must."""

_RUNTIME_BYTES = 512 << 20


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that an engine and the reducer need to know.

    Attributes:
        extraction_id: digest of what decides the parts.
        version: digest of what decides the adapter.
        tasks: one for each block, largest first.
        left_out: tensors that are measured but not adapted → reason.
        unread: tensors that cannot be compared at all → reason.
        base_only: tensors of the base that the fine-tune lacks.
        matrices: every module of the fine-tune with a matrix that could carry a pair, for whole families.
        dialect: for whom the adapter is written.
        model_type: of the fine-tune, or of the base where that says more.
        modules: every module of the fine-tune.
        tied: (input embedding's module, output module) where they share one weight, whose delta goes on both.
        carried: tensors that are kept whole if they changed → where; they are among those left out of the factors.
        rank: of the adapter, as asked for; the most that it may have where a policy chooses.
        written_rank: of the adapter, as written: the next of the servers' grid.
        rank_grid: ranks that servers compute with; empty where any is.
        per_tensor_ranks: whether each module is written at its own rank, instead of all at the largest.
        policy: how ranks are chosen; those that one chooses are known when all tensors are factorised.
        warnings: in words, for the user.
    """

    extraction_id: str
    version: str
    tasks: tuple[Task, ...]
    left_out: Mapping[str, str]
    unread: Mapping[str, str]
    base_only: tuple[str, ...]
    matrices: Mapping[str, TensorPair]
    dialect: Dialect
    model_type: str
    modules: tuple[str, ...]
    tied: tuple[str, str] | None
    carried: Mapping[str, Place]
    rank: int
    written_rank: int
    rank_grid: tuple[int, ...]
    per_tensor_ranks: bool
    policy: Policy
    warnings: tuple[str, ...]

    def of_rank(self, rank: int) -> Plan:
        """The same plan, once the largest rank that its policy takes is known."""
        return replace(self, rank=rank, written_rank=targets.written_rank(rank, self.rank_grid))

    @property
    def adapted(self) -> tuple[TensorPair, ...]:
        """The pairs that will be factorised, by name."""
        found = (pair for task in self.tasks if task.block.purpose == "factor" for pair in task.block.pairs)
        return tuple(sorted(found, key=lambda pair: pair.name))

    @property
    def grown(self) -> frozenset[str]:
        """Tensors that have more rows than in the base."""
        return frozenset(name.rpartition("[")[0] for name in self.unread if name.endswith(":]"))

    @property
    def parts_folder(self) -> str:
        """Where all its parts are, and no others."""
        return self.tasks[0].members[0].part_url.rpartition("/")[0]

    @property
    def nbytes(self) -> int:
        """Bytes of tensors to read."""
        return sum(task.block.nbytes for task in self.tasks)

    @property
    def flops(self) -> float:
        """Floating-point operations of all factorisations, by their planned routes."""
        return sum(task.flops for task in self.tasks)

    @property
    def adapter_parameters(self) -> int:
        """Numbers in the adapter, zero pairs of whole families left aside."""
        own = sum(self.written_rank * sum(pair.shape) for pair in self.adapted)
        tied = sum(
            self.written_rank * sum(pair.shape) for pair in self.adapted if self.tied and pair.module == self.tied[0]
        )
        return own + tied

    @property
    def part_bytes(self) -> int:
        """Bytes of all parts: float32 factors at max_rank."""
        members = (member for task in self.tasks for member in task.members if member.block.purpose == "factor")
        return sum(
            4 * len(member.block.pairs) * min(member.settings.max_rank, *member.block.shape) * sum(member.block.shape)
            for member in members
        )

    @property
    def worker_bytes(self) -> int:
        """Peak memory of one worker: its largest task, the next one being read, and the runtime."""
        if not self.tasks:
            return _RUNTIME_BYTES
        return (
            _RUNTIME_BYTES
            + max(task.worker_bytes for task in self.tasks)
            + min(2 * BLOCK_BYTES, max(task.block.read_bytes for task in self.tasks))
        )


@dataclass(frozen=True, slots=True)
class PlanSettings:
    """The choices that shape a plan, free of where things run.

    Attributes:
        rank: of the adapter; the most, where a policy chooses.
        factors: what is wanted of every factorisation.
        profile: rates of the device that the plan is for.
        parts_url: folder of all parts; a part goes to `<parts_url>/<extraction_id>/<block>.safetensors`.
        model: its id in a zoo.
        carry: whether what has no low-rank form is kept whole.
        policy: how ranks are chosen; a threshold of energy is also the factorisations' own.
        identity: further settings that decide the adapter's bytes (dtype, name of the base …).
    """

    selection: Selection
    dialect: Dialect
    rank: int
    parts_url: str
    factors: lowrank.Settings
    profile: lowrank.Profile = lowrank.PROFILES["cpu"]
    identity: tuple[tuple[str, str], ...] = ()
    model: str = ""
    carry: Carry = "none"
    policy: Policy = FIXED


def make_plan(base: Checkpoint, tuned: Checkpoint, settings: PlanSettings) -> Plan:
    """The plan of one extraction.

    Raises:
        RequestError: different architectures, shapes that differ, or nothing to adapt: nothing has been read.
    """
    require_same_model(base, tuned)
    rules = targets.server_rules(tuned.model_type or base.model_type, settings.dialect)
    require_served(settings.rank, rules)
    pairs, unread = pair_up(base, tuned, settings.selection)
    tied = tied_modules(tuned if tuned.config else base, pairs)
    chosen, left_out = choose(pairs, settings.selection, rules, tied, multimodal=multimodal(base, tuned))
    carried: dict[str, Place] = {}
    if settings.carry == "all":
        chosen, left_out, carried = keep_whole(chosen, left_out, tuned.tensors, settings.selection)
    if not chosen:
        raise nothing_matches(left_out, unread)
    per_tensor = settings.policy.chooses and rules.per_tensor_ranks and not shares_a_rank(chosen, settings.policy)
    grid = () if per_tensor else rules.rank_grid
    reached = {pair.module for pair in chosen} | {targets.module_of(name) for name in carried}
    if rules.unets_only:
        require_names_apart(chosen)
    extraction_id = digest_of(
        {
            "base": base.fingerprint, "tuned": tuned.fingerprint, "factor": sorted(pair.name for pair in chosen),
            "wanted": asdict(settings.factors), "numerics": NUMERICS_REVISION,
            # A profile of one's own may take other routes; the committed ones are chosen by the worker's device.
            "profile": None if settings.profile.name in lowrank.PROFILES else asdict(settings.profile),
        }
    )  # fmt: skip
    written = targets.written_rank(settings.rank, grid)
    version = digest_of(
        {
            "extraction": extraction_id,
            "rank": settings.rank,
            "dialect": settings.dialect,
            **({"ranks": "own"} if per_tensor else {}),
            **settings.policy.identity,
            "tied": tied,
            "carry": settings.carry,
            "model_type": rules.model_type,
            "architectures": tuned.config.get("architectures") or base.config.get("architectures"),
            **dict(settings.identity),
        }
    )
    blocks = [
        *make_blocks("factor", chosen),
        *make_blocks("measure", [pair for pair in pairs if pair.name in left_out]),
    ]
    folder = f"{settings.parts_url}/{extraction_id}"
    members = [Member(settings.model, block, f"{folder}/{block.id}.safetensors", settings.factors) for block in blocks]
    return Plan(
        extraction_id=extraction_id,
        version=version,
        tasks=largest_first(Task((member,), settings.profile) for member in members),
        left_out=left_out,
        unread=unread,
        base_only=tuple(sorted(set(base.tensors) - set(tuned.tensors))),
        matrices={
            pair.module: pair for pair in pairs if not targets.shape_refusal(pair.shape, pair.kind, pair.tuned.dtype)
        },
        dialect=settings.dialect,
        model_type=rules.model_type,
        modules=tuple(sorted({targets.module_of(name) for name in tuned.tensors})),
        tied=tied if tied and tied[0] in reached else None,
        carried=carried,
        rank=settings.rank,
        written_rank=written,
        rank_grid=grid,
        per_tensor_ranks=per_tensor,
        policy=settings.policy,
        warnings=(
            *one_rank_for_all(settings.policy, rules, per_tensor=per_tensor),
            *warnings_about(
                base, tuned, pairs, rank=settings.rank, written=settings.rank if settings.policy.chooses else written
            ),
            *of_convolutions(chosen, tuned.config or base.config),
        ),
    )


def require_fits(plan: Plan, memory_bytes: int | None) -> None:
    """Refuse a plan whose largest task cannot fit.

    Args:
        memory_bytes: what one worker may use; None where it is not known.

    Raises:
        RequestError: with both numbers and the culprit.
    """
    if memory_bytes is None or plan.worker_bytes <= memory_bytes:
        return
    largest = max(plan.tasks, key=lambda task: task.worker_bytes)
    names = ", ".join(pair.name for pair in largest.block.pairs[:3])
    raise RequestError(
        f"it cannot fit: a worker needs {plan.worker_bytes / 2**30:.1f} GiB, {memory_bytes / 2**30:.1f} GiB are there; the largest block is {names} of shape {list(largest.block.shape)}",
        remedy="run it on a larger machine, with fewer workers, or leave the tensor out: --exclude",
    )
