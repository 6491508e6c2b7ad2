"""Results in words and tables, or as one JSON object, on stdout."""

from phlora_pipeline.render.compress import show_compression
from phlora_pipeline.render.doctor import finding_record, show_finding
from phlora_pipeline.render.extraction import plan_record, show_plan, show_profile, show_result, show_verification
from phlora_pipeline.render.merging import show_merge
from phlora_pipeline.render.text import json_object, line, printable, show_error
from phlora_pipeline.render.zoo import (
    night_record,
    show_explanation,
    show_forecast,
    show_garbage,
    show_night,
    show_pulled,
    show_status,
)

__all__ = [
    "finding_record",
    "json_object",
    "line",
    "night_record",
    "plan_record",
    "printable",
    "show_compression",
    "show_error",
    "show_explanation",
    "show_finding",
    "show_forecast",
    "show_garbage",
    "show_merge",
    "show_night",
    "show_plan",
    "show_profile",
    "show_pulled",
    "show_result",
    "show_status",
    "show_verification",
]
