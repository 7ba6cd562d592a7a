"""Progress of a run: one callback, called at every step boundary, that may take a snapshot or interrupt the run."""

from collections.abc import Callable
from dataclasses import dataclass, field

from unlearning.state import State


class Interrupted(Exception):
    """A callback raises this to end a run at a step boundary; the snapshot it took resumes the run bit-equal."""


@dataclass(frozen=True)
class Step:
    """One step boundary."""

    phase: str
    """Such as "unlearning"."""
    step: int
    """Steps done."""
    total: int
    """Most steps there can be; a run ends sooner when its criterion is confirmed."""
    losses: dict[str, float]
    metrics: dict[str, float]
    capture: Callable[[], State] = field(repr=False, compare=False)

    def snapshot(self) -> State:
        """The run's state, copied now; call it inside the callback, while it is still this boundary's."""
        return self.capture()


Callback = Callable[[Step], None]
