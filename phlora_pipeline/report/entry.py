"""A model in the page over all: what is left of its report when its own page is written."""

from __future__ import annotations

from dataclasses import dataclass

from phlora_pipeline.report.curve import EnergyCurve
from phlora_pipeline.report.facts import ModelReport
from phlora_pipeline.summary import Summary


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the table, and a curve of the figure.

    Attributes:
        name: no two models of a page share one.
        href: of its page, relative to the index.
        model: its name, which others of the page may share.
        others: as in `ModelReport`.
    """

    name: str
    href: str
    model: str
    base: str
    ranks: tuple[int, int] | None
    adapter_bytes: int
    checkpoint_bytes: int
    checkpoint: str
    compressed: bool
    certificate: float | None
    summary: Summary
    curve: EnergyCurve

    @property
    def share(self) -> float | None:
        """Of the checkpoint's size."""
        return self.adapter_bytes / self.checkpoint_bytes if self.checkpoint_bytes else None


def entry(report: ModelReport, name: str, href: str) -> Entry:
    """Of a model's report."""
    return Entry(
        name,
        href,
        report.model,
        report.base,
        report.ranks,
        report.adapter_bytes,
        report.checkpoint_bytes,
        report.checkpoint,
        report.compressed,
        report.certificate,
        report.summary,
        report.curve,
    )
