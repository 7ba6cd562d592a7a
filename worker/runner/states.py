"""When a run saves its state: often enough to lose little, rarely enough to cost little."""

from __future__ import annotations

import time
from pathlib import Path

from unlearning import Step
from worker.runner.contract import Reporter

__all__ = ["StateSchedule"]

LONGEST_SECONDS = 60.0
SHORTEST_SECONDS = 1.0
SHARE_OF_STEPS = 0.05
SHARE_OF_TIME = 0.02


class StateSchedule:
    """Saves a state after 60 s or 5 % of the steps, and before that as soon as saving costs 2 % of the time."""

    def __init__(self, folder: Path, reporter: Reporter) -> None:
        self._folder, self._reporter = folder, reporter
        self._saved_step: int | None = None
        self._saved_at = time.monotonic()
        self._cost = 0.0

    def offer(self, step: Step) -> None:
        """Save this boundary if it is time."""
        since = time.monotonic() - self._saved_at
        steps = step.step - (self._saved_step or 0)
        cheap = since >= max(SHORTEST_SECONDS, self._cost / SHARE_OF_TIME)
        if cheap or since >= LONGEST_SECONDS or steps >= max(1, int(SHARE_OF_STEPS * step.total)):
            self.save(step)

    def save(self, step: Step) -> None:
        """Save this boundary, unless it has been."""
        if step.step == self._saved_step:
            return
        before = time.monotonic()
        path = self._folder / "state" / f"{step.step:08d}.safetensors"
        step.snapshot().save(path)
        self._reporter.state(path, self._folder, step=step.step)
        self._saved_step, self._saved_at = step.step, time.monotonic()
        self._cost = self._saved_at - before
