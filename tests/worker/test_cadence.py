"""However long steps and saves take, a kill costs little work, and saving costs little time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import hypothesis.strategies as st
from hypothesis import example, given, settings

from tests.worker.runs import Recorder
from unlearning import State, Step
from worker.runner.states import StateSchedule

LONGEST_SECONDS, SHARE_OF_STEPS, SHARE_OF_TIME = 60.0, 0.05, 0.02
"""What is promised; the schedule has its own."""
FORCED = 40
"""Most saves that 5 % of the steps ask for: one a step where there are fewer than forty."""


@dataclass
class Clock:
    """Simulated seconds."""

    at: float = 0.0

    def now(self) -> float:
        """What it shows."""
        return self.at


@dataclass(frozen=True)
class Costly(State):
    """A state whose writing takes a while, and which nobody reads."""

    clock: Clock = field(default_factory=Clock)
    seconds: float = 0.0

    def save(self, path: Path | str) -> None:
        """Nothing but time is spent."""
        self.clock.at += self.seconds


@dataclass
class Loss:
    """What a kill just before a boundary's save is done costs, besides the one step that was at work."""

    steps: int
    seconds: float


def losses(total: int, durations: list[float], save_seconds: float) -> tuple[list[Loss], float, int]:
    """A run whose steps take these times in turn: the loss at each boundary, all of its seconds, and its saves."""
    clock, reporter = Clock(), Recorder()
    state = Costly({}, clock=clock, seconds=save_seconds)
    schedule = StateSchedule(Path("/"), reporter, clock.now)
    found, unsaved = [], Loss(0, 0.0)
    for step in range(1, total + 1):
        found.append(unsaved)
        seconds = durations[step % len(durations)]
        clock.at += seconds
        schedule.offer(Step("unlearning", step, total, {}, {}, lambda: state))
        saved = bool(reporter.messages) and reporter.messages[-1]["step"] == step
        unsaved = Loss(0, 0.0) if saved else Loss(unsaved.steps + 1, unsaved.seconds + seconds)
    return found, clock.at, len(reporter.messages)


def magnitude(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers of any order between the two."""
    return st.floats(0, 1).map(lambda share: low * (high / low) ** share)


@settings(max_examples=60, deadline=None)
@given(
    total=magnitude(3, 30_000).map(int),
    durations=st.lists(magnitude(0.01, 600.0), min_size=1, max_size=5),
    save_seconds=magnitude(0.001, 120.0),
)
@example(total=100_000, durations=[0.01], save_seconds=5.0)
@example(total=3, durations=[600.0], save_seconds=60.0)
@example(total=1000, durations=[59.0], save_seconds=0.1)
def test_a_kill_costs_the_step_at_work_and_little_before_it(
    total: int, durations: list[float], save_seconds: float
) -> None:
    found, seconds, saves = losses(total, durations, save_seconds)

    assert max(loss.steps for loss in found) <= SHARE_OF_STEPS * total
    assert max(loss.seconds for loss in found) < LONGEST_SECONDS
    # A save is as cheap as it may be, or forced: by a minute, by the steps, or as the first, whose cost nobody knows.
    forced = seconds / LONGEST_SECONDS + FORCED + 1
    assert saves * save_seconds <= SHARE_OF_TIME * seconds + forced * save_seconds
