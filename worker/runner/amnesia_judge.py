"""Who judges a conditional model's samples, whether it can, how many it is asked about, and when it is content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from evidence.amnesia_evaluation import labels_in_turn, looked_at, samples_of
from evidence.amnesia_records import Goal, share
from evidence.fractions import CONFIDENCE, Bound, Fraction
from evidence.likelihood import derive_seed
from evidence.readings import read
from evidence.sample_judge import train_on_samples
from models.conditional import ClassConditional, ConditionalModel
from unlearning import Check, Criterion
from worker.runner.conditional_base import ConditionalBase
from worker.runner.contract import Reporter
from worker.runner.images import Reader
from worker.runner.judges import Judge, judge_of, refused_by_judge
from worker.runner.problems import UserError
from worker.runner.samples import samples_below

__all__ = ["Asked", "asked_of", "criterion_of"]

TRAINED_ON = 200
"""Samples of each class that a judge learns from where none was sent; all together TRAINED_ON_AT_MOST."""
TRAINED_ON_AT_MOST = 5000
OWN_NAME = "base samples"
FIRST_LOOK = 100
"""Samples that a check looks at before it takes the trouble to look at all."""
TRIED = 400
"""Samples of the forgotten class that the judge is tried on, and of the replacement."""
TRIED_OTHERS = 1000
LEAST_OTHERS = 2000
LOST = 0.4
"""Share of the allowed drop that a model may use up and still show that it keeps it."""


@dataclass(frozen=True)
class Asked:
    """What samples have to show, who says so, and of how many."""

    judge: Judge
    independent: bool
    digest: str | None
    """SHA-256 of the classifier's file; None for a trained judge."""
    label: int
    replacement: int | None
    """The class to be shown instead; None where it is none."""
    goal: Goal
    aims: Mapping[str, Bound]
    """Where a check wants "forgotten" and "replaced": nearer than the goal, so that fresh samples show that again."""
    confidence: float
    samples: int
    """Under the forgotten condition."""
    others: int
    """Over all other classes."""


def asked_of(
    job: Mapping[str, Any], folder: Path, reader: Reader, base: ConditionalBase, label: int, reporter: Reporter
) -> Asked:
    """The job's criteria and its judge, which is tried on samples of the base.

    Raises:
        UserError: a criterion cannot be shown, or the judge cannot tell this model's classes, with the figures.
    """
    replacement, spec = job["replace_with"].get("class_label"), job.get("judge")
    goal, confidence = _goal(job, replacement), float(job.get("confidence") or CONFIDENCE)
    aims = {"forgotten": Bound(high=goal.forgotten_at_most / 2)}
    samples = samples_below(aims["forgotten"].high, goal.forgotten, confidence=confidence, classes=2)
    others = samples_below(LOST * goal.others_within, Bound(high=goal.others_within), confidence=confidence, classes=2)
    if spec:
        judge = judge_of(spec, "/judge", job, folder, reader, base, on_batch=reporter.alive)
    else:
        judge = _own_judge(base, derive_seed(job["seed"], "own judge"))
    _check_classes(judge, base)
    tried = _Tried(judge, base, derive_seed(job["seed"], "tried"), confidence)
    _check_seen(tried, label, goal)
    if goal.replaced is not None and replacement is not None:
        shown = _reachable(tried, replacement, goal.replaced)
        aims["replaced"] = Bound(low=(goal.replaced.low + shown.value) / 2)
        needed = samples_below(aims["replaced"].low, goal.replaced, confidence=confidence, classes=2)
        samples = max(samples, needed)
    return Asked(
        judge=judge,
        independent=bool(spec),
        digest=spec.get("sha256") if spec else None,
        label=label,
        replacement=replacement,
        goal=goal,
        aims=aims,
        confidence=confidence,
        samples=samples,
        others=max(others, LEAST_OTHERS),
    )


def criterion_of(asked: Asked) -> Criterion:
    """What ends the run: fresh samples under the forgotten condition show what is aimed at.

    A first look at few samples spares the rest where these alone miss what is asked.
    """

    def look(model: ConditionalModel, seed: int) -> Check:
        check = _looked(cast(ClassConditional, model), asked, min(FIRST_LOOK, asked.samples), derive_seed(seed, "few"))
        if not check.met or asked.samples <= FIRST_LOOK:
            return check
        return _looked(cast(ClassConditional, model), asked, asked.samples, derive_seed(seed, "all"))

    return look


def _looked(model: ClassConditional, asked: Asked, n: int, seed: int) -> Check:
    images = samples_of(model, torch.full((n,), asked.label, dtype=torch.int64), seed=seed)
    shown = looked_at(read(asked.judge, images), asked.label, len(asked.judge.classes), asked.confidence)
    found = {"forgotten": shown.shares[asked.label]}
    if asked.replacement is not None:
        found["replaced"] = shown.shares[asked.replacement]
    metrics = {"n": float(n), **{name: one.value for name, one in found.items()}}
    if shown.probability is not None and shown.entropy is not None:
        metrics |= {"p_forgotten": shown.probability.value, "entropy": shown.entropy.value}
    return Check(all(bound.low <= found[name].value <= bound.high for name, bound in asked.aims.items()), metrics)


def _goal(job: Mapping[str, Any], replacement: int | None) -> Goal:
    given = {name: job["criteria"][name] for name in ("forgotten_at_most", "replaced_at_least", "others_within")
             if job["criteria"].get(name) is not None}  # fmt: skip
    if "replaced_at_least" in given and replacement is None:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            "Whether samples show noise or images of yours is nothing that the judge can tell: replaced_at_least goes "
            "with a class of the model as the replacement.",
            pointer="/criteria/replaced_at_least",
        )
    with refused_by_judge("/criteria"):
        return Goal(**given)


def _own_judge(base: ConditionalBase, seed: int) -> Judge:
    """A judge that learned each class from the base's own samples of it."""
    classes = base.model.n_classes
    each = max(10, min(TRAINED_ON, TRAINED_ON_AT_MOST // classes))
    labels = labels_in_turn(range(classes), each * classes)
    own, fresh = (samples_of(base.model, labels, seed=derive_seed(seed, which)) for which in ("own", "fresh"))
    names = [str(label) for label in range(classes)]
    with refused_by_judge("/judge"):
        return Judge(train_on_samples(own, labels, (fresh, labels), names, seed=seed, name=OWN_NAME), "/judge")


@dataclass(frozen=True)
class _Tried:
    """A judge on samples of the base."""

    judge: Judge
    base: ConditionalBase
    seed: int
    confidence: float

    def recognised(self, labels: list[int], n: int) -> Fraction:
        """The share of n samples of these classes that it takes for what they are."""
        drawn_of = labels_in_turn(labels, n)
        images = samples_of(self.base.model, drawn_of, seed=derive_seed(self.seed, *map(str, labels)))
        return share(read(self.judge, images).seen == drawn_of, self.confidence)


def _check_classes(judge: Judge, base: ConditionalBase) -> None:
    if len(judge.classes) < base.model.n_classes:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            f"The judge tells {len(judge.classes)} classes and the model has {base.model.n_classes}: it has to tell "
            "them all, in the order of their labels; further classes may follow.",
            pointer="/judge",
        )


def _check_seen(tried: _Tried, label: int, goal: Goal) -> None:
    """Whether the judge sees on the base what is to be forgotten, and what is to stay."""
    shown = tried.recognised([label], TRIED)
    if shown.low <= goal.forgotten_at_most:
        raise _unseen(
            f"the judge takes {_said(shown)} samples of class {label} for “{tried.judge.classes[label]}”. With its "
            f"interval that does not lie above the {goal.forgotten_at_most:.1%} that are allowed: it could not tell "
            "whether anything was forgotten. Send a classifier that knows the class, or another checkpoint",
            shown,
        )
    staying = tried.recognised([one for one in range(tried.base.model.n_classes) if one != label], TRIED_OTHERS)
    if staying.low <= 1 / len(tried.judge.classes):
        raise _unseen(
            f"the judge takes {_said(staying)} samples of the other classes for what they are, which cannot be told "
            "from chance: it could not see whether they stay. Are its classes in the order of the model's labels?",
            staying,
        )


def _reachable(tried: _Tried, replacement: int, bound: Bound) -> Fraction:
    """How often the judge sees the replacement in the base's own samples of it: no more can be asked of others."""
    shown = tried.recognised([replacement], TRIED)
    if shown.value > bound.low:
        return shown
    raise UserError(
        "target-unreachable",
        "The target cannot be reached from this checkpoint",
        f"The judge takes {_said(shown)} samples of class {replacement} itself for what they are; where they stand in "
        f"for others it will not reach {bound.low:.1%}. Ask for less, or for another replacement.",
        pointer="/criteria/replaced_at_least",
        measured=shown.value,
        samples=shown.n,
        upper=shown.high,
        **{"class": tried.judge.classes[replacement]},
    )


def _said(found: Fraction) -> str:
    return f"{found.value:.1%} (interval {found.low:.1%} to {found.high:.1%}) of {found.n:,}"


def _unseen(detail: str, found: Fraction) -> UserError:
    title = "There is too little to judge from"
    return UserError(
        "insufficient-evidence", title, f"On the base, {detail}.", pointer="/judge", given=found.n, needed=None,
        measured=found.value,
    )  # fmt: skip
