"""What an operator's instruments show of a run: names, and how they follow from its events.

`METRICS` is the list of names. A run's events are all that is measured: the same lines that are written to `events.jsonl`
become samples here, so that what is exported while it runs, what `metrics.prom` holds in the end, and what somebody
computes from the events later are the same numbers. A run counts from zero: a counter's value is tonight's.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
"""Upper bounds, in seconds, of every histogram."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A name.

    Attributes:
        name: without what Ray puts before it.
        kind: as Prometheus has it.
        help: in words.
        label: what tells its series apart; empty where there is one only.
        values: of the label, those that are there from the beginning, with 0.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    label: str = ""
    values: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("phlora_run_started_timestamp_seconds", "gauge", "When the run began, in seconds since the epoch"),
        Metric("phlora_run_ended_timestamp_seconds", "gauge", "When it ended, well or not; missing while it runs"),
        Metric("phlora_run_exit_code", "gauge", "What it ended with: 0, 3, 11, 12, 14, 143; missing while it runs"),
        Metric(
            "phlora_last_converted_timestamp_seconds", "gauge", "When the last model was published; missing before that"
        ),
        Metric("phlora_zoo_models", "gauge", "Every model of the zoo at the end of the run, by state", "state"),
        Metric(
            "phlora_models_total", "counter", "Models that have ended tonight, by state", "state",
            ("committed", "failed", "changed", "deferred"),
        ),
        Metric("phlora_tasks_total", "counter", "Tasks done, by whether their parts were there already", "outcome", ("computed", "reused")),
        Metric(
            "phlora_tensors_total", "counter", "Tensors factorised, by route; failed: those that could not be", "route",
            ("krylov", "gram", "exact", "failed"),
        ),
        Metric("phlora_check_failures_total", "counter", "Factorisations that did not stand their checks, and were made again"),
        Metric("phlora_read_bytes_total", "counter", "Bytes read from storage, by all processes"),
        Metric("phlora_written_bytes_total", "counter", "Bytes written to storage, by all processes"),
        Metric(
            "phlora_storage_retries_total", "counter", "Requests to storage that had to be repeated, by reason", "reason",
            ("throttled", "conflict", "server", "connection", "damaged"),
        ),
        Metric(
            "phlora_retries_total", "counter", "Work that was done again, by reason", "reason",
            ("worker_died", "task_failed", "source_changed", "publication_failed", "certificate", "memory", "solver_error"),
        ),
        Metric(
            "phlora_stage_seconds_total", "counter", "Seconds of all processes by stage; wait: a device waits for bytes", "stage",
            ("look", "prepare", "wait", "compute", "publish"),
        ),
        Metric("phlora_task_seconds", "histogram", "How long a task takes"),
    )
}  # fmt: skip
"""By name."""


@dataclass(frozen=True, slots=True)
class Sample:
    """To be added to a counter, put in the place of a gauge, or observed by a histogram.

    Attributes:
        name: of a metric.
        value: how much.
        label: value of its label, if it has one.
    """

    name: str
    value: float
    label: str = ""


Sink = Callable[[Sample], object]
"""Where samples go."""


def samples(event: Mapping[str, Any]) -> Iterator[Sample]:
    """What an event of a run, a line of `events.jsonl`, adds."""
    made = _OF_EVENTS.get(event["event"])
    if made is not None:
        yield from made(event)


def note_kind(note: str) -> Literal["check", "certificate", "memory", "solver_error"]:
    """What a solver's note on another try is about.

    >>> note_kind("krylov 112: singular vectors are not orthogonal (2.0e-01)"), note_kind("krylov 8: certificate 2e-2 over 1e-3")
    ('check', 'certificate')
    """
    if any(words in note for words in _OF_CHECKS):
        return "check"
    if ": certificate " in note:
        return "certificate"
    return "memory" if any(words in note for words in _OF_MEMORY) else "solver_error"


_OF_CHECKS = ("factors are not finite", "are not orthogonal", "see another matrix", "do not add up")
_OF_MEMORY = ("out of memory", "done on the processor", "slice by slice")
_SECONDS = "phlora_stage_seconds_total"


def _began(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample("phlora_run_started_timestamp_seconds", event["time"])


def _stage(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample(_SECONDS, event["seconds"], event["stage"])


def _task(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample("phlora_tasks_total", 1, "reused" if event["reused"] else "computed")
    for solver, count in event["routes"].items():
        yield Sample("phlora_tensors_total", count, solver.partition(" ")[0])
    yield Sample("phlora_tensors_total", len(event["failed"]), "failed")
    for kind, count in event["second_tries"].items():
        yield (
            Sample("phlora_check_failures_total", count)
            if kind == "check"
            else Sample("phlora_retries_total", count, kind)
        )
    yield Sample(_SECONDS, event["waited"], "wait")
    yield Sample(_SECONDS, max(event["seconds"] - event["waited"], 0.0), "compute")
    yield Sample("phlora_task_seconds", event["seconds"])
    yield from _storage(event)


def _storage(event: Mapping[str, Any]) -> Iterator[Sample]:
    traffic = event["storage"]
    yield Sample("phlora_read_bytes_total", traffic["read"])
    yield Sample("phlora_written_bytes_total", traffic["written"])
    for reason, count in traffic["retries"].items():
        yield Sample("phlora_storage_retries_total", count, reason)


def _published(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample(_SECONDS, event["seconds"], "publish")
    yield from _storage(event)


def _retry(event: Mapping[str, Any]) -> Iterator[Sample]:
    of_model = ("publication_failed", "source_changed")
    died, otherwise = of_model if "model" in event else ("worker_died", "task_failed")
    yield Sample("phlora_retries_total", 1, died if event["died"] else otherwise)


def _model(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield Sample("phlora_models_total", 1, event["state"])
    if event["state"] == "committed":
        yield Sample("phlora_last_converted_timestamp_seconds", event["time"])


def _ended(event: Mapping[str, Any]) -> Iterator[Sample]:
    yield from _storage(event)
    for state, count in event["models"].items():
        yield Sample("phlora_zoo_models", count, state)
    yield Sample("phlora_run_ended_timestamp_seconds", event["time"])
    yield Sample("phlora_run_exit_code", event["exit_code"])


_OF_EVENTS: Mapping[str, Callable[[Mapping[str, Any]], Iterator[Sample]]] = {
    "began": _began, "stage": _stage, "task": _task, "published": _published, "retry": _retry, "model": _model, "ended": _ended,
}  # fmt: skip


@dataclass(slots=True, eq=False)
class Totals:
    """Samples, added up."""

    _values: dict[str, dict[str, float]] = field(default_factory=dict)
    _counts: dict[str, list[int]] = field(
        default_factory=dict
    )  # histogram → observations by bucket, the last without bound

    def __post_init__(self) -> None:
        for metric in METRICS.values():
            unlabelled = ("",) if metric.kind != "gauge" and not metric.label else ()
            self._values[metric.name] = dict.fromkeys((*metric.values, *unlabelled), 0.0)
            if metric.kind == "histogram":
                self._counts[metric.name] = [0] * (len(BUCKETS) + 1)

    def add(self, sample: Sample) -> None:
        """One more."""
        metric, values = METRICS[sample.name], self._values[sample.name]
        values[sample.label] = sample.value + (values.get(sample.label, 0.0) if metric.kind != "gauge" else 0.0)
        if metric.kind == "histogram":
            self._counts[sample.name][bisect.bisect_left(BUCKETS, sample.value)] += 1

    def text(self) -> str:
        """As Prometheus reads it."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry).decode()

    def collect(self) -> Iterable[Any]:
        """For prometheus_client: every metric with its series."""
        from prometheus_client import core

        for metric in METRICS.values():
            labels, values = [metric.label] if metric.label else [], self._values[metric.name]
            if metric.kind == "histogram":
                histogram = core.HistogramMetricFamily(metric.name, metric.help)
                histogram.add_metric([], self._cumulative(metric.name), sum(values.values()))
                yield histogram
                continue
            family = core.CounterMetricFamily if metric.kind == "counter" else core.GaugeMetricFamily
            made = family(metric.name, metric.help, labels=labels)
            for label, value in sorted(values.items()):
                made.add_metric([label] if labels else [], value)
            yield made

    def _cumulative(self, name: str) -> list[tuple[str, float]]:
        total, told = 0, []
        for bound, count in zip([*map(str, BUCKETS), "+Inf"], self._counts[name], strict=True):
            total += count
            told.append((bound, float(total)))
        return told
