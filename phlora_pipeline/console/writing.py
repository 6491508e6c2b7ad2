"""Progress of a command that writes much: a merge."""

from __future__ import annotations

import time

from phlora_pipeline.console.frame import Quiet, Reporter
from phlora_pipeline.summary import size


class Writing(Reporter):
    """By bytes."""

    def __init__(self, view: Quiet) -> None:
        super().__init__(view)
        self._total = 0

    @property
    def done(self) -> int:
        return self.pace.moved

    def planned(self, shards: int, nbytes: int) -> None:
        self._total = nbytes
        self.pace.begin(nbytes, time.monotonic())
        self._view.say(f"{shards} shards, {size(nbytes)} to write")

    def wrote(self, nbytes: int) -> None:
        more = min(nbytes, self._total - self.pace.moved)  # a retried upload is counted twice
        self.pace.advance(more, more)
        self._view.changed()

    def words(self, now: float) -> str:
        told = f"{size(self.pace.moved)} of {size(self._total)} written, {self.pace.words(now)}"
        return told if self._total else self.first
