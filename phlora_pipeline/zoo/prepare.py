"""From what is due to plans: headers are read, each base's once; whoever cannot be planned is told apart, and why."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from phlora_pipeline import pipeline, storage
from phlora_pipeline.checkpoint import Checkpoint, open_checkpoint
from phlora_pipeline.config import RunConfig
from phlora_pipeline.errors import ConflictError, RequestError, SourceChangedError
from phlora_pipeline.pipeline import Prepared
from phlora_pipeline.plan import Task, in_cohorts
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
        tasks: all of theirs, in cohorts.
        refused: and why: the pair is wrong, or changes while it is looked at.
        deferred: beyond the limits of one run, or not come to before it was to stop.
    """

    ready: tuple[Ready, ...]
    tasks: tuple[Task, ...]
    refused: tuple[tuple[Standing, Error], ...]
    deferred: tuple[Standing, ...]


def prepare(
    config: ZooConfig, due: Sequence[Standing], workers: int, stopping: Callable[[], bool] = lambda: False
) -> Preparation:
    """Plan what is due, as far as the limits go.

    Those that were tried in vain before come last: they must not keep others from being converted.

    Args:
        config: the zoo.
        due: what is.
        workers: that will share the work: cohorts, and so how often a base is read, depend on it.
        stopping: once it says so, no further model is planned.

    Raises:
        CredentialsError, StorageError: no model can be blamed for these.
    """
    ordered = sorted(due, key=lambda standing: (len(standing.attempts), standing.entry.id))
    chosen = ordered[: config.limits.max_models or len(ordered)]
    found = plan_all(config, chosen, stopping)
    ready = [made for made in found if isinstance(made, Ready)]
    refused = [(standing, made) for standing, made in zip(chosen, found, strict=False) if not isinstance(made, Ready)]
    kept, tasks = _within_bytes(config, ready, workers)
    begun = {model.id for model in kept} | {standing.entry.id for standing, _ in refused}
    deferred = [standing for standing in ordered if standing.entry.id not in begun]
    return Preparation(tuple(kept), tasks, tuple(refused), tuple(deferred))


def _within_bytes(config: ZooConfig, ready: Sequence[Ready], workers: int) -> tuple[list[Ready], tuple[Task, ...]]:
    """As many of them as may be read, but one at least: a large one must not wait for ever. And their tasks."""
    most = int(config.limits.max_bytes)
    if not most:
        return list(ready), _in_cohorts(config, ready, workers)
    standing, kept = [model for model in ready if model.stands], list[Ready]()
    nbytes, bases = 0, set[str]()
    for model in ready:
        if not model.stands:
            wanted = _to_read(config, model, bases)
            if nbytes + wanted <= most or not kept:  # a smaller one than this may still fit
                kept.append(model)
                bases.add(model.standing.entry.base_url)
                nbytes += wanted
    # Into how many cohorts these come is known only now, and with it how often their bases are read.
    fits = bisect.bisect_right(
        range(1, len(kept) + 1), most, key=lambda count: _bytes(_in_cohorts(config, kept[:count], workers))
    )
    kept = kept[: max(fits, 1)]
    return [*standing, *kept], _in_cohorts(config, kept, workers)


def _to_read(config: ZooConfig, model: Ready, bases: set[str]) -> int:
    """Bytes of tensors at least: a base is counted once, unless none is shared."""
    tasks = model.prepared.plan.tasks
    shared = config.run.share_base != "off" and model.standing.entry.base_url in bases
    return _bytes(tasks) - (sum(task.base_bytes for task in tasks) if shared else 0)


def _bytes(tasks: Sequence[Task]) -> int:
    return sum(task.nbytes for task in tasks)


def _in_cohorts(config: ZooConfig, ready: Sequence[Ready], workers: int) -> tuple[Task, ...]:
    """All tasks of the models that do not stand already."""
    models = {model.id: model.prepared.plan.tasks for model in ready if not model.stands}
    return in_cohorts(models, config.run.share_base, workers) if models else ()


def plan_all(
    config: ZooConfig, due: Sequence[Standing], stopping: Callable[[], bool] = lambda: False
) -> list[Ready | Error]:
    """A plan for each, or why there is none, in the order given; fewer where it is to stop."""
    with ThreadPoolExecutor(_OPENERS, thread_name_prefix="phlora-open") as pool:
        urls = sorted({standing.entry.base_url for standing in due})
        bases = dict(zip(urls, pool.map(_open, urls), strict=True))
        planned = pool.map(lambda standing: plan_one(config, standing, bases[standing.entry.base_url]), due)
        found = list(itertools.takewhile(lambda _: not stopping(), planned))
        pool.shutdown(cancel_futures=True)
        return found


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
