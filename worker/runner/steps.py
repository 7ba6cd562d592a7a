"""A method at work under the contract: it goes on from a state, reports each step, saves states, stops when told to."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import unlearning
from unlearning import Callback, State, StateError, Step
from worker.runner.contract import Interrupted, Phase, Reporter, Stop
from worker.runner.problems import UserError
from worker.runner.states import StateSchedule

__all__ = ["Clock", "Method", "batches_reported", "drive", "earlier_state", "say"]

R = TypeVar("R")
Method = Callable[[State | None, Callback], R]
"""A method with its inputs bound: from a state or the beginning, calling back at every step."""


def earlier_state(job: Mapping[str, Any], folder: Path) -> State | None:
    """The state of an earlier attempt. One that cannot be read costs the work since, and not the job."""
    if not job["resume"]:
        return None
    try:
        return State.load(folder / job["resume"])
    except StateError as error:
        say(f"the state is left out: {type(error).__name__}")
        return None


def drive(
    method: Method[R],
    state: State | None,
    *,
    clock: Clock,
    folder: Path,
    reporter: Reporter,
    stop: Stop,
    opens: Phase | None = None,
) -> R:
    """Let a method work to its end.

    Args:
        method: what to run.
        state: of an earlier attempt; one that belongs to another run is left out.
        clock: tells how long it will take.
        folder: the job's; states are written below it.
        reporter: told of every step and state.
        stop: looked at after every step.
        opens: the phase that begins with the first step; None: it has begun.

    Raises:
        UserError: the run diverged, or its inputs cannot be used.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    schedule = StateSchedule(folder, reporter)
    last: list[Step] = []

    def callback(step: Step) -> None:
        stop.at_steps()
        if opens is not None and not last:
            reporter.phase(opens)
        last[:] = [step]
        eta = clock.eta(step)
        reporter.progress(step=step.step, total=step.total, eta_seconds=eta, losses=step.losses, metrics=step.metrics)
        if stop.requested:
            schedule.save(step)
            raise unlearning.Interrupted
        schedule.offer(step)

    def attempt(state: State | None) -> R:
        with stop.at_once():  # up to the first step there is nothing new to save
            return method(state, callback)

    try:
        try:
            result = attempt(state)
        except StateError:
            say("the state belongs to another run, such as one of an older release, and is left out")
            result = attempt(None)
    except unlearning.Interrupted as error:
        raise Interrupted from error
    except unlearning.DivergedError as error:
        raise UserError("diverged", "The run diverged", str(error)) from error
    except unlearning.InputError as error:
        raise UserError("unusable-input", "The images cannot be used", str(error)) from error
    if last:
        schedule.save(last[0])  # the engine still is at this boundary: whoever evaluates next need not unlearn again
    return result


def batches_reported(reporter: Reporter) -> Callable[[int, int], None]:
    """A judge's progress: called with (step, total) after each batch, whose pace says when it ends."""
    began = time.monotonic()

    def on_progress(step: int, total: int) -> None:
        eta = (time.monotonic() - began) * (total - step) / max(1, step)
        reporter.progress(step=step, total=total, eta_seconds=eta)

    return on_progress


class Clock:
    """When a run will end: by a metric's way to its target so far, and at the latest when its steps are used up.

    Args:
        metric: its name among the step's metrics, where there is one; a higher value is nearer to the end.
        target: the value at which the run ends.
    """

    def __init__(self, metric: str | None = None, target: float = math.inf) -> None:
        self._metric, self._target = metric, target
        self._first: tuple[float, int, float] | None = None

    def eta(self, step: Step) -> float | None:
        """Seconds that are left, or None at the first step."""
        now = time.monotonic()
        value = step.metrics.get(self._metric, math.nan) if self._metric else 0.0
        if self._first is None or not math.isfinite(self._first[2]):
            self._first = (now, step.step, value)
            return None
        began, first_step, first_value = self._first
        elapsed = now - began
        latest = (step.total - step.step) * elapsed / max(1, step.step - first_step)
        gained = value - first_value
        if not (math.isfinite(gained) and gained > 0):
            return latest
        return min(latest, max(0.0, self._target - value) * elapsed / gained)


def say(text: str) -> None:
    """A line for the worker's log; never anything that came from the caller."""
    sys.stderr.write(text + "\n")
