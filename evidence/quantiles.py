"""Where an image's likelihood stands among those to remember: quantiles, their drop, and how far to trust them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import special

from evidence.likelihood import FloatArray

__all__ = [
    "MINIMUM_REFERENCE",
    "Normality",
    "PrimaryQuantile",
    "QuantileDrop",
    "Reference",
    "choose_primary",
    "normality",
    "quantile_drop",
]

MINIMUM_REFERENCE = 1000
"""Images to remember from which on quantiles of 0.001 are resolved; with fewer, the limit is stated."""

MINIMUM_NORMALITY = 20
"""Values from which on normality is tested at all."""

SIMULATIONS = 999
"""Normal samples that make up the null distribution of the Kolmogorov-Smirnov statistic."""

ALPHA = 0.05
"""Level at which normality is rejected."""


@dataclass(frozen=True, eq=False)
class Reference:
    """Likelihoods of the images to remember under one model: what an image's likelihood is held against.

    With fewer than two images, or with a likelihood that is not finite, z and the Gaussian quantile are NaN.

    Attributes:
        values: (n,) float64, sorted; nats.
        mean: mu_R, nats (Eq. 7).
        std: sigma_R, nats, over n as in Eq. 7.
    """

    values: FloatArray
    mean: float
    std: float

    @classmethod
    def of(cls, nll: FloatArray) -> Reference:
        """The reference that likelihoods (n,) in nats make."""
        if len(nll) < 2 or not np.isfinite(nll).all():
            return cls(np.sort(nll), math.nan, math.nan)
        return cls(np.sort(nll), float(nll.mean()), float(nll.std()))

    @property
    def n(self) -> int:
        """Images to remember."""
        return len(self.values)

    @property
    def resolution(self) -> float:
        """Smallest quantile that the images themselves can show, 1 / (n + 1)."""
        return 1 / (self.n + 1)

    @property
    def sufficient(self) -> bool:
        """Whether there are as many images as are asked for."""
        return self.n >= MINIMUM_REFERENCE

    def z(self, nll: FloatArray) -> FloatArray:
        """Distance from mu_R in units of sigma_R; higher is less likely."""
        if not self.std > 0:
            return np.full(len(nll), math.nan)
        return (nll - self.mean) / self.std

    def gaussian(self, nll: FloatArray) -> FloatArray:
        """Likelihood quantile q(x) = 1 - Phi((nll(x) - mu_R) / sigma_R), in [0, 1] (Eq. 13).

        0.5 is a typical image to remember, 0 is less likely than all. It assumes that the likelihoods to remember are
        normal; below `resolution` it is an extrapolation that no image has confirmed.
        """
        return np.asarray(special.ndtr(-self.z(nll)), dtype=np.float64)

    def empirical(self, nll: FloatArray) -> FloatArray:
        """Share of images to remember that are no more likely than x: (1 + #{r: nll(r) >= nll(x)}) / (n + 1).

        In [1 / (n + 1), 1]; assumes nothing about the distribution and cannot fall below the rank bound.
        """
        q = (1 + self.no_more_likely(nll)) / (self.n + 1)
        return np.where(np.isnan(nll), math.nan, q)

    def no_more_likely(self, nll: FloatArray) -> FloatArray:
        """Number of images to remember whose likelihood is not above x's, as floats (n,)."""
        return (self.n - np.searchsorted(self.values, nll, side="left")).astype(np.float64)


@dataclass(frozen=True)
class QuantileDrop:
    """QD(S) = q_base(S) - q_tamed(S), the mean over a set (Eq. 15). In [-1, 1]; higher is more forgotten.

    Want it high on what is to be forgotten and 0 elsewhere. On the images to remember themselves it is near 0 by
    construction, as both quantiles are taken among those same images: damage shows in the drift, not here.

    Attributes:
        value: the drop; NaN without images or where a quantile is not finite.
        low: lower end of the interval; None where there is too little evidence for one.
        high: upper end of the interval, likewise.
        n: images.
        confidence: of the interval. It covers the choice of the set's images (Student's t over the paired
            differences, cut to [-1, 1]), not the error of mu_R and sigma_R, and takes the images as independent.
    """

    value: float
    low: float | None
    high: float | None
    n: int
    confidence: float


@dataclass(frozen=True)
class Normality:
    """Whether values look normal: Kolmogorov-Smirnov against the normal that was fitted to them.

    Not rejecting is no proof: with few values even a skewed sample passes, and the tail at 4 sigma, which the
    criterion uses, is hardly weighed by this test. Values are taken as independent.

    Attributes:
        n: values.
        statistic: largest distance between the two distribution functions, in [0, 1]; lower is more normal.
        p_value: share of simulated normal samples, fitted likewise, whose statistic is no smaller (Lilliefors'
            setting by Monte Carlo, Lilliefors 1967); NaN with too few values.
        p_value_naive: the textbook p-value (asymptotic) that ignores the fit, the form usually quoted; too large.
        skew: third standardised moment; 0 for a normal.
        excess_kurtosis: fourth standardised moment less 3; 0 for a normal.
        rejected: p_value < ALPHA; None where there are too few values to tell.
    """

    n: int
    statistic: float
    p_value: float
    p_value_naive: float
    skew: float
    excess_kurtosis: float
    rejected: bool | None


@dataclass(frozen=True)
class PrimaryQuantile:
    """Which of the two quantiles a report leads with, and why, in one sentence."""

    kind: Literal["gaussian", "empirical"]
    reason: str


def quantile_drop(before: FloatArray, after: FloatArray, *, confidence: float = 0.95) -> QuantileDrop:
    """Quantile drop of a set (Eq. 15) with its interval.

    Args:
        before: (n,) quantiles under the base model.
        after: (n,) quantiles of the same images under the tamed model.
        confidence: of the interval, in (0, 1).
    """
    if before.shape != after.shape:
        raise ValueError(f"quantiles before and after must pair up, got {before.shape} and {after.shape}")
    drops = before - after
    n = len(drops)
    if n == 0 or not np.isfinite(drops).all():
        return QuantileDrop(math.nan, None, None, n, confidence)
    value = float(drops.mean())
    if n == 1:
        return QuantileDrop(value, None, None, n, confidence)
    reach = float(special.stdtrit(n - 1, (1 + confidence) / 2) * drops.std(ddof=1) / math.sqrt(n))
    return QuantileDrop(value, max(-1.0, value - reach), min(1.0, value + reach), n, confidence)


def normality(values: FloatArray, *, simulations: int = SIMULATIONS, seed: int = 0) -> Normality:
    """Test values (n,) for normality; see `Normality` for what the answer is worth.

    Args:
        values: (n,) in any unit: the answer does not change with shift or scale.
        simulations: normal samples to compare with; the p-value is a multiple of 1 / (simulations + 1).
        seed: of the simulation.
    """
    n = len(values)
    if n < MINIMUM_NORMALITY or not np.isfinite(values).all() or not np.ptp(values) > 0:
        return Normality(n, math.nan, math.nan, math.nan, math.nan, math.nan, None)
    statistic = float(_ks_statistic(values[None])[0])
    exceed = int((_null_statistics(n, simulations, seed) >= statistic).sum())
    p_value = (1 + exceed) / (simulations + 1)
    standard = (values - values.mean()) / values.std()
    return Normality(
        n=n,
        statistic=statistic,
        p_value=p_value,
        p_value_naive=float(special.kolmogorov(math.sqrt(n) * statistic)),
        skew=float((standard**3).mean()),
        excess_kurtosis=float((standard**4).mean() - 3),
        rejected=p_value < ALPHA,
    )


def choose_primary(base: Normality, tamed: Normality) -> PrimaryQuantile:
    """The Gaussian quantile as in the paper, unless normality is rejected under either model."""
    if base.rejected is None or tamed.rejected is None:
        why = f"too few usable likelihoods ({base.n}) to test normality, so the Gaussian quantile is used untested"
        return PrimaryQuantile("gaussian", why)
    if not (base.rejected or tamed.rejected):
        least = min(base.p_value, tamed.p_value)
        return PrimaryQuantile("gaussian", f"normality is not rejected (smallest p = {least:.2g}, n = {base.n})")
    where = " and ".join(name for name, test in (("base", base), ("tamed", tamed)) if test.rejected)
    return PrimaryQuantile("empirical", f"normality is rejected under the {where} model (level {ALPHA}, n = {base.n})")


@lru_cache(maxsize=8)
def _null_statistics(n: int, simulations: int, seed: int) -> FloatArray:
    """Statistics (simulations,) of normal samples of size n, each against its own fit."""
    rng = np.random.default_rng([seed, n])
    rows = max(1, 2**20 // n)
    sizes = [min(rows, simulations - start) for start in range(0, simulations, rows)]
    return np.concatenate([_ks_statistic(rng.standard_normal((size, n))) for size in sizes])


def _ks_statistic(samples: FloatArray) -> FloatArray:
    """Kolmogorov-Smirnov distance (b,) of each row of (b, n) to the normal fitted to it."""
    n = samples.shape[1]
    standard = (samples - samples.mean(1, keepdims=True)) / samples.std(1, ddof=1, keepdims=True)
    cdf = special.ndtr(np.sort(standard, axis=1))
    above = (np.arange(1, n + 1) / n - cdf).max(1)
    below = (cdf - np.arange(n) / n).max(1)
    return np.asarray(np.maximum(above, below), dtype=np.float64)
