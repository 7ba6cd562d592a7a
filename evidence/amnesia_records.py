"""What is asked of a conditional model that forgot a condition, and what an evaluation of its samples found."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from scipy import special
from torch import Tensor

from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Bound, Fraction, Judgement, clopper_pearson, fraction_of, judge_fraction
from evidence.kid import Kid
from evidence.records import Outcome, finite

__all__ = [
    "AmnesiaEvaluation",
    "ConditionEvaluation",
    "Drop",
    "Goal",
    "Kept",
    "Mean",
    "Shown",
    "drop_of",
    "mean_of",
    "share",
]


@dataclass(frozen=True)
class Goal:
    """What fresh samples have to show.

    Attributes:
        forgotten_at_most: share of samples of the forgotten class in which the judge still sees it; the upper end of
            its interval has to lie at or below this.
        replaced_at_least: share of them in which it sees the replacement, lower end at or above; None: not asked.
        others_within: by how much fewer samples of the other classes it may take for what they are, see `drop_of`.
    """

    forgotten_at_most: float = 0.05
    replaced_at_least: float | None = None
    others_within: float = 0.02

    def __post_init__(self) -> None:
        for name in ("forgotten_at_most", "replaced_at_least", "others_within"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise TargetError(f"{name} lies between 0 and 1, not at {value:g}: no samples could show it otherwise")

    @property
    def forgotten(self) -> Bound:
        """Of the forgotten class's share."""
        return Bound(high=self.forgotten_at_most)

    @property
    def replaced(self) -> Bound | None:
        """Of the replacement's share."""
        return None if self.replaced_at_least is None else Bound(low=self.replaced_at_least)


@dataclass(frozen=True)
class Mean:
    """A mean over samples with its normal interval, cut to the range that the values can take.

    Attributes:
        value: NaN without samples.
        low: lower end.
        high: upper end.
        n: samples.
        confidence: of the interval.
    """

    value: float
    low: float
    high: float
    n: int
    confidence: float


@dataclass(frozen=True)
class Shown:
    """What samples of one model show that were drawn under the forgotten condition.

    Attributes:
        shares: of each of the judge's classes, in its order: of samples that clearly show it, see
            `evidence.readings.Reading.seen`. Each interval holds by itself.
        probability: the judge's mean P(y = c_f) of a sample; None where it tells labels alone. Lower is more forgotten.
        entropy: mean entropy of its answers, nats, at most log k; None likewise. High where nothing is left to be
            recognised, low where a sample clearly shows something, the replacement for instance.
        blank: share of samples that show no class clearly; None likewise.
    """

    shares: tuple[Fraction, ...]
    probability: Mean | None
    entropy: Mean | None
    blank: Fraction | None


@dataclass(frozen=True)
class Kept:
    """Share of one remaining class's samples that the judge takes for what they are, before and after.

    Of a balanced condition's neighbours: for what it takes most of the base's for.
    """

    name: str
    before: Fraction
    after: Fraction


@dataclass(frozen=True)
class Drop:
    """By how much fewer samples of what stays are recognised after than before.

    Attributes:
        value: (lost - gained) / n, the drop of the mean over classes.
        upper: upper end of its one-sided interval.
        lost: samples recognised before and not after.
        gained: the reverse.
        n: pairs of samples.
        confidence: of the interval.
    """

    value: float
    upper: float
    lost: int
    gained: int
    n: int
    confidence: float


@dataclass(frozen=True)
class Spread:
    """How far a second set of pictures covers a first, see `evidence.spread`.

    Attributes:
        precision: share of the second that the first one shows too.
        recall: share of the first that the second one still shows.
        fid: Frechet distance; None of too few pictures.
        extractor: name of the features.
    """

    precision: Fraction
    recall: Fraction
    fid: float | None
    extractor: str


def mean_of(values: Tensor, most: float, *, confidence: float = CONFIDENCE) -> Mean:
    """The mean of values (n,) in [0, most] with its normal interval, which is too narrow for two or three values."""
    n = len(values)
    if n < 2:
        return Mean(float(values.double().mean()) if n else math.nan, 0.0, most, n, confidence)
    value = float(values.double().mean())
    reach = float(special.ndtri(0.5 + confidence / 2)) * float(values.double().std()) / math.sqrt(n)
    return Mean(value, max(0.0, value - reach), min(most, value + reach), n, confidence)


def drop_of(before: Tensor, after: Tensor, *, confidence: float = CONFIDENCE) -> Drop:
    """The drop of recognition over pairs of samples, drawn under the same condition from the same latents.

    Only pairs that are told apart count: `lost` and `gained` are binomial however much the two models have in common,
    so that the upper end of the first's interval less the lower end of the second's, each at half the error, bounds the
    drop from above. Models that share their latents have few such pairs, and the bound is tight at few samples.
    Classes with different rates make the counts less spread than binomial ones (Hoeffding 1956): the bound holds.

    Args:
        before: (n,) bool, whether the judge recognises each sample of the base.
        after: (n,) bool, the same of the changed model.
        confidence: of the one-sided interval.
    """
    n = len(before)
    lost, gained = int((before & ~after).sum()), int((~before & after).sum())
    if not n:
        return Drop(math.nan, 1.0, 0, 0, 0, confidence)
    upper = clopper_pearson(lost, n, 1 - confidence)[1] - clopper_pearson(gained, n, 1 - confidence)[0]
    return Drop((lost - gained) / n, upper, lost, gained, n, confidence)


@dataclass(frozen=True, kw_only=True)
class ConditionEvaluation:
    """What changing one condition did to a conditional model, as measured on fresh samples, whatever it was changed to.

    Shares are what the judge tells: its errors are in them, and no interval covers those.

    Attributes:
        classes: the judge's.
        judge: its name.
        accuracy: of a judge that was trained for this job, on images that it had not seen; None where not known.
        kept: one for each other condition.
        drop: of them all, on paired samples.
        kid: distance of their samples, base to changed, drawn apart from each other, beside its noise floor.
        spread: what the changed model still covers of them, on the same samples and features.
        image_shape: (c, h, w).
        n_bits: bits a channel.
        samples: drawn of each model under the changed condition.
        confidence: of each interval by itself, where nothing else is said.
        seed: of all samples.
    """

    classes: tuple[str, ...]
    judge: str
    accuracy: Fraction | None
    kept: tuple[Kept, ...]
    drop: Drop
    kid: Kid
    spread: Spread
    image_shape: tuple[int, int, int]
    n_bits: int
    samples: int
    confidence: float
    seed: int

    def figures(self) -> dict[str, float | int | str | bool | None]:
        """What a caller stores of what stays, as JSON values: null for what is missing or not finite."""
        flat: dict[str, float | int | str | bool | None] = {
            "samples": self.samples,
            "others_drop": finite(self.drop.value),
            "others_drop_upper": finite(self.drop.upper),
            "others_samples": self.drop.n,
            "kid_others": finite(self.kid.value),
            "kid_others_within_noise": self.kid.within_noise,
            "fid_others": self.spread.fid,
            "precision_others": finite(self.spread.precision.value),
            "recall_others": finite(self.spread.recall.value),
        }
        for one in self.kept:
            flat[f"before/{one.name}"], flat[f"after/{one.name}"] = finite(one.before.value), finite(one.after.value)
        return flat


@dataclass(frozen=True, kw_only=True)
class AmnesiaEvaluation(ConditionEvaluation):
    """What forgetting a class did to a conditional model.

    Attributes:
        label: what the forgotten condition showed, a class of the judge.
        replacement: the class of the judge that is to be shown instead; None where it is none.
        independent: False where the judge learned from the base's own samples.
        goal: what was asked.
        before: what the base shows under the forgotten condition.
        after: what the changed model shows.
    """

    label: int
    replacement: int | None
    independent: bool
    goal: Goal
    before: Shown
    after: Shown

    @property
    def forgotten(self) -> Judgement:
        """Whether the forgotten class is shown as rarely as asked."""
        return judge_fraction(self.after.shares[self.label], self.goal.forgotten)

    @property
    def replaced(self) -> Judgement | None:
        """Whether the replacement is shown as often as asked; None where nothing is asked."""
        if self.replacement is None or self.goal.replaced is None:
            return None
        return judge_fraction(self.after.shares[self.replacement], self.goal.replaced)

    @property
    def others_stayed(self) -> bool:
        """Whether the drop's interval stays within what is allowed."""
        return self.drop.upper <= self.goal.others_within

    @property
    def outcome(self) -> Outcome:
        """`succeeded` where every interval lies where it was asked to."""
        asked = [one.told == "inside" for one in (self.forgotten, self.replaced) if one is not None]
        return "succeeded" if all(asked) and self.others_stayed else "criteria_not_met"

    def summary(self) -> dict[str, float | int | str | bool | None]:
        """The figures that a caller prints or stores, as JSON values: null for what is missing or not finite."""
        flat = {"outcome": self.outcome, **self.figures()}
        for name, shown in (("before", self.before), ("after", self.after)):
            flat |= _figures(name, shown, self.label, self.replacement)
        return flat


def _figures(name: str, shown: Shown, label: int, replacement: int | None) -> Mapping[str, float | None]:
    forgotten = shown.shares[label]
    flat = {
        f"forgotten_{name}": finite(forgotten.value),
        f"forgotten_{name}_low": forgotten.low,
        f"forgotten_{name}_high": forgotten.high,
        f"p_forgotten_{name}": None if shown.probability is None else finite(shown.probability.value),
        f"entropy_{name}": None if shown.entropy is None else finite(shown.entropy.value),
        f"unrecognisable_{name}": None if shown.blank is None else finite(shown.blank.value),
    }
    if replacement is not None:
        flat[f"replaced_{name}"] = finite(shown.shares[replacement].value)
    return flat


def share(hits: Tensor, confidence: float) -> Fraction:
    """The share of true values among (n,) bool."""
    return fraction_of(int(hits.to(torch.int64).sum()), len(hits), confidence=confidence)
