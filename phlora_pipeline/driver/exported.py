"""A run's samples on the metrics port of Ray."""

from __future__ import annotations

import time
from typing import Any

from phlora_pipeline.metrics import BUCKETS, METRICS, Metric, Sample

GAUGE_SECONDS = 2.0
"""How often gauges are set again."""


class Exported:
    """Samples on the metrics port of this process's node, under their names with `ray_` before them."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}
        self._gauges: dict[tuple[str, str], Sample] = {}
        self._told = time.monotonic()

    def again(self) -> None:
        """Ray shows a gauge until its next report, and not any more unless it is set again."""
        if time.monotonic() - self._told > GAUGE_SECONDS:
            self._told = time.monotonic()
            for sample in list(self._gauges.values()):
                self(sample)

    def __call__(self, sample: Sample) -> None:
        metric = METRICS[sample.name]
        if (made := self._made.get(sample.name)) is None:
            made = self._made[sample.name] = _of_ray(metric)
        tags = {metric.label: sample.label} if metric.label else {}
        if metric.kind == "histogram":
            made.observe(sample.value, tags)
        elif metric.kind == "gauge":
            self._gauges[sample.name, sample.label] = sample
            made.set(sample.value, tags)
        elif sample.value:  # Ray refuses to count nothing
            made.inc(sample.value, tags)


def _of_ray(metric: Metric) -> Any:
    from ray.util import metrics

    keys = (metric.label,) if metric.label else ()
    if metric.kind == "histogram":
        return metrics.Histogram(metric.name, metric.help, boundaries=list(BUCKETS), tag_keys=keys)
    kind = metrics.Counter if metric.kind == "counter" else metrics.Gauge
    return kind(metric.name, metric.help, tag_keys=keys)
