"""How far the pictures of one set are from another, beside how far a set is from itself: KID with its noise floor."""

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

SPLITS = 40
"""Random halves of a set that its noise floor is taken over."""

SMALLEST_HALF = 16
"""Pictures of a half, below which there is no floor."""

LARGEST_HALF = 500
"""Pictures of a half, beyond which a floor gains little."""

FLOOR_QUANTILE = 0.95


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
        floor: 95 % of random halves of the first set, more where several distances are looked at, are no further from
            each other; None where not asked for, or with
            too few pictures.
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
        """Whether the sets are no further apart than halves of the first are; None where that is not known."""
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
    """Distance of two sets of pictures beside the noise floor of the first.

    Forty times, two random halves of the base's pictures and as many of the other set are taken, at most LARGEST_HALF:
    the distances between the halves make the floor, and the mean distance of the first half to the other set is the
    value. So both are measured alike, as whole sets; the standard error is that of `kid`, an upper estimate here.

    Args:
        base: (n, c, h, w) uint8, independent of `other`: samples drawn from the same latents are not.
        other: (m, c, h, w) uint8.
        extractor: the features.
        seed: of the splits.
        comparisons: distances that are looked at together: each floor is so much higher that of equal distributions
            one in twenty such groups holds a distance beyond its floor.
    """
    x, y = extractor.features(base).double(), extractor.features(other).double()
    whole = kid(x, y, seed=derive_seed(seed, "kid", "whole"), extractor=extractor.name)
    size = min(len(x) // 2, len(y), LARGEST_HALF)
    if size < SMALLEST_HALF or not math.isfinite(whole.value):
        return whole
    between, within = [], []
    for split in range(SPLITS):
        generator = torch.Generator().manual_seed(derive_seed(seed, "kid", "split", split))
        halves = torch.randperm(len(x), generator=generator)
        some = torch.randperm(len(y), generator=generator)[:size]
        first, second = x[halves[:size]], x[halves[size : 2 * size]]
        between.append(_discrepancy(first, y[some]))
        within.append(_discrepancy(first, second))
    floor = float(np.quantile(within, 1 - (1 - FLOOR_QUANTILE) / comparisons))
    return Kid(float(np.mean(between)), whole.standard_error, floor, len(x), len(y), extractor.name)


def pca_extractor(images: Tensor) -> Extractor:
    """Principal components of pixels, fitted to images (n, c, h, w) uint8: what there is for a flow of any pictures."""
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
