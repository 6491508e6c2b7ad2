"""Actors that die before they have done anything: how long to wait before the next one, and when to give up.

What keeps one from starting, such as a machine that is too busy or a node that has just come, often passes. To start the
next at once finds the same state, many times within seconds. So the pause doubles: it is as long as this has gone on
already. The clock is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass

from phlora_pipeline.dispatch import MAX_ATTEMPTS

SHORTEST_PAUSE = 1.0
LONGEST_PAUSE = 30.0

PATIENCE_SECONDS = 120.0
"""For so long at least it is tried, however quickly they die."""


@dataclass(slots=True)
class FalseStarts:
    """In a row: what has started ends it.

    In a long night many a node goes while a worker starts there, and that is no proof that none can start.
    """

    count: int = 0
    since: float = 0.0

    def another(self, now: float) -> float:
        """One more: when its place should be tried again.

        >>> starts = FalseStarts()
        >>> [starts.another(now) - now for now in (100.0, 101.0, 104.0, 110.0, 180.0)]
        [1.0, 1.0, 4.0, 10.0, 30.0]
        """
        if not self.count:
            self.since = now
        self.count += 1
        return now + min(max(now - self.since, SHORTEST_PAUSE), LONGEST_PAUSE)

    def end(self) -> None:
        """One has started."""
        self.count = 0

    def hopeless(self, places: int, now: float) -> bool:
        """Whether every place has been tried often and long enough."""
        return self.count > MAX_ATTEMPTS * max(places, 1) and now - self.since > PATIENCE_SECONDS
