"""How far a count has come that several parts of the work add to, and when it will be done."""

from __future__ import annotations

import time
from collections.abc import Mapping

from worker.runner.contract import Reporter

__all__ = ["Pace"]


class Pace:
    """Progress over a total. What an earlier attempt has done counts, but tells nothing of how fast this one is."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total, self._began = reporter, total, time.monotonic()
        self._whole = self._found = 0

    def found(self, count: int) -> None:
        """So many of the part that begins are there already."""
        self._found += count

    def at(self, count: int, losses: Mapping[str, float] | None = None) -> None:
        """So many of this part are there now."""
        done = self._whole + count
        left = (time.monotonic() - self._began) * (self._total - done) / max(1, done - self._found)
        self._reporter.progress(step=done, total=self._total, eta_seconds=left, losses=losses)

    def through(self, count: int) -> None:
        """This part is done, and had so many."""
        self._whole += count
