"""When a run saves what it can go on from: often enough to lose little, rarely enough to cost little."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlearning import Step
from worker.runner.contract import Reporter

__all__ = ["Cadence", "StateSchedule"]

LONGEST_SECONDS = 60.0
SHORTEST_SECONDS = 1.0
SHARE_OF_STEPS = 0.05
SHARE_OF_TIME = 0.02


class Cadence:
    """Says when it is time to save: after 60 s, and before that as soon as saving costs 2 % of the time."""

    def __init__(self) -> None:
        self._saved_at, self._cost = time.monotonic(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        cheap = max(SHORTEST_SECONDS, self._cost / SHARE_OF_TIME)
        return time.monotonic() - self._saved_at >= min(LONGEST_SECONDS, cheap)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which tells what one costs."""
        before = time.monotonic()
        yield
        self._saved_at = time.monotonic()
        self._cost = self._saved_at - before


class StateSchedule:
    """Saves a state of the method when it is time, and after 5 % of the steps in any case."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._folder, self._reporter = folder, reporter
        self._saved_step: int | None = None
        self._cadence = Cadence()

    def offer(self, step: Step) -> None:
        """Save this boundary if it is time."""
        steps = step.step - (self._saved_step or 0)
        if self._cadence.due() or steps >= max(1, int(SHARE_OF_STEPS * step.total)):
            self.save(step)

    def save(self, step: Step) -> None:
        """Save this boundary, unless it has been."""
        if step.step == self._saved_step:
            return
        with self._cadence.saving():
            path = self._folder / "state" / f"{step.step:08d}.safetensors"
            step.snapshot().save(path)
            self._reporter.state(path, self._folder, step=step.step)
        self._saved_step = step.step
