"""What samples have to show once a class is gone: a bound on how often the flow's own classification still finds it.

The bound is held against the judge's misreadings, and its cost is known, and refused, before anything is drawn.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from evidence.fractions import CONFIDENCE, Bound
from evidence.steering_records import FractionBounds
from worker.runner.own_classes import OwnClasses
from worker.runner.problems import UserError
from worker.runner.samples import Asked, samples_below

__all__ = ["check_affordable", "gone"]

MOST_LEFT = 0.01
"""Share of samples that may still show the class, beyond those of others that the judge takes for it, at most."""
LEFT_OF_SHARE = 0.1
"""The same as a part of the class's own share: what is rare by itself must get rarer too."""
MOVED = 0.4
"""Share of that by which changed weights may move what the judge finds, and the job is still to pass: it decides how
many samples are judged."""
READ_SAMPLES = 2000
"""Samples of the other classes, spread by their shares, that misreadings are counted on at least."""
READ_OF_CLASS = 200
"""Samples of the class itself that the judge's right readings are counted on."""
BLUR = 0.5
"""Share of what may be left that the uncertainty of the misreadings, two standard errors, may fill."""
MOST_EVALUATIONS = 2**20
"""Evaluations of one image that a judge which takes one for each class may spend: an hour at 300 a second."""
POINTER = "/target/class_label"
OUTSIDE = (
    "An outside judge takes one reading a sample: forget it by `attributes` instead of `class_label`, with an ONNX "
    "classifier of the store and how often samples may show the class."
)


@dataclass(frozen=True)
class _Reading:
    """How often the judge finds the class in samples of the base that are, and that are not, of it."""

    right: float
    misread: float
    share: float
    """Of the class, among samples of the base."""

    @property
    def bound(self) -> Bound:
        """What may be found once the class is gone."""
        return Bound(0.0, min(1.0, self.misread + _left(self.share)))

    @property
    def told(self) -> bool:
        """Whether the base itself misses that bound, so that keeping it means something."""
        return self.share * self.right + (1 - self.share) * self.misread > self.bound.high


def check_affordable(own: OwnClasses, label: int) -> None:
    """Refuse a class whose absence takes more to show than a job spends, even if the judge misreads nothing.

    Raises:
        UserError: more samples, or more evaluations of the flow, than a job may take.
    """
    if label in own.shares:
        _check_evaluations(own, label, READ_SAMPLES + READ_OF_CLASS, _samples(own, label, 0.0))


def gone(own: OwnClasses, label: int) -> Asked:
    """What a flow without the class is to show: the judge finds it no more often than it misreads the others as it.

    Raises:
        UserError: more samples, or more evaluations of the flow, than a job may take.
    """
    name, share = own.judge.classes[label], own.shares[label]
    left, found = _left(share), _read(own, label)
    samples = _samples(own, label, found.misread)
    _check_evaluations(own, label, 0, samples)
    note = (
        f"The judge of samples is the base flow's own classification, held against its own misreadings: it takes "
        f"{_percent(found.misread)} of the base's samples of the other classes for class {name}, and the bound lies "
        f"{100 * left:.3g} points above that: {_percent(left / share)} of the {_percent(share)} of samples that the "
        f"base draws of the class. What the base cannot tell, it cannot see. An outside judge, an ONNX classifier of "
        f"the store, is asked for by a job whose target names attributes instead."
    )
    if not found.told:
        shown = share * found.right + (1 - share) * found.misread
        note += (
            f" This judge finds the class in {_percent(shown)} of the base's own samples, which keep the bound too: "
            f"here that fraction decides nothing, and an outside judge is needed."
        )
    return Asked([FractionBounds.at_most(own.judge, {name: found.bound.high})], samples, CONFIDENCE, note)


def _left(share: float) -> float:
    """Share of samples that may still show a class of this share."""
    return min(MOST_LEFT, LEFT_OF_SHARE * share)


def _read(own: OwnClasses, label: int) -> _Reading:
    """Count readings; of the other classes more, where the bound is so near that chance would blur it."""
    share = own.shares[label]
    others = {of: weight for of, weight in own.shares.items() if of != label}
    right = own.read_as(label, {label: 1.0}, READ_OF_CLASS, "of the class") / READ_OF_CLASS
    hits = own.read_as(label, others, READ_SAMPLES, "of others")
    first = _Reading(right, hits / READ_SAMPLES, share)
    rate = (hits + 1) / (READ_SAMPLES + 2)  # Laplace's: none of some is not none of all
    wanted = math.ceil(rate * (1 - rate) * (2 / (BLUR * _left(share))) ** 2)
    if not first.told or wanted <= READ_SAMPLES:
        return first
    samples = _samples(own, label, first.misread)
    wanted = min(wanted, max(READ_SAMPLES, samples))  # no closer than the samples of the flow are read themselves
    _check_evaluations(own, label, wanted - READ_SAMPLES, samples)
    hits += own.read_as(label, others, wanted - READ_SAMPLES, "more of others")
    return _Reading(right, hits / wanted, share)


def _samples(own: OwnClasses, label: int, misread: float) -> int:
    """Fresh samples with which a flow without the class shows it."""
    share, classes = own.shares[label], len(own.judge.classes)
    left = _left(share)
    bound = Bound(0.0, min(1.0, misread + left))
    try:
        return samples_below(misread + MOVED * left, bound, confidence=CONFIDENCE, classes=classes)
    except UserError as error:
        given, needed = error.problem["given"], error.problem["needed"]
        detail = (
            f"The base draws class {label} in {_percent(share)} of its samples. To show by its own classification that "
            f"no more than {_percent(left)} are left of it, beyond the {_percent(misread)} of others that it misreads, "
            f"takes {'more samples than can be named' if needed is None else f'{needed:,} samples'}, and {given:,} are "
            f"the most. {OUTSIDE}"
        )
        title = error.problem["title"]
        raise UserError("insufficient-evidence", title, detail, pointer=POINTER, given=given, needed=needed) from error


def _check_evaluations(own: OwnClasses, label: int, read: int, samples: int) -> None:
    """Refuse what would be read by too many evaluations: `read` samples of the base now, then `samples` of each flow.

    A class prior tells all classes by one evaluation, which costs no more than the sample did.
    """
    needed = (read + 2 * samples) * own.evaluations
    if own.evaluations > 1 and needed > MOST_EVALUATIONS:
        detail = (
            f"This flow tells its classes apart by {own.evaluations:,} evaluations an image, one for each class. To "
            f"show by them that class {label} is gone takes {samples:,} samples of the flow before and after, "
            f"{needed:,} evaluations in all, and {MOST_EVALUATIONS:,} are the most. {OUTSIDE}"
        )
        title = "The flow's own classification would take too long"
        limits = {"given": MOST_EVALUATIONS, "needed": needed}
        raise UserError("insufficient-evidence", title, detail, pointer=POINTER, **limits)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
