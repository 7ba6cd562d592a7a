"""What a chaos job does, drawn from its seed alone: the runner plays it, the audit knows what to expect.

Standard library alone: the stub runner, of which there are thousands, imports this.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal

__all__ = ["REAL", "Profile", "is_real", "profile"]

REAL = 100  # one seed in so many is run by the real runner
SEVERAL_PARTS = 18 * 2**20  # as the store takes them: 8 MiB each
Ending = Literal["succeeded", "criteria_not_met", "user_error"]


@dataclass(frozen=True)
class Profile:
    """How a stub job goes: ``steps`` of ``step_seconds``, a state every ``state_every`` of them, then its ending."""

    steps: int
    step_seconds: float
    state_every: int
    ending: Ending
    fits_at_divisor: int  # below this micro-batch divisor it runs out of memory half way
    padding: int  # bytes of its weights beyond a few: some go out in parts


def is_real(seed: int) -> bool:
    """Whether the real runner runs this job."""
    return seed % REAL == REAL - 1


def profile(seed: int, pace: float = 1.0) -> Profile:
    """The stub's part. ``pace`` scales the length of a step."""
    draw = random.Random(seed)
    ending: Ending = draw.choices(("succeeded", "criteria_not_met", "user_error"), (85, 10, 5))[0]
    return Profile(
        steps=draw.randint(5, 60),
        step_seconds=pace * draw.uniform(0.01, 0.05),
        state_every=draw.randint(3, 10),
        ending=ending,
        fits_at_divisor=draw.choices((1, 2, 4), (90, 7, 3))[0],
        padding=draw.choices((0, SEVERAL_PARTS), (95, 5))[0],
    )
