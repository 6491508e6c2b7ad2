"""Folders that are either complete or not there: written aside, renamed when done, so that a second call can re-use them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` when the block ends well, and nothing when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    aside.chmod(0o777 & ~_umask())  # mkdtemp's folder is for its owner alone
    try:
        yield aside
        try:
            aside.rename(target)
        except OSError:
            if not target.exists():  # another call was quicker, and made the same
                raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
