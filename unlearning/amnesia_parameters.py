"""Parameters of Selective Amnesia: each with its symbol, its range and where its default comes from."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from unlearning.errors import ParameterError
from unlearning.ranges import Range

Mode = Literal["default", "paper"]
LossTerm = Literal["surrogate", "replay", "penalty"]
"""The three terms of eq. 4."""


@dataclass(frozen=True)
class AmnesiaParameters:
    """Parameters of both modes. "Paper" is Heng and Soh, NeurIPS 2023, with its released code where it is silent."""

    mode: Mode = "default"
    """"default": a dimensionless penalty. "paper": lambda / 2 times the raw Fisher information, as published."""
    strength: float | None = None
    """default: weight of the relative drift, in units of the replay loss at the start; null: 10 (measured). paper:
    lambda; null: 100, as for the VAE. [0, 1e9]."""
    max_steps: int | None = None
    """Most optimiser steps; null: 2,000, paper 10,000 (App. B.1); [1, 1000000]."""
    learning_rate: float | None = None
    """Adam's; null: 1e-3 (measured), paper 1e-4 (App. B.1); (0, 1]."""
    batch: int = 256
    """Surrogate examples in a step; [1, 4096]. Paper: 256 for a VAE, 128 for a DDPM, 16 for Stable Diffusion."""
    replay_batch: int = 256
    """Replay examples in a step; [1, 4096]. Paper: as many."""
    replay_weight: float = 1.0
    """Weight of the replay term; [0, 1000]. Paper: 1."""
    floor: float = 1e-3
    """default: least Fisher information of a weight against the mean, so that none is free to drift; [0, 1)."""
    ceiling: float = 1e3
    """default: most of it, so that a few weights do not hold all; (1, 1e9]."""
    clip: float | None = None
    """Largest norm of a step's gradient, in units of the replay loss at the start; null: 1, and for paper 1e12,
    which is none to speak of, as in the released code of a VAE; (0, 1e12]."""
    check_every: int = 50
    """Steps between looks at fresh samples, each of which may end the run; [1, 100000]."""
    without: tuple[LossTerm, ...] = ()
    """Terms of the objective that are left out, as in the paper's ablations; none."""

    def __post_init__(self) -> None:
        """Check every value; raises ParameterError for the first that is wrong."""
        for field in dataclasses.fields(self):
            _check(field.name, getattr(self, field.name))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "AmnesiaParameters":
        """Build from JSON values, refusing unknown names, wrong types and values out of range.

        Raises:
            ParameterError: with the name and what is wrong.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ParameterError(
                    str(name)[:80], f"is no parameter of Selective Amnesia; known: {', '.join(sorted(known))}"
                )
        terms = values.get("without")
        return cls(**{**values, "without": tuple(terms)} if isinstance(terms, list) else values)

    def to_dict(self) -> dict[str, Any]:
        """The values as JSON, with the mode's defaults filled in."""
        values = dataclasses.asdict(self.resolved())
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def resolved(self) -> "AmnesiaParameters":
        """The same with every null replaced by the mode's default."""
        filled = {name: value for name, value in _DEFAULTS[self.mode].items() if getattr(self, name) is None}
        return dataclasses.replace(self, **filled)


_DEFAULTS: dict[Mode, dict[str, Any]] = {
    "default": {"strength": 10.0, "max_steps": 2000, "learning_rate": 1e-3, "clip": 1.0},
    "paper": {"strength": 100.0, "max_steps": 10_000, "learning_rate": 1e-4, "clip": 1e12},
}
_RANGES: dict[str, Range] = {
    "strength": Range(float, 0, 1e9),
    "max_steps": Range(int, 1, 1_000_000),
    "learning_rate": Range(float, 0, 1, closed=False),
    "batch": Range(int, 1, 4096),
    "replay_batch": Range(int, 1, 4096),
    "replay_weight": Range(float, 0, 1000),
    "floor": Range(float, 0, 0.999),
    "ceiling": Range(float, 1, 1e9, closed=False),
    "clip": Range(float, 0, 1e12, closed=False),
    "check_every": Range(int, 1, 100_000),
}


def _check(name: str, value: object) -> None:
    if name == "mode":
        if value not in get_args(Mode):
            raise ParameterError(name, f"must be one of {', '.join(get_args(Mode))}, not {value!r}")
    elif name == "without":
        known = get_args(LossTerm)
        if not isinstance(value, tuple) or any(term not in known for term in value) or len(set(value)) < len(value):
            raise ParameterError(name, f"lists terms of {', '.join(known)}, each once, not {value!r}")
        if "surrogate" in value:
            raise ParameterError(name, "leaves out the surrogate; nothing would be forgotten")
    elif value is not None or name not in _DEFAULTS["default"]:
        _RANGES[name].check(name, value)
