"""The range of a parameter, and the refusal of a value outside of it: one wording for every method."""

import math
from typing import NamedTuple

from unlearning.errors import ParameterError

__all__ = ["Range"]


class Range(NamedTuple):
    """The numbers that a parameter takes."""

    kind: type
    """int or float; a whole number serves as either."""
    low: float
    high: float
    closed: bool = True
    """Whether the lowest itself is allowed."""

    def check(self, name: str, value: object) -> None:
        """Raise ParameterError unless the value is such a number."""
        if isinstance(value, bool) or not isinstance(value, int if self.kind is int else int | float):
            raise ParameterError(name, f"must be a {'whole number' if self.kind is int else 'number'}, not {value!r}")
        below = value < self.low or (value == self.low and not self.closed)
        if not math.isfinite(value) or below or value > self.high:
            least = f"{'at least' if self.closed else 'above'} {self.low:g}"
            raise ParameterError(name, f"must be {least} and at most {self.high:g}, not {value!r}")
