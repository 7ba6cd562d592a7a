"""Where a taming run spends its time and its passes, and what part of a gain over the released recipe was waste."""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.glow import Glow

CACHING, SETTLING, EVALUATING, STEPS = "caching", "settling", "evaluating", "steps"
"""What a pass is for: what is computed before the first step, part by part; the tuned part alone, later and without a
gradient; the whole flow without a gradient; a step. Seconds of steps are all that the others leave."""


@dataclass(frozen=True)
class Spent:
    """One run, by what it was spent on."""

    seconds: dict[str, float]
    images: dict[str, int]
    """Passes of one image, each through the part of the flow that was asked for."""


class Tally:
    """Passes through a flow and its copies, which share it."""

    def __init__(self) -> None:
        self._images, self._seconds, self._inside = Counter[str](), defaultdict[str, float](float), False
        self._began = time.monotonic()

    def __deepcopy__(self, memo: object) -> "Tally":
        return self

    @contextmanager
    def note(self, x: Tensor, *, whole: bool) -> Iterator[None]:
        """Count a pass of x (b, ...), unless it is part of another one."""
        if self._inside:
            yield
            return
        part = SETTLING if self._images[STEPS] else CACHING
        kind = STEPS if torch.is_grad_enabled() else EVALUATING if whole else part
        self._inside, began = True, time.monotonic()
        try:
            yield
        finally:
            self._inside = False
        self._images[kind] += len(x)
        if kind != STEPS:  # its backward pass and the optimiser are still to come
            self._seconds[kind] += time.monotonic() - began

    def spent(self) -> Spent:
        """What was spent until now; the clock began with the tally."""
        rest = time.monotonic() - self._began - sum(self._seconds.values())
        return Spent({**self._seconds, STEPS: rest}, dict(self._images))


class CountedGlow(Glow):
    """A Glow that notes its passes."""

    tally: Tally

    @classmethod
    def of(cls, base: Glow) -> "CountedGlow":
        """The same weights, and a tally that begins now."""
        flow = cls(base.image_shape, base.n_bits, **base.architecture)
        flow.load_state_dict(base.state_dict())
        flow.recompute_bytes, flow.tally = base.recompute_bytes, Tally()
        return flow

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `Glow.prefix`."""
        with self.tally.note(x, whole=False):
            return super().prefix(x)

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        """See `Glow.suffix_log_prob`."""
        with self.tally.note(h, whole=False):
            return super().suffix_log_prob(h)

    def log_prob(self, x: Tensor) -> Tensor:
        """See `Glow.log_prob`."""
        with self.tally.note(x, whole=True):
            return super().log_prob(x)


def without_waste(spent: Spent, steps: int, needed: int, confirmation: int) -> float:
    """Seconds that a run of the recipe would have taken without what its method does not ask for.

    That is: no pass without a gradient but one confirmation, of so many images (statistics over all of D_R, a forward
    of the frozen base, a check before each step), and no step beyond the first that found every image far enough.
    """
    evaluated = spent.images.get(EVALUATING, 0)
    kept = min(1.0, confirmation / evaluated) if evaluated else 0.0
    return spent.seconds[STEPS] * needed / max(1, steps) + spent.seconds.get(EVALUATING, 0.0) * kept
