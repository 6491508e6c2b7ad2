"""Progress of a command that writes much: a merge."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Self

from phlora_pipeline.summary import size


class Lines:
    """Plain lines: what will be written, one per interval, and the end."""

    def __init__(self, *, every: float) -> None:
        self._every = every
        self._began = self._told = time.monotonic()
        self._done = self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and self._done and self._every != float("inf"):
            self._tell()

    def planned(self, shards: int, nbytes: int) -> None:
        self._total = nbytes
        if self._every != float("inf"):
            print(f"{shards} shards, {size(nbytes)} to write", file=sys.stderr, flush=True)

    def wrote(self, nbytes: int) -> None:
        self._done = min(self._done + nbytes, self._total)  # a retried upload is counted twice
        if time.monotonic() - self._told >= self._every:
            self._tell()

    def warn(self, text: str) -> None:
        print(f"warning: {text}", file=sys.stderr, flush=True)

    def _tell(self) -> None:
        self._told = time.monotonic()
        seconds = max(self._told - self._began, 1e-3)
        rate = size(self._done / seconds)
        print(
            f"{size(self._done)} of {size(self._total)} written, {rate}/s, {seconds:.0f} s", file=sys.stderr, flush=True
        )


class Bar:
    """A rich bar, by bytes."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._progress.add_task("reading headers", total=None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def planned(self, shards: int, nbytes: int) -> None:
        self._progress.update(self._task, total=nbytes, description=f"{shards} shards")

    def wrote(self, nbytes: int) -> None:
        self._progress.update(self._task, advance=nbytes)

    def warn(self, text: str) -> None:
        self._console.print(f"warning: {text}", style="yellow", highlight=False, markup=False)
