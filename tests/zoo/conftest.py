"""An output to keep a zoo in, in each store that can be written to."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def out(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of an empty output: a folder, and one on a real S3 server."""
    return str(tmp_path / "out") if request.param == "local" else str(request.getfixturevalue("s3").url("out"))
