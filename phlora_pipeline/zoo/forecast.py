"""What tonight would read, compute, take and cost, from headers alone: per model and in all. Nothing is written.

The time is a lower bound that a good night comes near to: the work of all GPUs shared out evenly, or the bytes at the rate of
the nodes' networks, or the longest single task, whichever is most. Rates are those of the profile and those that the user gives.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from phlora_pipeline.errors import IncompleteError, RequestError
from phlora_pipeline.lowrank import PROFILES, Profile, Solver
from phlora_pipeline.plan import Task
from phlora_pipeline.zoo.catalog import catalog
from phlora_pipeline.zoo.night import require_allowed
from phlora_pipeline.zoo.prepare import Ready, prepare
from phlora_pipeline.zoo.standing import Standing, standings
from phlora_pipeline.zoo.state import Ledger
from phlora_pipeline.zoofile import ZooConfig

SOLVERS: tuple[Solver, ...] = ("auto", "exact")
"""Whose times are told side by side: ours, and the full SVD of the paper."""

GPU_MEMORY = {"sm80": 40e9, "sm90": 80e9}
"""Profile → bytes of such a GPU, at least."""

_USABLE = 0.9
"""Of a GPU's memory; the rest is the driver's, the libraries', and gaps."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where the night would run.

    Attributes:
        nodes, gpus_per_node: how many.
        node_read_rate: bytes per second that one node reads from storage.
        price: of a node, per hour, in whatever currency; 0 where it is not known.
        profile: rates of one GPU, or of one worker on processors.
        gpu_memory: bytes of one GPU; 0: as its kind has at least.
    """

    nodes: int = 1
    gpus_per_node: int = 8
    node_read_rate: float = 3e9
    price: float = 0.0
    profile: str = "sm80"
    gpu_memory: float = 0.0

    @property
    def workers(self) -> int:
        """GPUs in all."""
        return self.nodes * self.gpus_per_node

    @property
    def memory(self) -> float | None:
        """Bytes of one GPU; None where that is not known, and on processors."""
        return self.gpu_memory or GPU_MEMORY.get(self.profile)


@dataclass(frozen=True, slots=True)
class ModelForecast:
    """One model that would be converted.

    Attributes:
        id, base: of the zoo.
        why: it is due.
        tensors: that are read.
        tuned_bytes: of the fine-tune to read; the base's are shared, and counted in all.
        adapter_bytes: of the weights' file, taking every target as changed; the most, where a policy chooses ranks.
        seconds: solver → of one worker, without reading.
        tasks: it has a part in.
        stands: whether the adapter is there already, and only its record is missing.
    """

    id: str
    base: str
    why: str
    tensors: int
    tuned_bytes: int
    adapter_bytes: int
    seconds: dict[str, float]
    tasks: int
    stands: bool


@dataclass(frozen=True, slots=True)
class Forecast:
    """The night as it would be.

    Attributes:
        cluster: that was assumed.
        models: that would be converted, by id.
        refused: id → why it would fail at once.
        waiting: id → what of its upload is not all there.
        deferred: ids beyond the limits.
        states: how many models stand how.
        tasks, cohorts: of the night.
        read_bytes: of tensors; headers and listings are not counted.
        compute_seconds: solver → of one worker, without reading.
        seconds: solver → that the night takes at least on the cluster.
        cost: solver → of the nodes for that time; empty without a price.
        gpu_memory: bytes of one GPU, as far as known.
        gpu_bytes: that the largest tensor takes of them.
        sliced: tensor → the bytes that it would take and that are not there: it is formed slice by slice, or on the
            processor, and takes longer than is told here.
        needs_yes: why the night would not begin without `--yes`; empty where it would.
    """

    cluster: Cluster
    models: tuple[ModelForecast, ...]
    refused: dict[str, str]
    waiting: dict[str, str]
    deferred: tuple[str, ...]
    states: dict[str, int]
    tasks: int
    cohorts: int
    read_bytes: int
    compute_seconds: dict[str, float]
    seconds: dict[str, float]
    cost: dict[str, float]
    gpu_memory: float | None
    gpu_bytes: int
    sliced: dict[str, int]
    needs_yes: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def forecast(config: ZooConfig, cluster: Cluster) -> Forecast:
    """Plan tonight.

    Raises:
        RequestError: the profile is unknown.
        CredentialsError, StorageError: as storage says.
    """
    if cluster.profile not in PROFILES:
        raise RequestError(
            f"there is no profile {cluster.profile!r}", remedy=f"choose one of {', '.join(sorted(PROFILES))}"
        )
    profile = PROFILES[cluster.profile]
    found = standings(catalog(config), Ledger.read(config.output))
    due = [standing for standing in found if standing.state == "due"]
    made = prepare(config, due, cluster.workers)
    tasks = made.tasks
    compute: dict[str, float] = {solver: sum(_seconds(task, solver, profile) for task in tasks) for solver in SOLVERS}
    read = sum(task.nbytes for task in tasks)
    seconds: dict[str, float] = {solver: _night(tasks, solver, profile, cluster) for solver in SOLVERS}
    needed = _device_bytes(tasks, profile)
    room = math.inf if cluster.memory is None else _USABLE * cluster.memory
    hours = {solver: cluster.nodes * each / 3600 for solver, each in seconds.items()}
    return Forecast(
        cluster,
        tuple(_model(ready, profile) for ready in sorted(made.ready, key=lambda ready: ready.id)),
        {standing.entry.id: error.what for standing, error in made.refused if not isinstance(error, IncompleteError)},
        {standing.entry.id: error.what for standing, error in made.refused if isinstance(error, IncompleteError)},
        tuple(sorted(standing.entry.id for standing in made.deferred)),
        _states(found),
        len(tasks),
        len({task.cohort for task in tasks}),
        read,
        compute,
        seconds,
        {solver: cluster.price * each for solver, each in hours.items()} if cluster.price else {},
        cluster.memory,
        max(needed.values(), default=0),
        {name: nbytes for name, nbytes in needed.items() if nbytes > room},
        _needs_yes(config, due),
    )


def _needs_yes(config: ZooConfig, due: Sequence[Standing]) -> str:
    try:
        require_allowed(config, due, yes=False)
    except RequestError as error:
        return error.what
    return ""


def _device_bytes(tasks: Sequence[Task], profile: Profile) -> dict[str, int]:
    """Tensor → what it takes on a GPU, at most."""
    found: dict[str, int] = {}
    for member in (member for task in tasks for member in task.members):
        nbytes = member.device_bytes(profile)
        for pair in member.block.pairs:
            found[pair.name] = max(nbytes, found.get(pair.name, 0))
    return found


def _states(found: Sequence[Standing]) -> dict[str, int]:
    return dict(sorted(Counter(standing.state for standing in found).items()))


def _model(ready: Ready, profile: Profile) -> ModelForecast:
    plan, entry = ready.prepared.plan, ready.standing.entry
    work = () if ready.stands else plan.tasks
    return ModelForecast(
        entry.id,
        entry.base_id,
        ready.standing.reason,
        sum(len(task.block.pairs) for task in work),
        sum(member.tuned_bytes for task in work for member in task.members),
        ready.prepared.outlook().most_bytes,
        {solver: sum(_seconds(task, solver, profile) for task in work) for solver in SOLVERS},
        len(work),
        ready.stands,
    )


def _seconds(task: Task, solver: Solver, profile: Profile) -> float:
    return sum(
        replace(member, settings=replace(member.settings, solver=solver)).seconds(profile) for member in task.members
    )


def _night(tasks: Sequence[Task], solver: Solver, profile: Profile, cluster: Cluster) -> float:
    if not tasks:
        return 0.0
    share = cluster.node_read_rate / cluster.gpus_per_node
    # A worker reads while it computes: a task takes the longer of the two.
    each = [max(_seconds(task, solver, profile), task.nbytes / share) for task in tasks]
    return max(sum(each) / cluster.workers, *each)
