"""`benchmarks.json`: a dictionary of sections, each a dictionary of rows; a new measurement replaces the row it repeats."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read(path: Path) -> dict[str, Any]:
    """What is there; nothing, where there is no file yet."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def merged(old: dict[str, Any], section: str, rows: dict[str, Any]) -> dict[str, Any]:
    """The results with these rows in this section.

    >>> merged({"limit": {"a": 1, "b": 1}}, "limit", {"b": 2})
    {'limit': {'a': 1, 'b': 2}}
    """
    return {**old, section: {**old.get(section, {}), **rows}}


def save(path: Path, section: str, rows: dict[str, Any]) -> None:
    """Merge into the file; whole or not at all."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(json.dumps(merged(read(path), section, rows), indent=1, ensure_ascii=False) + "\n")
    aside.replace(path)
