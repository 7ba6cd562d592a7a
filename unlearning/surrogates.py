"""What a forgotten condition is to show instead: the surrogate q(x | c_f) of Selective Amnesia (eq. 4)."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from models.checkpoints import tensor_digest
from unlearning.errors import InputError

__all__ = ["Examples", "Mixture", "Noise", "Pool", "Surrogate", "mixing_fractions"]

SUM_TOLERANCE = 1e-6
"""By which fractions may miss a sum of 1."""
SUM_WEIGHT = 1e4
"""Of the row that makes fractions sum to 1, beside rows of shares."""


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


@dataclass(frozen=True)
class Mixture:
    """Images of several pools, each drawn from so often: what a condition is to show evenly, or as often as asked."""

    pools: tuple[Pool, ...]
    fractions: tuple[float, ...]
    """Share of draws from each pool, in [0, 1], which sum to 1."""

    def __post_init__(self) -> None:
        """Check that it can be drawn from; raises InputError."""
        if len(self.pools) != len(self.fractions) or not self.pools:
            raise InputError(
                f"{len(self.pools)} pools do not go with {len(self.fractions)} fractions; give one of each"
            )
        if not all(0 <= one <= 1 for one in self.fractions) or abs(sum(self.fractions) - 1) > SUM_TOLERANCE:
            raise InputError(
                f"fractions of a mixture lie between 0 and 1 and sum to 1, not {', '.join(map(str, self.fractions))}"
            )
        if not all(len(pool.x) for pool in self.pools):
            raise InputError("a pool of a mixture is empty; leave it out")
        if len({pool.x.shape[1:] for pool in self.pools}) > 1:
            shapes = ", ".join(str(tuple(pool.x.shape[1:])) for pool in self.pools)
            raise InputError(f"pools of a mixture hold examples of one shape, not {shapes}")

    def __call__(self, n: int, generator: torch.Generator) -> Tensor:
        """n of them: for each a pool by the fractions, then one of its examples, with replacement."""
        edges = torch.tensor(self.fractions, dtype=torch.float64).cumsum(0)
        chosen, place = torch.rand(2, n, dtype=torch.float64, generator=generator)
        pool_of = torch.searchsorted(edges / edges[-1], chosen, right=True)
        drawn = torch.empty(n, *self.pools[0].x.shape[1:], dtype=self.pools[0].x.dtype)
        for number, pool in enumerate(self.pools):
            rows = pool_of == number
            drawn[rows] = pool.x[(place[rows] * len(pool.x)).long()]
        return drawn

    def digest(self) -> str:
        """What tells it from another surrogate."""
        return _digest(["mixture", *self.fractions, *(pool.digest() for pool in self.pools)])


Surrogate = Noise | Pool | Mixture
"""Called with a number and a generator for so many examples."""


def mixing_fractions(shown: Tensor, target: Sequence[float]) -> tuple[float, ...]:
    """How often to draw from each pool so that all draws together show classes as often as asked.

    Least squares over fractions that are not negative and sum to 1 (Lawson and Hanson 1974, NNLS, the sum as one more
    row of great weight). Where no fractions give the target, what they give is the nearest; see for yourself.

    Args:
        shown: (pools, classes), share of each class among the examples of each pool.
        target: share of each class that is asked for.

    Returns:
        A fraction of each pool.

    Raises:
        InputError: shares of other classes than the target's, or that are no numbers.
    """
    from scipy.optimize import nnls  # takes half a second, which who mixes nothing need not wait for

    shares, wanted = shown.double().numpy(), np.asarray(target, dtype=np.float64)
    if (
        shares.ndim != 2
        or shares.shape[1:] != wanted.shape
        or not (np.isfinite(shares).all() and np.isfinite(wanted).all())
    ):
        raise InputError(f"shares of {tuple(shown.shape)} pools and classes do not go with {len(wanted)} wanted ones")
    rows = np.vstack([shares.T, np.full(len(shares), SUM_WEIGHT)])
    found, _ = nnls(rows, np.append(wanted, SUM_WEIGHT))
    total = math.fsum(found)
    return tuple(float(one) / total for one in found)


def _digest(facts: Sequence[object]) -> str:
    return hashlib.sha256(json.dumps(list(facts)).encode()).hexdigest()
