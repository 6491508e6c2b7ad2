"""What became, or would become, of a zoo."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phlora_pipeline.render.text import line, table
from phlora_pipeline.summary import percent, size, span

if TYPE_CHECKING:  # torch comes with them
    from phlora_pipeline.zoo.forecast import Forecast
    from phlora_pipeline.zoo.gc import Garbage
    from phlora_pipeline.zoo.pull import Pulled
    from phlora_pipeline.zoo.result import NightResult
    from phlora_pipeline.zoo.status import Explanation, ModelStatus, ZooStatus

_QUIET = {"published", "unchanged", "committed", "nothing_to_adapt", "gone"}
"""States that need no explanation."""

_SHORT = 12
"""Signs of a version that are shown: enough for `phlora rollback`."""


def night_record(result: NightResult, url: str) -> dict[str, Any]:
    return {**result.as_dict(), "result": url}


def show_night(result: NightResult) -> None:
    for model in result.models:
        if model.state not in _QUIET and model.state != "deferred":
            _told(model.state, model.id, model.reason, model.remedy)
    if not result.run:
        line("nothing due")
    table(("models", "state"), ((str(count), state) for state, count in result.counts.items()))
    if result.run:
        line(f"read {size(result.read_bytes)} of tensors in {result.seconds:.0f} s")


def show_forecast(forecast: Forecast) -> None:
    cluster = forecast.cluster
    line(", ".join(f"{count} {state}" for state, count in forecast.states.items()) or "there are no models in the zoo")
    for reason, count in Counter(model.why for model in forecast.models).most_common():
        line(f"due: {count} × {reason}")
    for model, reason in forecast.refused.items():
        _told("would fail", model, reason, "")
    for model, reason in forecast.waiting.items():
        _told("would wait", model, reason, "")
    if forecast.needs_yes:
        line(f"warning: {forecast.needs_yes}: phlora run converts none of them without --yes")
    if forecast.deferred:
        line(f"deferred to a later night, by the limits: {_some(forecast.deferred)}")
    if not forecast.models:
        line("nothing would be converted")
        return
    table(
        ("model", "base", "tensors", "to read", "adapter", "auto", "exact"),
        (
            (
                model.id,
                model.base,
                "is there already" if model.stands else str(model.tensors),
                size(model.tuned_bytes),
                size(model.adapter_bytes),
                *(span(model.seconds[solver]) for solver in ("auto", "exact")),
            )
            for model in forecast.models
        ),
    )
    line(
        f"{len(forecast.models)} models in {forecast.tasks} tasks and {forecast.cohorts} cohorts; read {size(forecast.read_bytes)}, the bases' shares included"
    )
    line(
        f"on {cluster.nodes} × {cluster.gpus_per_node} workers of profile {cluster.profile}, {size(cluster.node_read_rate)}/s a node, it takes at least:"
    )
    for solver, seconds in forecast.seconds.items():
        price = f", costs {forecast.cost[solver]:.2f}" if solver in forecast.cost else ""
        line(
            f"  solver {solver}: {span(seconds)}{price}; {span(forecast.compute_seconds[solver])} of one worker's time to compute"
        )
    if forecast.gpu_memory:
        line(f"a GPU of {size(forecast.gpu_memory)}: the largest tensor takes {size(forecast.gpu_bytes)}")
    for name, needed in forecast.sliced.items():
        line(
            f"warning: {name} would take {size(needed)}, and does not fit: it is formed slice by slice, or on the processor, and takes longer than is told here"
        )


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def show_status(status: ZooStatus) -> None:
    counts = ", ".join(f"{count} {state}" for state, count in status.counts.items())
    line(f"{len(status.models)} models: {counts}" if status.models else "there are no models in the zoo")
    table(
        ("model", "state", "since", "serves", "kept"),
        (
            (
                model.id,
                model.state,
                _when(model.since),
                _served(model),
                "" if model.kept is None else percent(model.kept),
            )
            for model in status.models
        ),
    )
    due = Counter(model.reason for model in status.models if model.state == "due")
    for reason, count in due.most_common():
        line(f"due: {count} × {reason}")
    for model in status.models:
        if model.state not in {"due", *_QUIET}:
            _told(model.state, model.id, model.reason, model.remedy)
    for problem in status.problems:
        line(f"warning: {problem}")


def show_explanation(told: Explanation) -> None:
    model = told.status
    line(f"{model.id}: {model.state}{f' since {_when(model.since)}' if model.since else ''}")
    for name, text in {
        "cause": model.reason,
        "next": told.next_step,
        "checkpoint": model.url,
        "base": model.base,
        "serves": _served(model),
        "waits behind the pin": told.newest,
    }.items():
        if text:
            line(f"  {name}: {text}")
    if told.history:
        line("history:")
    for event in told.history:
        line(f"  {_when(event.at)}  {' '.join(filter(None, (event.what, event.version)))}{f': {event.reason}' if event.reason else ''}")  # fmt: skip
    if told.versions:
        line("versions:")
    for version in told.versions:
        line(
            f"  {version.version}  {_when(version.committed)}  {size(version.size)}{'  served' if version.served else ''}"
        )


def show_pulled(pulled: Sequence[Pulled], to: str) -> None:
    for item in pulled:
        if item.outcome in {"gone", "failed"}:
            _told(item.outcome, item.model, item.reason or f"not published any more; {item.path} is left as it is", "")
    counts = Counter(item.outcome for item in pulled)
    told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    fetched = sum(item.fetched for item in pulled)
    line(f"{to}: {told}; {size(fetched)} fetched" if pulled else "no adapter is published yet")


def show_garbage(found: Sequence[Garbage], *, deleted: bool) -> None:
    for item in found:
        line(f"{size(item.bytes):>10}  {item.age / 86400:5.1f} days  {item.url}  ({item.reason})")
    total = size(sum(item.bytes for item in found))
    if not found:
        line("nothing to collect")
    elif deleted:
        line(f"removed {len(found)}, {total}")
    else:
        line(f"{len(found)} may go, {total}; nothing was removed: pass --yes")


def _told(state: str, model: str, reason: str, remedy: str) -> None:
    line(f"{state} {model}: {reason}")
    if remedy:
        line(f"  fix: {remedy}")


def _served(model: ModelStatus) -> str:
    return f"{model.serves[:_SHORT]}{' (pinned)' if model.pinned else ''}" if model.serves else ""


def _when(moment: str) -> str:
    """A record's time to the minute.

    >>> _when("2026-11-22T03:04:05.678901+00:00")
    '2026-11-22 03:04Z'
    """
    return f"{moment[:10]} {moment[11:16]}Z" if moment else ""
