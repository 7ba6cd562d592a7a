"""How far the pictures of one set are from another, beside what chance makes of one: KID with its noise floor."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from evidence.embedding import PcaEmbedding
from evidence.likelihood import derive_seed

__all__ = ["Extractor", "Kid", "kid", "kid_beside_floor", "pca_extractor"]

BLOCK = 1000
"""Images in a block, as in the reference; fewer where there are fewer images."""

FEWEST_BLOCKS = 8
"""Blocks that the standard error is taken over."""

SMALLEST_BLOCK = 4
"""Images in a block, below which nothing is measured."""

LARGEST_SET = 1000
"""Pictures of each set that a distance beside its floor is taken over; of more, as many at random."""

FALSE_ALARMS = 0.05
"""Probability with which equal distributions are told apart in any of the distances that are looked at together."""

RANK = 5
"""Shufflings that may lie as far apart as the sets do, or further, before their distance is taken for noise."""

CHUNK = 500
"""Shufflings that are computed at once."""


@dataclass(frozen=True)
class Extractor:
    """Features of pictures, with the name that a report gives them: a distance means something under its name only."""

    name: str
    features: Callable[[Tensor], Tensor]
    """Images (n, c, h, w) uint8 to (n, d)."""


@dataclass(frozen=True)
class Kid:
    """Kernel distance of two sets of pictures (Binkowski et al. 2018, arXiv 1801.01401), and what chance makes of it.

    The squared maximum mean discrepancy of features under k(a, b) = (a b / d + 1)^3, without bias: its mean is 0 for
    equal distributions, and it may fall below 0. Lower is better. It sees what the features see; of features other than
    Inception's it does not compare with published figures, and different extractors do not compare with each other.

    Attributes:
        value: in units of the kernel; NaN with too few pictures or features that are not finite.
        standard_error: over disjoint blocks, each an estimate of its own; None with too few pictures.
        floor: how far apart chance alone puts two such sets: all their pictures are shuffled and dealt out anew, many
            times, and of equal distributions one in twenty lies beyond, or one in twenty groups of distances that are
            looked at together. None where not asked for, or with too few pictures.
        n: pictures of the first set.
        m: pictures of the second.
        extractor: name of the features.
    """

    value: float
    standard_error: float | None
    floor: float | None
    n: int
    m: int
    extractor: str

    @property
    def within_noise(self) -> bool | None:
        """Whether chance alone puts such sets as far apart; None where that is not known."""
        if self.floor is None or not math.isfinite(self.value):
            return None
        return self.value <= self.floor


def kid(x: Tensor, y: Tensor, *, seed: int, extractor: str = "given features") -> Kid:
    """Kernel distance of features x (n, d) and y (m, d), without a floor.

    Sets are shuffled and cut into as many pairs of blocks, at least FEWEST_BLOCKS of at most BLOCK; the value is the
    mean of the blocks' unbiased estimates, so it is unbiased itself.

    Args:
        x: features of one set.
        y: features of the other.
        seed: of the shuffles.
        extractor: the features' name.
    """
    estimates = _block_estimates(x.double(), y.double(), seed)
    if not len(estimates) or not np.isfinite(estimates).all():
        return Kid(math.nan, None, None, len(x), len(y), extractor)
    error = float(estimates.std(ddof=1) / math.sqrt(len(estimates)))
    return Kid(float(estimates.mean()), error, None, len(x), len(y), extractor)


def kid_beside_floor(base: Tensor, other: Tensor, extractor: Extractor, *, seed: int, comparisons: int = 1) -> Kid:
    """Distance of two sets of pictures beside its noise floor: a permutation test (Gretton et al. 2012, JMLR 13).

    Under equal distributions it makes no difference which set a picture came from. So the pictures of both are shuffled
    and dealt out anew, and the floor is the RANK-th largest distance of as many shufflings as give a distance beyond it
    a probability of at most FALSE_ALARMS / comparisons: exactly, at any number of pictures, of features that do not
    tell the sets from each other by themselves. The value is over up to LARGEST_SET pictures of each set, as in the
    shufflings; the standard error is that of `kid`, an upper estimate here.

    Args:
        base: (n, c, h, w) uint8, independent of `other`: samples drawn from the same latents are not.
        other: (m, c, h, w) uint8.
        extractor: the features; fitted to neither set, or to both alike.
        seed: of the shuffles.
        comparisons: distances that are looked at together: each floor is so much higher that of equal distributions
            one in twenty such groups holds a distance beyond its floor.
    """
    x, y = extractor.features(base).double(), extractor.features(other).double()
    whole = kid(x, y, seed=derive_seed(seed, "kid", "whole"), extractor=extractor.name)
    if not math.isfinite(whole.value):
        return whole
    generator = torch.Generator().manual_seed(derive_seed(seed, "kid", "shuffles"))
    kept = [one[torch.randperm(len(one), generator=generator)[:LARGEST_SET]] for one in (x, y)]
    count = math.ceil(RANK * max(1, comparisons) / FALSE_ALARMS) - 1
    value, shuffled = _shuffled(kept[0], kept[1], count, generator)
    floor = float(shuffled.topk(RANK).values[-1])
    return Kid(value, whole.standard_error, floor, len(x), len(y), extractor.name)


def pca_extractor(images: Tensor) -> Extractor:
    """Principal components of pixels, fitted to images (n, c, h, w) uint8: what there is for a flow of any pictures.

    For a floor that holds, fit it to the pictures of both sets: those of one alone lie closer to its components.
    """
    embedding = PcaEmbedding.fit(images)
    return Extractor(f"principal components of pixels ({len(embedding.components)})", embedding.embed)


def _block_estimates(x: Tensor, y: Tensor, seed: int) -> np.typing.NDArray[np.float64]:
    """Unbiased estimates (blocks,) of the squared discrepancy, from disjoint blocks of both sets."""
    fewest = min(len(x), len(y))
    blocks = max(FEWEST_BLOCKS, -(-fewest // BLOCK))
    size = fewest // blocks
    if size < SMALLEST_BLOCK or x.shape[1] < 1:
        return np.zeros(0)
    generator = torch.Generator().manual_seed(seed)
    first = torch.randperm(len(x), generator=generator)[: blocks * size].view(blocks, size)
    second = torch.randperm(len(y), generator=generator)[: blocks * size].view(blocks, size)
    return np.array([_discrepancy(x[i], y[j]) for i, j in zip(first, second, strict=True)])


def _shuffled(x: Tensor, y: Tensor, count: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """The discrepancy of features (n, d) and (m, d), and (count,) of their pictures dealt out at random to n and m.

    All of them from one matrix of the kernel: with a the indicator of the first set among both, its sums within and
    between the sets are a' K a, a' K (1 - a) and (1 - a)' K (1 - a).
    """
    n, m = len(x), len(y)
    pooled = torch.cat([x, y])
    values = _kernel(pooled, pooled).fill_diagonal_(0)  # (n + m, n + m); no picture counts beside itself
    rows = values.sum(1)

    def discrepancies(first: Tensor) -> Tensor:
        """(k,) of indicators (n + m, k)."""
        reached = rows @ first  # within the first set and between the sets
        within = (first * (values @ first)).sum(0)
        between = reached - within
        rest = rows.sum() - reached - between
        return within / (n * (n - 1)) + rest / (m * (m - 1)) - 2 * between / (n * m)

    original = torch.zeros(n + m, 1, dtype=torch.float64)
    original[:n] = 1
    found = [discrepancies(original)]
    for start in range(0, count, CHUNK):
        keys = torch.rand(n + m, min(CHUNK, count - start), generator=generator, dtype=torch.float64)
        found.append(discrepancies((keys <= keys.kthvalue(n, dim=0).values).double()))
    distances = torch.cat(found)
    return float(distances[0]), distances[1:]


def _discrepancy(x: Tensor, y: Tensor) -> float:
    """Unbiased squared maximum mean discrepancy of features (n, d) and (m, d) under the cubic kernel (Eq. 3 there)."""
    n, m = len(x), len(y)
    xx, yy, xy = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    within_x = (xx.sum() - xx.trace()) / (n * (n - 1))
    within_y = (yy.sum() - yy.trace()) / (m * (m - 1))
    return float(within_x + within_y - 2 * xy.mean())


def _kernel(a: Tensor, b: Tensor) -> Tensor:
    values: Tensor = (a @ b.T / a.shape[1] + 1) ** 3
    return values
