"""What the parameters of all methods share: ranges, and one wording for what is refused."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

from unlearning.errors import ParameterError

__all__ = ["Parameters", "Range", "check_choice", "check_terms"]


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


@dataclass(frozen=True)
class Parameters:
    """The parameters of a method: a frozen dataclass whose every value is checked, and which JSON can be read into."""

    METHOD: ClassVar[str]
    """As a sentence names it."""
    RANGES: ClassVar[Mapping[str, Range]]
    """Of the numbers, by name."""
    OPTIONAL: ClassVar[tuple[str, ...]] = ()
    """Numbers that may be null."""

    def __post_init__(self) -> None:
        """Check every value; raises ParameterError for the first that is wrong."""
        for field in dataclasses.fields(self):
            self._check(field.name, getattr(self, field.name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from JSON values, refusing unknown names, wrong types and values out of range.

        Raises:
            ParameterError: with the name and what is wrong.
        """
        known = sorted(field.name for field in dataclasses.fields(cls))
        for name in values:
            if name not in known:
                raise ParameterError(str(name)[:80], f"is no parameter of {cls.METHOD}; known: {', '.join(known)}")
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON, with every default filled in."""
        values = dataclasses.asdict(self.resolved())
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def resolved(self) -> Self:
        """The same with every null replaced by its default, where it has one."""
        filled = {name: value for name, value in self._defaults().items() if getattr(self, name) is None}
        return dataclasses.replace(self, **filled)

    def _defaults(self) -> Mapping[str, Any]:
        """What nulls stand for, by name."""
        return {}

    def _check(self, name: str, value: object) -> None:
        if value is not None or name not in self.OPTIONAL:
            self.RANGES[name].check(name, value)


def check_choice(name: str, value: object, known: Sequence[str]) -> None:
    """Raise ParameterError unless the value is one of these."""
    if value not in known:
        raise ParameterError(name, f"must be one of {', '.join(known)}, not {value!r}")


def check_terms(name: str, value: object, known: Sequence[str]) -> frozenset[str]:
    """Raise ParameterError unless the value is a tuple of these, each once; returns them."""
    if not isinstance(value, tuple) or any(term not in known for term in value) or len(set(value)) < len(value):
        raise ParameterError(name, f"lists terms of {', '.join(known)}, each once, not {value!r}")
    return frozenset(value)
