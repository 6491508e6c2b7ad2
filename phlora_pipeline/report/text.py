"""Markdown for people and pipelines, and one JSON object. Pure; needs no library."""

from __future__ import annotations

import json
from collections.abc import Sequence

from phlora_pipeline import __version__
from phlora_pipeline.report.facts import ModelReport
from phlora_pipeline.report.words import MADE_BY, bound, counted, ranks_told, short, shown, verdict, weight, words
from phlora_pipeline.summary import percent, size, span

_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


def markdown(reports: Sequence[ModelReport], noun: str = "model") -> str:
    """One model in detail, several in a table; `noun` is what they are called."""
    lines = _one(reports[0]) if len(reports) == 1 else _many(reports, noun)
    return "\n".join([f"<!-- {MADE_BY} {__version__} -->", "", *lines, ""])


def as_json(reports: Sequence[ModelReport]) -> str:
    """All but single tensors, which are in the manifests."""
    record = {"report": f"{MADE_BY} {__version__}", "models": [report.as_dict() for report in reports]}
    return json.dumps(record, indent=2) + "\n"


def _one(report: ModelReport) -> list[str]:
    summary = report.summary
    lines = [f"# {_cell(report.model)}", "", verdict(report) or "No tensor is adapted.", ""]
    lines += _table(
        ("what", "value"),
        [
            ("base", _cell(report.base) or "not named"),
            ("version", report.version[:12]),
            ("rank", ranks_told(report.ranks)),
            ("size", ", ".join(filter(None, (size(report.adapter_bytes), weight(report))))),
            (
                f"preserved energy, of the {'original' if report.compressed else 'adapted'} ‖ΔW‖²",
                percent(summary.preserved_energy),
            ),
            ("written energy", percent(summary.written_energy, 2)),
            *(
                []
                if report.compressed
                else [
                    ("coverage, of ‖ΔW‖²", percent(summary.coverage)),
                    ("certificate, worst", bound(report.certificate)),
                ]
            ),
            *([("rounding noise", percent(report.noise_energy, 2))] if report.noise_energy is not None else []),
            *([("time", span(report.run.seconds)), ("read", size(report.run.read_bytes))] if report.run else []),
        ],
    )
    curve = report.curve
    if curve.ranks:
        kept = {rank: (curve.mean[at], curve.lower[at], curve.upper[at], curve.total[at]) for at, rank in enumerate(curve.ranks)}  # fmt: skip
        picked = [rank for rank in kept if rank in _RANKS or rank == curve.ranks[-1]]
        lines += ["", "## Energy against rank", ""]
        lines += _table(
            ("rank", "mean over the layers", "lower quartile", "upper quartile", "of ‖ΔW‖² as a whole"),
            [(str(rank), *map(percent, kept[rank])) for rank in picked],
        )
        lines += ["", "## Size against energy", ""]
        lines += _table(
            ("policy", "choice", "ranks", "size", "energy kept"),
            [
                (choice.way, choice.label, ranks_told(choice.ranks), size(choice.nbytes), percent(choice.energy, 2))
                for choice in report.trade_off.choices
            ],
        )
    if report.groups:
        lines += ["", "## What has no factors", ""]
        lines += _table(
            ("what became of them", "why", "tensors", "share of ‖ΔW‖²"),
            [
                (words(group.status), _cell(group.reason), str(group.tensors), percent(group.share, 2))
                for group in report.groups
            ],
        )
    return lines


def _many(reports: Sequence[ModelReport], noun: str) -> list[str]:
    return [
        f"# {counted(len(reports), noun)}",
        "",
        *_table(
            (noun, "base", "rank", "size", "preserved energy", "written energy", "coverage", "failed"),
            [
                (
                    _cell(report.model),
                    _cell(report.base),
                    ranks_told(report.ranks),
                    size(report.adapter_bytes),
                    percent(report.summary.preserved_energy),
                    percent(report.summary.written_energy),
                    percent(None if report.compressed else report.summary.coverage),
                    str(report.summary.failed),
                )
                for report in reports
            ],
        ),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(row) + " |" for row in rows]


def _cell(text: str) -> str:
    """A stranger's text, harmless inside a table."""
    flat = short(shown(" ".join(text.split())), 300)
    return flat.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
