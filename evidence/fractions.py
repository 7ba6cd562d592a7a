"""How often samples show a class: the fraction, its interval, whether it keeps a bound, and the samples it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy import special
from torch import Tensor

from evidence.errors import TargetError, UnknownClassError

__all__ = [
    "CONFIDENCE",
    "POWER",
    "Bound",
    "Fraction",
    "Judgement",
    "Told",
    "clopper_pearson",
    "count",
    "fraction_of",
    "judge",
    "judge_fraction",
    "samples_for",
    "samples_to_pass",
]

CONFIDENCE = 0.95
"""With which all intervals of one classifier hold together."""

POWER = 0.95
"""Probability with which a flow that is exactly at its target has to pass."""

MOST_SAMPLES = 2**27
"""Beyond so many samples no number is named any more."""

Told = Literal["inside", "outside", "insufficient"]


@dataclass(frozen=True)
class Fraction:
    """Share of n independent samples that a classifier puts in a class, with Clopper and Pearson's interval (1934).

    The interval is the exact one: it covers the flow's own rate at least as often as it says, at every rate and n.
    Wilson's is shorter but falls short of its confidence at some rates, and here a job's success hangs on it; at some
    thousand samples the two differ by less than one sample in a thousand. It says nothing of the classifier's errors.

    Attributes:
        value: in [0, 1]; NaN without samples.
        low: lower end.
        high: upper end.
        n: samples.
        confidence: of all intervals of this classifier together (Bonferroni).
        level: of this interval alone, at least `confidence`.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float
    level: float


@dataclass(frozen=True)
class Bound:
    """Where the fraction of a class has to lie: low <= fraction <= high, both in [0, 1]."""

    low: float = 0.0
    high: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.high <= 1:
            raise TargetError(f"a bound is a part of [0, 1], not {self.low:g} to {self.high:g}")

    @classmethod
    def around(cls, target: float, tolerance: float) -> Bound:
        """target +- tolerance, cut to [0, 1]."""
        _check_target(target, tolerance)
        return cls(max(0.0, target - tolerance), min(1.0, target + tolerance))


@dataclass(frozen=True)
class Judgement:
    """Whether fractions keep their bounds.

    Attributes:
        told: "inside": every interval lies within its bound. "outside": some interval lies wholly beyond it, or holds
            a bound that the fraction itself misses. "insufficient": all fractions keep their bounds, but the interval
            of one still holds values beyond.
        needed: samples with which a flow at these very fractions would be told inside with probability POWER; None
            where `told` is not "insufficient", and where more than MOST_SAMPLES would be needed.
    """

    told: Told
    needed: int | None = None


def fraction_of(hits: int, n: int, *, confidence: float = CONFIDENCE, comparisons: int = 1) -> Fraction:
    """The fraction hits / n with its Clopper-Pearson interval.

    Args:
        hits: samples in the class, 0 to n.
        n: samples; 0 gives NaN within [0, 1].
        confidence: in (0, 1), of `comparisons` such intervals together.
        comparisons: intervals that have to hold at once.
    """
    _check_confidence(confidence)
    if not 0 <= hits <= n:
        raise TargetError(f"{hits} of {n} samples is no fraction")
    alpha = (1 - confidence) / comparisons
    if n == 0:
        return Fraction(float("nan"), 0.0, 1.0, 0, confidence, 1 - alpha)
    return Fraction(hits / n, *clopper_pearson(hits, n, alpha), n, confidence, 1 - alpha)


def clopper_pearson(hits: float, n: int, alpha: float) -> tuple[float, float]:
    """Ends of the interval of hits / n at confidence 1 - alpha; between whole hits, as the beta quantiles go on."""
    low = 0.0 if hits <= 0 else float(special.betaincinv(hits, n - hits + 1, alpha / 2))
    high = 1.0 if hits >= n else float(special.betaincinv(hits + 1, n - hits, 1 - alpha / 2))
    return low, high


def count(labels: Tensor, classes: Sequence[str], *, confidence: float = CONFIDENCE) -> dict[str, Fraction]:
    """The fraction of every class among labels, with intervals that hold together.

    Args:
        labels: (n,) integers in [0, k).
        classes: the k names, in the order of the labels.
        confidence: of all k intervals together.
    """
    found: npt.NDArray[np.int64] = np.bincount(labels.cpu().numpy().astype(np.int64), minlength=len(classes))
    if len(found) > len(classes):
        raise UnknownClassError(f"label {len(found) - 1} is beyond the {len(classes)} classes {', '.join(classes)}")
    comparisons = _comparisons(len(classes))
    return {
        name: fraction_of(int(hits), len(labels), confidence=confidence, comparisons=comparisons)
        for name, hits in zip(classes, found, strict=True)
    }


def judge_fraction(fraction: Fraction, bound: Bound) -> Judgement:
    """Whether the interval of one fraction lies within its bound."""
    if fraction.low >= bound.low and fraction.high <= bound.high:
        return Judgement("inside")
    if fraction.n and not bound.low <= fraction.value <= bound.high:
        return Judgement("outside")
    target = fraction.value if fraction.n else (bound.low + bound.high) / 2
    return Judgement("insufficient", samples_to_pass(target, bound, level=fraction.level))


def judge(fractions: Mapping[str, Fraction], bounds: Mapping[str, Bound]) -> Judgement:
    """Whether every bounded fraction keeps its bound.

    That all do needs no correction for the number of bounds: the claim is false as soon as one fraction lies beyond
    (an intersection-union test, Berger 1982). The intervals hold together all the same, so that each can be quoted.

    Args:
        fractions: by class.
        bounds: by class; classes without one are free.
    """
    unknown = sorted(set(bounds) - set(fractions))
    if unknown:
        raise UnknownClassError(f"no classifier tells {', '.join(unknown)}; there are {', '.join(fractions)}")
    found = [judge_fraction(fractions[name], bound) for name, bound in bounds.items()]
    told: Told = "inside"
    if any(one.told == "outside" for one in found):
        told = "outside"
    elif any(one.told == "insufficient" for one in found):
        needed = [one.needed for one in found if one.told == "insufficient"]
        known = [n for n in needed if n is not None]
        return Judgement("insufficient", max(known) if len(known) == len(needed) else None)
    return Judgement(told)


def samples_for(
    target: Iterable[float],
    tolerance: float,
    confidence: float = CONFIDENCE,
    classes: int | None = None,
    *,
    power: float = POWER,
) -> int:
    """Samples with which a flow exactly at its target passes: every interval inside target +- tolerance.

    The rule: each class alone fails with probability at most (1 - power) / comparisons, computed from the binomial
    itself, so that all pass with at least `power`. A flow that is off its target by a part of the tolerance needs more.

    Args:
        target: the fraction wanted of each class.
        tolerance: by which each may miss it, above 0; .03 is 3 points.
        confidence: of all intervals together.
        classes: of the classifier, where `target` names only some of them.
        power: probability of passing.

    Returns:
        The number of samples, the largest over the classes.
    """
    wanted = tuple(target)
    comparisons = _comparisons(max(len(wanted), classes or 0))
    level, each = 1 - (1 - confidence) / comparisons, 1 - (1 - power) / comparisons
    _check_confidence(confidence)
    if not wanted:
        raise TargetError("a target names at least one class")
    needed = [samples_to_pass(p, Bound.around(p, tolerance), level=level, power=each) for p in wanted]
    known = [n for n in needed if n is not None]
    if len(known) < len(needed):
        raise TargetError(f"a tolerance of {tolerance:g} would take more than {MOST_SAMPLES:,} samples: allow more")
    return max(known)


def samples_to_pass(rate: float, bound: Bound, *, level: float, power: float = POWER) -> int | None:
    """Samples with which a flow of this rate has its interval inside the bound; None beyond MOST_SAMPLES.

    Args:
        rate: the flow's own rate of the class.
        bound: of which the interval must lie inside; a rate at its very edge never passes.
        level: confidence of the one interval.
        power: probability of passing, in (0, 1).
    """
    if (bound.low > 0 and rate <= bound.low) or (bound.high < 1 and rate >= bound.high):
        return None
    n = 1
    while _passes(n, rate, bound, level) < power:
        n *= 2
        if n > MOST_SAMPLES:
            return None
    low, high = n // 2, n
    # The probability climbs in a saw-tooth: this ends at some n that passes, less than a tooth above the least.
    while high - low > max(1, high // 200):
        middle = (low + high) // 2
        low, high = (low, middle) if _passes(middle, rate, bound, level) >= power else (middle, high)
    return high


def _passes(n: int, rate: float, bound: Bound, level: float) -> float:
    """Probability that the Clopper-Pearson interval of n samples at this rate lies inside the bound."""
    from scipy.stats import binom  # takes a third of a second, which who plans no samples need not wait for

    tail = (1 - level) / 2
    # low end >= bound  <=>  P(X >= hits | bound) <= tail; and the mirror image of it for the high end.
    fewest = 0 if bound.low <= 0 else int(binom.isf(tail, n, bound.low)) + 1
    most = n if bound.high >= 1 else n - int(binom.isf(tail, n, 1 - bound.high)) - 1
    if fewest > most:
        return 0.0
    return float(binom.cdf(most, n, rate) - binom.cdf(fewest - 1, n, rate))


def _comparisons(classes: int) -> int:
    """Intervals that say something of their own: of two classes, one is the other's mirror image."""
    return 1 if classes <= 2 else classes


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise TargetError(f"a confidence lies between 0 and 1, not at {confidence:g}")


def _check_target(target: float, tolerance: float) -> None:
    if not 0 <= target <= 1 or not 0 < tolerance < 1:
        raise TargetError(f"a target lies in [0, 1] and a tolerance in (0, 1), got {target:g} and {tolerance:g}")
