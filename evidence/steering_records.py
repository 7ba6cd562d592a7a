"""What is asked of a steered flow, and what an evaluation of its samples found: frozen records, figures named."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from evidence.classifier import Classifier
from evidence.drift import Drift, SampleHealth
from evidence.errors import TargetError, UnknownClassError
from evidence.fractions import Bound, Fraction, Judgement, Told
from evidence.kid import Kid
from evidence.likelihood import FloatArray
from evidence.records import Outcome, finite

__all__ = [
    "ClassChange",
    "FractionBounds",
    "JudgeEvaluation",
    "LikelihoodChange",
    "RelearnProbe",
    "SteeringEvaluation",
]

SUM_TOLERANCE = 1e-6


@dataclass(frozen=True)
class FractionBounds:
    """Where the fractions of one classifier's classes have to lie among a flow's samples.

    Attributes:
        classifier: the judge.
        low: least fraction, by class; classes left out have none.
        high: largest fraction, by class, likewise.
        by_label: whether the bounds are on the classes that samples were drawn of, which a `LabelledFlow` knows by
            their place among the classifier's. What that says of the same samples is told too, and decides nothing.
    """

    classifier: Classifier
    low: Mapping[str, float] = field(default_factory=dict)
    high: Mapping[str, float] = field(default_factory=dict)
    by_label: bool = False

    def __post_init__(self) -> None:
        unknown = sorted({*self.low, *self.high} - set(self.classifier.classes))
        if unknown:
            raise UnknownClassError(
                f"the classifier {self.classifier.name} does not tell {', '.join(map(repr, unknown))}; it tells "
                f"{', '.join(self.classifier.classes)}"
            )
        if not self.bounds:
            raise TargetError(f"nothing is asked of the classes of {self.classifier.name}: bound one of them")

    @classmethod
    def at_most(cls, classifier: Classifier, fractions: Mapping[str, float]) -> FractionBounds:
        """No more of each class than so much."""
        return cls(classifier, high=fractions)

    @classmethod
    def at_least(cls, classifier: Classifier, fractions: Mapping[str, float]) -> FractionBounds:
        """No less of each class than so much."""
        return cls(classifier, low=fractions)

    @classmethod
    def distribution(
        cls, classifier: Classifier, target: Mapping[str, float], tolerance: float, *, by_label: bool = False
    ) -> FractionBounds:
        """Every class within target +- tolerance; a class that the target leaves out is wanted at 0.

        Raises:
            TargetError: the target does not sum to 1, or holds a fraction outside [0, 1].
            UnknownClassError: it names a class that the classifier does not tell.
        """
        total = sum(target.values())
        if not abs(total - 1) <= SUM_TOLERANCE:
            raise TargetError(f"a target distribution sums to 1; this one sums to {total:.6g}")
        bounds = {name: Bound.around(target.get(name, 0.0), tolerance) for name in (*classifier.classes, *target)}
        low, high = {k: one.low for k, one in bounds.items()}, {k: one.high for k, one in bounds.items()}
        return cls(classifier, low, high, by_label)

    @property
    def bounds(self) -> dict[str, Bound]:
        """The bound of every class that has one, in the classifier's order."""
        named = [name for name in self.classifier.classes if name in self.low or name in self.high]
        return {name: Bound(self.low.get(name, 0.0), self.high.get(name, 1.0)) for name in named}


@dataclass(frozen=True)
class ClassChange:
    """How often samples show one class, before and after.

    Attributes:
        name: of the class.
        before: fraction among samples of the base flow.
        after: fraction among samples of the steered flow.
        bound: where `after` has to lie; None where nothing is asked.
        judgement: whether it does; None likewise.
        kid: distance of the class's samples, base to steered, beside its noise: whether what is still drawn of the
            class looks as it did. Its floor is None where either flow drew too few.
    """

    name: str
    before: Fraction
    after: Fraction
    bound: Bound | None
    judgement: Judgement | None
    kid: Kid


@dataclass(frozen=True)
class JudgeEvaluation:
    """What one classifier counted, or what was counted without one.

    Attributes:
        name: of the classifier.
        changes: one for each of its classes.
        judgement: over all classes with a bound; "inside" where it bounds none and only tells what it reads.
        accuracy: of a classifier that was trained for the job, on images it had not seen; None where it is not known.
        drawn: whether nothing was read: these are the classes that the samples were drawn of.
    """

    name: str
    changes: tuple[ClassChange, ...]
    judgement: Judgement
    accuracy: Fraction | None
    drawn: bool = False


@dataclass(frozen=True, eq=False)
class LikelihoodChange:
    """Likelihoods of images that steering was to leave alone, on common noise.

    Attributes:
        nll_base: (n,) nats, lower is more likely.
        nll_steered: (n,) nats.
        draws: noise draws an image.
        drift: mean change, in standard deviations over the images to remember under the base model.
    """

    nll_base: FloatArray
    nll_steered: FloatArray
    draws: int
    drift: Drift


@dataclass(frozen=True)
class RelearnProbe:
    """What a short re-training on the forgotten class brought back. Lower is better; access removal fails it at once.

    Attributes:
        label: the class.
        steps: of re-training.
        images: that it re-trained on.
        before: fraction of samples in the class before the probe.
        after: after it.
    """

    label: str
    steps: int
    images: int
    before: float
    after: float


@dataclass(frozen=True, eq=False)
class SteeringEvaluation:
    """What steering did to a flow's samples, as measured; `evidence.steering_report` turns it into a document.

    Fractions are what classifiers tell: their errors are in them, and no interval covers those; but for judges that are
    `drawn`, which count what the flow itself drew. A fraction of 0 does
    not say that the class cannot be drawn, only how rarely; nor that re-training would not bring it back.

    Attributes:
        kind: what was done, such as "attribute", "debias", "access removal" or "unlearning".
        image_shape: (c, h, w).
        n_bits: bits a channel.
        samples: drawn of each flow, from latents of their own.
        confidence: of each classifier's intervals together.
        seed: all noise and samples derive from it.
        judges: one for each constraint; where its bounds are by label, what was drawn goes before what was read.
        remember: likelihoods of images to remember; None where none were given.
        held_out: of images that nothing has seen, likewise.
        health_base: of the base flow's samples.
        health_steered: of the steered flow's.
        relearn: what re-training brought back; None where it was not tried.
        notes: limits of this very evaluation, in sentences.
    """

    kind: str
    image_shape: tuple[int, int, int]
    n_bits: int
    samples: int
    confidence: float
    seed: int
    judges: tuple[JudgeEvaluation, ...]
    remember: LikelihoodChange | None
    held_out: LikelihoodChange | None
    health_base: SampleHealth
    health_steered: SampleHealth
    relearn: RelearnProbe | None
    notes: tuple[str, ...]

    @property
    def told(self) -> Told:
        """Over all classifiers: "outside" where one is, else "insufficient" where one is, else "inside"."""
        found = [one.judgement.told for one in self.judges]
        if "outside" in found:
            return "outside"
        return "insufficient" if "insufficient" in found else "inside"

    @property
    def needed(self) -> int | None:
        """Samples that would do where the evidence is insufficient; None where it is not, or no number is known."""
        open_ = [one.judgement.needed for one in self.judges if one.judgement.told == "insufficient"]
        known = [n for n in open_ if n is not None]
        return max(known) if self.told == "insufficient" and len(known) == len(open_) else None

    @property
    def healthy(self) -> bool:
        """Whether the steered flow's samples are as sound as the base's."""
        return self.health_steered.as_good_as(self.health_base)

    @property
    def outcome(self) -> Outcome:
        """`succeeded` when every interval lies inside its bound and the samples are sound."""
        return "succeeded" if self.told == "inside" and self.healthy else "criteria_not_met"

    def summary(self) -> dict[str, float | int | str | bool | None]:
        """The figures that a caller prints or stores, as JSON values: null for what is missing or not finite."""
        flat: dict[str, float | int | str | bool | None] = {
            "outcome": self.outcome,
            "evidence": self.told,
            "samples": self.samples,
            "samples_needed": self.needed,
            "healthy": self.healthy,
            "drift_remember": None if self.remember is None else finite(self.remember.drift.value),
            "drift_held_out": None if self.held_out is None else finite(self.held_out.drift.value),
        }
        for judge in self.judges:
            for one in judge.changes:
                key = f"{judge.name}/{one.name}"
                flat[f"before/{key}"], flat[f"after/{key}"] = finite(one.before.value), finite(one.after.value)
                flat[f"low/{key}"], flat[f"high/{key}"] = one.after.low, one.after.high
                flat[f"kid/{key}"] = finite(one.kid.value)
        return flat
