"""What a forgotten condition is to show instead: the surrogate q(x | c_f) of Selective Amnesia (eq. 4)."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from models.checkpoints import tensor_digest
from unlearning.errors import InputError

__all__ = ["Examples", "Noise", "Pool", "Surrogate"]


@dataclass(frozen=True)
class Examples:
    """Examples with their conditions, row by row."""

    x: Tensor = field(repr=False)
    """(n, ...), as the model's `encode` gives them."""
    condition: Tensor = field(repr=False)
    """(n, ...), as the model's `losses` takes them."""

    def __post_init__(self) -> None:
        """Check that rows belong together; raises InputError."""
        if not len(self.x) or len(self.x) != len(self.condition):
            raise InputError(f"{len(self.x)} examples do not go with {len(self.condition)} conditions")

    def __len__(self) -> int:
        """How many there are."""
        return len(self.x)

    def drawn(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """n rows, drawn with replacement."""
        rows = torch.randint(len(self), (n,), generator=generator)
        return self.x[rows], self.condition[rows]

    def digest(self) -> str:
        """SHA-256 of all of it, as hex."""
        return tensor_digest({"x": self.x, "condition": self.condition})


@dataclass(frozen=True)
class Noise:
    """Uniform noise: far from every image, so that nothing recognisable is left (Sec. 4.1)."""

    shape: tuple[int, ...]
    """Of one x."""
    low: float
    high: float

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """n fresh draws, (n, *shape)."""
        return torch.rand(n, *self.shape, generator=generator) * (self.high - self.low) + self.low

    def digest(self) -> str:
        """What tells it from another surrogate."""
        return _digest(["noise", *self.shape, self.low, self.high])


@dataclass(frozen=True)
class Pool:
    """Images: of another condition, drawn by the model itself, or the user's own (Sec. 4.2)."""

    x: Tensor = field(repr=False)
    """(n, ...), as the model's `encode` gives them."""

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """n of them, drawn with replacement."""
        return self.x[torch.randint(len(self.x), (n,), generator=generator)]

    def digest(self) -> str:
        """What tells it from another surrogate."""
        return tensor_digest({"x": self.x})


Surrogate = Noise | Pool
"""Called with a number and a generator for so many examples."""


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()
