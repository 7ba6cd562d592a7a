"""When a run saves what it can go on from: often enough to lose little, rarely enough to cost little."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
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
    """Says when it is time to save: after 60 s, and before that as soon as saving costs 2 % of the time.

    Args:
        now: the clock, in seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._saved_at, self._cost = now(), 0.0

    def due(self) -> bool:
        """Whether it is time."""
        cheap = max(SHORTEST_SECONDS, self._cost / SHARE_OF_TIME)
        return self._now() - self._saved_at >= min(LONGEST_SECONDS, cheap)

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save, which tells what one costs."""
        before = self._now()
        yield
        self._saved_at = self._now()
        self._cost = self._saved_at - before


class StateSchedule:
    """Saves a state of the method when it is time, and after 5 % of the steps in any case.

    Whoever is killed loses the step at work, which cannot be split, and of those before it less than 60 s and 5 %.

    Args:
        folder: the job's; states are written below it.
        reporter: told of every state.
        now: the clock, in seconds.
    """

    def __init__(self, folder: Path, reporter: Reporter, now: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._reporter = folder, reporter
        self._saved_step: int | None = None
        self._cadence = Cadence(now)

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
