"""From what is due to plans: headers are read, each base's once; whoever cannot be planned is told apart, and why."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from phlora_pipeline import pipeline, storage
from phlora_pipeline.checkpoint import Checkpoint, open_checkpoint
from phlora_pipeline.config import RunConfig
from phlora_pipeline.errors import ConflictError, RequestError, SourceChangedError
from phlora_pipeline.pipeline import Prepared
from phlora_pipeline.zoo import layout
from phlora_pipeline.zoo.standing import Standing, as_opened
from phlora_pipeline.zoofile import ZooConfig

_OPENERS = 8

Error = RequestError | SourceChangedError


@dataclass(frozen=True, slots=True)
class Ready:
    """A model that can be converted.

    Attributes:
        standing: where it stood; its request is for the checkpoints as they were opened.
        config: its extraction, with the version's folder as `out`.
        prepared: its plan.
        stands: whether the adapter is there already: a night ended before it could say so.
    """

    standing: Standing
    config: RunConfig
    prepared: Prepared
    stands: bool

    @property
    def id(self) -> str:
        """Of the model."""
        return self.standing.entry.id


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is due, sorted.

    Attributes:
        ready: to be converted.
        refused: and why: the pair is wrong, or changes while it is looked at.
        deferred: beyond the limits of one run.
    """

    ready: tuple[Ready, ...]
    refused: tuple[tuple[Standing, Error], ...]
    deferred: tuple[Standing, ...]


def prepare(config: ZooConfig, due: Sequence[Standing]) -> Preparation:
    """Plan what is due, as far as the limits go.

    Those that were tried in vain before come last: they must not keep others from being converted.

    Raises:
        CredentialsError, StorageError: no model can be blamed for these.
    """
    ordered = sorted(due, key=lambda standing: (len(standing.attempts), standing.entry.id))
    most = config.limits.max_models or len(ordered)
    found = plan_all(config, ordered[:most])
    ready: list[Ready] = []
    refused: list[tuple[Standing, Error]] = []
    deferred, nbytes, bases = ordered[most:], 0, set[str]()
    for standing, made in zip(ordered[:most], found, strict=True):
        if not isinstance(made, Ready):
            refused.append((standing, made))
            continue
        wanted = _to_read(config, made, bases)
        if config.limits.max_bytes and nbytes + wanted > config.limits.max_bytes and nbytes:
            deferred.append(standing)  # a smaller one may still fit
            continue
        nbytes += wanted
        ready.append(made)
        if not made.stands:
            bases.add(standing.entry.base_url)
    return Preparation(tuple(ready), tuple(refused), tuple(deferred))


def _to_read(config: ZooConfig, model: Ready, bases: set[str]) -> int:
    """Bytes of tensors, as far as can be told before cohorts are formed: a base is counted once unless none is shared."""
    if model.stands:
        return 0
    tasks = model.prepared.plan.tasks
    shared = config.run.share_base != "off" and model.standing.entry.base_url in bases
    return sum(task.nbytes - (task.base_bytes if shared else 0) for task in tasks)


def plan_all(config: ZooConfig, due: Sequence[Standing]) -> list[Ready | Error]:
    """A plan for each, or why there is none, in the order given."""
    with ThreadPoolExecutor(_OPENERS, thread_name_prefix="phlora-open") as pool:
        urls = sorted({standing.entry.base_url for standing in due})
        bases = dict(zip(urls, pool.map(_open, urls), strict=True))
        return list(pool.map(lambda standing: plan_one(config, standing, bases[standing.entry.base_url]), due))


def plan_one(config: ZooConfig, standing: Standing, base: Checkpoint | Error | None = None) -> Ready | Error:
    """The plan of one model, whose base may be open already."""
    entry = standing.entry
    base = base or _open(entry.base_url)
    if not isinstance(base, Checkpoint):
        return base
    try:
        wanted = entry.settings.run_config(
            base=entry.base_url,
            tuned=entry.url,
            out=storage.join(config.output, entry.id),
            base_name=entry.base_name,
            run=config.run,
        )
        # Below the model's id: two models of the same bytes must not write each other's parts.
        prepared = pipeline.prepare(wanted, base, storage.join(config.output, layout.PARTS, entry.id), entry.id)
        wanted = wanted.model_copy(update={"out": storage.join(config.output, entry.id, prepared.plan.version)})
        opened = as_opened(standing, prepared.base.listed, prepared.tuned.listed)
        return Ready(opened, wanted, prepared, stands=_stands(wanted, prepared))
    except (RequestError, SourceChangedError) as error:
        return error


def _stands(config: RunConfig, prepared: Prepared) -> bool:
    try:
        return pipeline.standing(config, prepared) is not None
    except ConflictError:
        # An adapter of which only some files stand: the same ones will be put again, and the first writer's stay.
        if storage.stat(storage.join(config.out, layout.CONFIG)) is None:
            return False
        # Another night may have put the last of them, and dropped the parts, while this one looked from one to the other.
        return pipeline.standing(config, prepared) is not None


def _open(url: str) -> Checkpoint | Error:
    try:
        return open_checkpoint(url)
    except (RequestError, SourceChangedError) as error:
        return error
