"""The judge of a balanced condition: what its samples show before and after, and whether other conditions still do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evidence.amnesia_evaluation import Pair, Progress, accuracy_of
from evidence.amnesia_records import ConditionEvaluation, Drop, drop_of, share
from evidence.classifier import Classifier
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Bound, Fraction, Judgement, count, judge
from evidence.kid import Extractor
from evidence.records import Outcome, finite
from models.conditional import LabelledSampler

__all__ = ["BalanceEvaluation", "change_of", "evaluate_balance"]

OTHERS_WITHIN = 0.02


@dataclass(frozen=True, kw_only=True)
class BalanceEvaluation(ConditionEvaluation):
    """What balancing a condition did to a conditional model.

    Attributes:
        condition: its name.
        bounds: where the share of each of the judge's classes has to lie.
        before: what the base shows under the condition, by class; intervals hold together.
        after: what the changed model shows.
        usual: of each other condition, in the order of `kept`, the class that the base mostly shows under it.
        read_otherwise: share of pairs of samples of the others that the judge takes for another class than before, in
            whichever direction.
        others_within: by how much the share of the others' samples that show what is usual there may change.
    """

    condition: str
    bounds: Mapping[str, Bound]
    before: Mapping[str, Fraction]
    after: Mapping[str, Fraction]
    usual: tuple[str, ...]
    read_otherwise: Fraction
    others_within: float

    @property
    def balanced(self) -> Judgement:
        """Whether every class is shown as often as asked."""
        return judge(self.after, self.bounds)

    def told(self, name: str) -> Judgement:
        """The same of one class."""
        return judge(self.after, {name: self.bounds[name]})

    @property
    def others_stayed(self) -> bool:
        """Whether the change's interval stays within what is allowed."""
        return self.drop.upper <= self.others_within

    @property
    def outcome(self) -> Outcome:
        """`succeeded` where every interval lies where it was asked to."""
        return "succeeded" if self.balanced.told == "inside" and self.others_stayed else "criteria_not_met"

    def summary(self) -> dict[str, float | int | str | bool | None]:
        """The figures that a caller prints or stores, as JSON values: null for what is missing or not finite."""
        flat = {
            "outcome": self.outcome,
            "evidence": self.balanced.told,
            "samples_needed": self.balanced.needed,
            "others_read_otherwise": finite(self.read_otherwise.value),
            **self.figures(),
        }
        for name in self.classes:
            key, before, after = f"{self.judge}/{name}", self.before[name], self.after[name]
            flat[f"before/{key}"], flat[f"after/{key}"] = finite(before.value), finite(after.value)
            flat[f"low/{key}"], flat[f"high/{key}"] = after.low, after.high
        return flat


def change_of(before: Tensor, after: Tensor, *, confidence: float = CONFIDENCE) -> Drop:
    """The drop of a share over pairs of samples, as `drop_of`, with an upper end that bounds a rise as well.

    Each direction has its own one-sided interval. That a change lies within x is said only where both do, and so needs
    no correction (an intersection-union test, Berger 1982).
    """
    fallen, risen = drop_of(before, after, confidence=confidence), drop_of(after, before, confidence=confidence)
    return replace(fallen, upper=max(fallen.upper, risen.upper))


def evaluate_balance(
    base: LabelledSampler,
    changed: LabelledSampler,
    classifier: Classifier,
    *,
    label: int,
    names: Sequence[str],
    bounds: Mapping[str, Bound],
    image_shape: tuple[int, int, int],
    n_bits: int,
    samples: int,
    others: int,
    others_within: float = OTHERS_WITHIN,
    confidence: float = CONFIDENCE,
    seed: int,
    extractor: Extractor | None = None,
    on_progress: Progress | None = None,
) -> BalanceEvaluation:
    """Judge a model one condition of which was to show classes of a judge as often as asked.

    What the others show is told by the same judge, which need not know their subjects. Of each, the class that it takes
    most of the base's samples for is the usual one; the share of samples that show it must neither fall, as where the
    balance spreads to others, nor rise. That the very same sample is still taken for the same is more than was asked:
    samples of a model with many steps differ from equal latents although they are spread as before. How many are not
    is told beside it. With few samples of a condition the usual class is in part an accident, which the changed model
    does not share: a fall is then overstated, and a rise understated.

    Args:
        base: the model before.
        changed: the model after.
        classifier: who tells what samples show; every sample is taken for one of its classes.
        label: of the condition.
        names: of every label.
        bounds: where the share of each class has to lie, see `evidence.steering_records.FractionBounds.distribution`.
        image_shape: (c, h, w) of the samples.
        n_bits: bits a channel.
        samples: to draw of each model under the condition.
        others: to draw of each over all other conditions, rounded up to as many of each.
        others_within: by how much what they show may change, in (0, 1).
        confidence: of all classes' intervals together; of each other interval by itself.
        seed: of all samples; never one that the method drew from.
        extractor: features for the distance; principal components of both models' samples if None.
        on_progress: called with (step, total) after every batch.

    Raises:
        TargetError: nothing is to be drawn, or nothing is asked.
    """
    kept = [one for one in range(len(names)) if one != label]
    if samples < 1 or others < 1 or not kept or label not in range(len(names)) or not bounds:
        raise TargetError(
            f"there is nothing to judge in {samples} samples of {label} and {others} of {len(kept)} others"
        )
    if not 0 < others_within < 1:
        raise TargetError(f"others_within lies between 0 and 1, not at {others_within:g}: no samples could show it")
    told = classifier.classes
    pair = Pair(base, changed, label=label, samples=samples, kept=kept, others=others, seed=seed, report=on_progress)
    shown = [count(classifier(one), told, confidence=confidence) for one in pair.under_the_condition()]
    pictures = pair.under_the_others()
    read = [classifier(some).cpu() for some in pictures]
    usual = {one: int(torch.bincount(read[0][pair.staying == one]).argmax()) for one in kept}
    expected = torch.tensor([usual[one] for one in pair.staying.tolist()])
    as_usual = [some == expected for some in read]
    distance, covered = pair.compared(pictures[0], extractor, confidence)
    return BalanceEvaluation(
        condition=names[label],
        bounds=bounds,
        before=shown[0],
        after=shown[1],
        usual=tuple(told[usual[one]] for one in kept),
        read_otherwise=share(read[0] != read[1], confidence),
        others_within=others_within,
        classes=tuple(told),
        judge=classifier.name,
        accuracy=accuracy_of(classifier),
        kept=tuple(pair.kept(names[one], one, as_usual, confidence) for one in kept),
        drop=change_of(*as_usual, confidence=confidence),
        kid=distance,
        spread=covered,
        image_shape=image_shape,
        n_bits=n_bits,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )
