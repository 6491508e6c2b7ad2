"""One night: what is due is planned, converted by base, and published model after model. Overlap with another one is harmless.

The method, in the order of the code: look where every model stands; prepare what is due (headers); form cohorts; give the
tasks to an engine; publish each model as soon as its last part is there; write down what happened.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from phlora_pipeline import driver
from phlora_pipeline.engine import Resources
from phlora_pipeline.errors import PhloraError, RequestError
from phlora_pipeline.extract import checked_device
from phlora_pipeline.machine import default_threads
from phlora_pipeline.runlog import Run
from phlora_pipeline.zoo import dataset
from phlora_pipeline.zoo.catalog import catalog
from phlora_pipeline.zoo.lead import Lead
from phlora_pipeline.zoo.prepare import prepare
from phlora_pipeline.zoo.result import FAILURES, STOPPED, ModelResult, NightResult, Observer
from phlora_pipeline.zoo.standing import Standing, standings
from phlora_pipeline.zoo.state import Ledger
from phlora_pipeline.zoofile import ZooConfig

_WORKERS = 8
"""That a cluster is taken to have where the config does not say, for the size of cohorts alone."""


def night(
    config: ZooConfig, observer: Observer, *, yes: bool = False, stopping: Callable[[], bool] = lambda: False
) -> NightResult:
    """Convert what is due.

    Args:
        config: the zoo.
        observer: is told.
        yes: whether more than `limits.max_models_due` may be converted.
        stopping: asked again and again; once it says so no task begins, and what has begun is finished.

    Raises:
        RequestError: more is due than may be without `yes`; nothing was written.
        CredentialsError, StorageError, DeviceError: nobody can go on, and no model is blamed. What was published stays.
    """
    began = time.monotonic()
    tables = dataset.tables(config.output)  # before outcomes are read: see `dataset.repair`
    ledger = Ledger.read(config.output)
    found = standings(catalog(config), ledger)
    observer.looked(found)
    due = [standing for standing in found if standing.state == "due"]
    require_allowed(config, due, yes=yes)
    for told in dataset.repair(config.output, tables, found, ledger):
        observer.warn(told)
    if not due:
        return _result("", found, {}, 0, 0.0, stopped=False)
    resources = _resources(config)
    run = Run.begin(config.output, config.model_dump(mode="json", by_alias=True))
    run.stage("look", time.monotonic() - began)
    try:
        models = _converted(config, due, resources, observer, run, stopping)
    except PhloraError as error:
        with contextlib.suppress(PhloraError):  # where storage itself is the error, there is no place to write it down
            run.end({"exit_code": error.exit_code, "error": error.what, "remedy": error.remedy})
            error.result = run.result_url
        raise
    result = _result(
        run.url.rpartition("/")[2], found, models, run.nbytes, run.seconds, stopped=stopping()
    )  # fmt: skip
    run.end(result.as_dict())
    return result


def require_allowed(config: ZooConfig, due: Sequence[Standing], *, yes: bool) -> None:
    """Refuse to convert half a zoo anew because, say, a base was replaced, unless somebody has looked.

    Raises:
        RequestError: with the reasons why so many are due.
    """
    most = config.limits.max_models_due
    if yes or not most or len(due) <= most:
        return
    why = Counter(standing.reason for standing in due).most_common(3)
    raise RequestError(
        f"{len(due)} models are due, more than limits.max_models_due ({most}): {'; '.join(f'{count} × {reason}' for reason, count in why)}",
        remedy="look at phlora plan; if it is meant, pass --yes or raise the limit",
    )


def _converted(
    config: ZooConfig,
    due: Sequence[Standing],
    resources: Resources,
    observer: Observer,
    run: Run,
    stopping: Callable[[], bool],
) -> dict[str, ModelResult]:
    lead = Lead(config, run, observer, stopping)
    began = time.monotonic()
    workers = 1 if config.run.engine == "local" else config.run.workers or _WORKERS
    prepared = prepare(config, due, workers, stopping)
    run.stage("prepare", time.monotonic() - began)
    for standing, error in prepared.refused:
        lead.refuse(standing, error)
    why = "the run was stopped before it was planned" if stopping() else "beyond the limits of one run"
    for standing in prepared.deferred:
        lead.end(standing.entry.id, "deferred", f"{why}; it will be due again")
    lead.expect(prepared.ready)
    tasks = prepared.tasks
    observer.planned(tasks, len(prepared.ready))
    driver.engine(config.run.engine, config.run.device, len(tasks))(tasks, resources, lead)
    lead.defer_the_rest()
    return lead.results


def _resources(config: ZooConfig) -> Resources:
    run = config.run
    if run.engine != "ray":
        checked_device(run.device)
    return Resources(run.device, run.threads or default_threads(), run.workers, run.gpus_per_worker)


def _result(
    run: str,
    found: Sequence[Standing],
    ended: Mapping[str, ModelResult],
    read: int,
    seconds: float,
    *,
    stopped: bool,
) -> NightResult:
    models = []
    for standing in found:
        version = standing.outcome.version if standing.outcome else ""
        untouched = ModelResult(standing.entry.id, standing.state, standing.reason, standing.remedy, version)
        models.append(ended.get(standing.entry.id, untouched))
    failed = any(model.state in FAILURES for model in models)
    return NightResult(run, STOPPED if stopped else 3 if failed else 0, tuple(models), read, seconds)
