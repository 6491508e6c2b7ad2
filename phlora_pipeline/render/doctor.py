"""What the doctor has found, line by line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from phlora_pipeline.render.text import line

if TYPE_CHECKING:  # torch comes with it
    from phlora_pipeline.doctor import Finding


def show_finding(finding: Finding) -> None:
    line(f"{finding.state:8}{finding.check}: {finding.told}")
    if finding.remedy:
        line(f"          fix: {finding.remedy}")


def finding_record(findings: Sequence[Finding], code: int) -> dict[str, Any]:
    return {"exit_code": code, "findings": [asdict(finding) for finding in findings]}
