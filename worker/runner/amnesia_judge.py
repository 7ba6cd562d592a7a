"""Who judges a conditional model's samples, whether it can, how many it is asked about, and when it is content."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evidence.amnesia_evaluation import labels_in_turn, looked_at, samples_of
from evidence.amnesia_records import Goal, share
from evidence.fractions import CONFIDENCE, Bound, Fraction
from evidence.likelihood import derive_seed
from evidence.readings import read
from evidence.sample_judge import train_on_samples
from models.conditional import ConditionalModel, GuidedConditional, LabelledSampler
from unlearning import Check, Criterion
from unlearning.prompts import plain
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import Concepts
from worker.runner.contract import Reporter
from worker.runner.images import Reader
from worker.runner.judges import Judge, judge_of, refused_by_judge
from worker.runner.own_samples import OwnSamples
from worker.runner.problems import UserError
from worker.runner.samples import samples_below

__all__ = ["Asked", "Effort", "asked_of", "criterion_of", "effort_of"]

OWN_NAME = "base samples"
LEARNT_AT_LEAST = 10
"""Samples of each class that a judge learns from, however many classes there are."""
FRESH = 4
"""One sample is held back, to measure a trained judge on, for so many that it learns from."""


@dataclass(frozen=True)
class Effort:
    """How many samples a judge is asked about, which are cheap or dear."""

    learnt: int
    """Samples of each class that a judge learns from where none was sent."""
    learnt_at_most: int
    """All together, as far as each class keeps `LEARNT_AT_LEAST`."""
    first_look: int
    """Samples that a check looks at before it takes the trouble to look at all."""
    tried: int
    """Samples of the forgotten class that the judge is tried on, and of the replacement."""
    tried_others: int
    aim: float
    """Share of what is allowed to be left that a check wants: the nearer to none, the fewer samples show it."""
    lost: float
    """Share of the allowed drop that a model may use up and still show that it keeps it."""
    slack: float
    """Share of the tolerance by which a balanced condition may miss its target and still show that it keeps it."""
    plenty: int
    """Samples under a balanced condition that a look may take however little of the tolerance its mixture leaves."""
    least_samples: int
    least_others: int

    def learnt_of_each(self, labels: int) -> int:
        """Samples of each of so many labels that an own judge learns from, the first that are stored."""
        return max(LEARNT_AT_LEAST, min(self.learnt, self.learnt_at_most // labels))

    def others_for(self, within: float, confidence: float) -> int:
        """Samples of what stays with which a model shows that no more than so much of it is lost."""
        return samples_below(
            self.lost * within, Bound(high=within), confidence=confidence, classes=2, least=self.least_others
        )


CHEAP = Effort(
    learnt=200, learnt_at_most=5000, first_look=100, tried=400, tried_others=1000, aim=0.5, lost=0.4, slack=0.4,
    plenty=20_000, least_samples=500, least_others=2000,
)  # fmt: skip
DEAR = Effort(
    learnt=100, learnt_at_most=1600, first_look=50, tried=50, tried_others=180, aim=0.2, lost=0.3, slack=0.3,
    plenty=2_000, least_samples=200, least_others=400,
)  # fmt: skip


def effort_of(base: ConditionalBase) -> Effort:
    """What suits the time that the model takes to draw."""
    return DEAR if isinstance(base.model, GuidedConditional) else CHEAP


@dataclass(frozen=True)
class Asked:
    """What samples have to show, who says so, and of how many."""

    judge: Judge
    independent: bool
    digest: str | None
    """SHA-256 of the classifier's file; None for a trained judge."""
    label: int
    """Of the forgotten condition."""
    shows: Mapping[int, int]
    """The judge's class of each label that is judged."""
    replacement: int | None
    """The label whose class is to be shown instead; None where it is none, or the judge does not tell it."""
    goal: Goal
    aims: Mapping[str, Bound]
    """Where a check wants "forgotten" and "replaced": nearer than the goal, so that fresh samples show that again."""
    confidence: float
    samples: int
    """Under the forgotten condition."""
    others: int
    """Over all other conditions that are judged."""
    staying: Fraction
    """How many of the base's samples of these the judge takes for what they are."""
    effort: Effort


def asked_of(
    job: Mapping[str, Any],
    folder: Path,
    reader: Reader,
    base: ConditionalBase,
    own: OwnSamples,
    *,
    label: int,
    replacement: int | None,
    reporter: Reporter,
) -> Asked:
    """The job's criteria and its judge, which is tried on samples of the base.

    Args:
        job: what is asked.
        folder: the job's.
        reader: of labelled sets.
        base: the model.
        own: its samples.
        label: that is to be forgotten.
        replacement: the label that takes its place, where one does.
        reporter: told that a slow judge is alive.

    Raises:
        UserError: a criterion cannot be shown, or the judge cannot tell this model's classes, with the figures.
    """
    goal, confidence = _goal(job, replacement), float(job.get("confidence") or CONFIDENCE)
    effort, spec = effort_of(base), job.get("judge")
    if spec:
        judge = judge_of(spec, "/judge", job, folder, reader, base, on_batch=reporter.alive)
        shows = shown_by(judge, base, spec.get("shows") or {})
    else:
        judge = _own_judge(base, own, effort, derive_seed(job["seed"], "own judge"))
        shows = {one: one for one in base.labels}
    _check_shows(judge, shows, label)
    if replacement is not None and replacement not in shows:
        if goal.replaced is not None:
            raise _unshown(f"“{base.conditions.names[replacement]}” has none", "/judge/shows")
        replacement = None
    enough = partial(samples_below, confidence=confidence, classes=2)
    aims = {"forgotten": Bound(high=goal.forgotten_at_most * effort.aim)}
    samples = enough(aims["forgotten"].high, goal.forgotten, least=effort.least_samples)
    others = effort.others_for(goal.others_within, confidence)
    tried = _Tried(judge, base, own, shows, effort, confidence)
    staying = _check_seen(tried, label, goal)
    if goal.replaced is not None and replacement is not None:
        shown = _reachable(tried, replacement, goal.replaced)
        aims["replaced"] = Bound(low=(goal.replaced.low + shown.value) / 2)
        samples = max(samples, enough(aims["replaced"].low, goal.replaced, least=effort.least_samples))
    return Asked(
        judge=judge,
        independent=bool(spec),
        digest=spec.get("sha256") if spec else None,
        label=label,
        shows=shows,
        replacement=replacement,
        goal=goal,
        aims=aims,
        confidence=confidence,
        samples=samples,
        others=others,
        staying=staying,
        effort=effort,
    )


def criterion_of(asked: Asked, base: ConditionalBase, on_batch: Callable[[], None] = lambda: None) -> Criterion:
    """What ends the run: fresh samples under the forgotten condition show what is aimed at.

    A first look at few samples spares the rest where these alone miss what is asked. `on_batch` is called after every
    batch of samples, which may take minutes.
    """

    def look(model: ConditionalModel, seed: int) -> Check:
        first, sampler = min(asked.effort.first_look, asked.samples), base.conditions.sampler(model)
        check = _looked(sampler, asked, first, derive_seed(seed, "few"), on_batch)
        if check.met:
            check = _others_too(check, sampler, asked, derive_seed(seed, "others"), on_batch)
        if not check.met or asked.samples == first:
            return check
        whole = _looked(sampler, asked, asked.samples, derive_seed(seed, "all"), on_batch)
        return Check(whole.met, {**check.metrics, **whole.metrics})

    return look


def _others_too(check: Check, sampler: LabelledSampler, asked: Asked, seed: int, on_batch: Callable[[], None]) -> Check:
    """Not met while what stays is recognised less than on the base, by half of what is allowed: replay mends it yet.

    Of some samples only: the evaluation decides, on many, in pairs with the base's.
    """
    drawn_of = labels_in_turn([one for one in asked.shows if one != asked.label], asked.effort.tried_others)
    images = samples_of(sampler, drawn_of, seed=seed, on_batch=on_batch)
    expected = torch.tensor([asked.shows[label] for label in drawn_of.tolist()])
    now = share(read(asked.judge, images).seen == expected, asked.confidence)
    return Check(
        now.value >= asked.staying.value - asked.goal.others_within / 2, {**check.metrics, "others": now.value}
    )


def _looked(sampler: LabelledSampler, asked: Asked, n: int, seed: int, on_batch: Callable[[], None]) -> Check:
    images = samples_of(sampler, torch.full((n,), asked.label, dtype=torch.int64), seed=seed, on_batch=on_batch)
    forgotten = asked.shows[asked.label]
    shown = looked_at(read(asked.judge, images), forgotten, len(asked.judge.classes), asked.confidence)
    found = {"forgotten": shown.shares[forgotten]}
    if asked.replacement is not None:
        found["replaced"] = shown.shares[asked.shows[asked.replacement]]
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


def _own_judge(base: ConditionalBase, own: OwnSamples, effort: Effort, seed: int) -> Judge:
    """A judge that learned each label from the base's own samples of it."""
    names = base.conditions.names
    each = effort.learnt_of_each(len(names))
    images, labels = own.pictures(base.labels, each * len(names), "own")
    fresh = own.pictures(base.labels, max(1, each // FRESH) * len(names), "fresh", after=each)
    with refused_by_judge("/judge"):
        return Judge(train_on_samples(images, labels, fresh, names, seed=seed, name=OWN_NAME), "/judge")


def shown_by(judge: Judge, base: ConditionalBase, shows: Mapping[str, str]) -> dict[int, int]:
    """The judge's class of each label, as far as it has one: of a class by its place, of a concept by its name.

    Raises:
        UserError: it lacks classes, or a name is unknown.
    """
    names = base.conditions.names
    if not isinstance(base.conditions, Concepts):
        if len(judge.classes) < len(names):
            raise UserError(
                "invalid-request",
                "The request cannot be met as it stands",
                f"The judge tells {len(judge.classes)} classes and the model has {len(names)}: it has to tell them "
                "all, in the order of their labels; further classes may follow.",
                pointer="/judge",
            )
        return {one: one for one in base.labels}
    said = {plain(concept): name for concept, name in shows.items()}
    wanted = {label: said.get(plain(name), name) for label, name in enumerate(names)}
    return {label: judge.classes.index(name) for label, name in wanted.items() if name in judge.classes}


def _check_shows(judge: Judge, shows: Mapping[int, int], label: int) -> None:
    """What is forgotten and what stays have classes of the judge, and not the same."""
    if label not in shows:
        raise _unshown("what is to be forgotten has none", "/judge/shows")
    others = [one for one in shows if one != label]
    if not others:
        raise _unshown("nothing that is remembered has one", "/judge/shows")
    if any(shows[one] == shows[label] for one in others):
        raise _unshown(
            f"“{judge.classes[shows[label]]}” is also the class of something that is to stay", "/judge/shows"
        )


def _unshown(what: str, pointer: str) -> UserError:
    return UserError(
        "invalid-request",
        "The request cannot be met as it stands",
        f"The judge tells concepts by its classes, and {what}. Say which class shows which concept, such as "
        '{"shows": {"a red car": "car"}}, for what is forgotten and for what stays.',
        pointer=pointer,
    )


@dataclass(frozen=True)
class _Tried:
    """A judge on samples of the base."""

    judge: Judge
    base: ConditionalBase
    own: OwnSamples
    shows: Mapping[int, int]
    effort: Effort
    confidence: float

    def recognised(self, labels: Sequence[int], n: int) -> Fraction:
        """The share of n samples of these labels that it takes for what they are."""
        learnt = 0 if self.judge.accuracy is None else self.effort.learnt_of_each(len(self.base.labels))
        purpose = f"tried {' '.join(map(str, labels))}"
        images, drawn_of = self.own.pictures(labels, n, purpose, after=learnt)
        expected = torch.tensor([self.shows[label] for label in drawn_of.tolist()])
        return share(read(self.judge, images).seen == expected, self.confidence)


def _check_seen(tried: _Tried, label: int, goal: Goal) -> Fraction:
    """Whether the judge sees on the base what is to be forgotten, and what is to stay; how much of the latter."""
    shown, names = tried.recognised([label], tried.effort.tried), tried.base.conditions.names
    if shown.low <= goal.forgotten_at_most:
        raise _unseen(
            f"the judge takes {_said(shown)} samples of {_named(tried, label)} for "
            f"“{tried.judge.classes[tried.shows[label]]}”. With its "
            f"interval that does not lie above the {goal.forgotten_at_most:.1%} that are allowed: it could not tell "
            "whether anything was forgotten. Send a classifier that knows the class, or another checkpoint",
            shown,
        )
    staying = tried.recognised([one for one in tried.shows if one != label], tried.effort.tried_others)
    if staying.low <= 1 / len(tried.judge.classes):
        raise _unseen(
            f"the judge takes {_said(staying)} samples of what is to stay for what they are, which cannot be told "
            f"from chance among its {len(tried.judge.classes)} classes: it could not see whether they stay. Do its "
            f"classes go with the model's, {', '.join(names[:3])} and so on?",
            staying,
        )
    return staying


def _reachable(tried: _Tried, replacement: int, bound: Bound) -> Fraction:
    """How often the judge sees the replacement in the base's own samples of it: no more can be asked of others."""
    shown = tried.recognised([replacement], tried.effort.tried)
    if shown.value > bound.low:
        return shown
    raise UserError(
        "target-unreachable",
        "The target cannot be reached from this checkpoint",
        f"The judge takes {_said(shown)} samples of {_named(tried, replacement)} itself for what they are; where they "
        f"stand in for others it will not reach {bound.low:.1%}. Ask for less, or for another replacement.",
        pointer="/criteria/replaced_at_least",
        measured=shown.value,
        samples=shown.n,
        upper=shown.high,
        **{"class": tried.judge.classes[tried.shows[replacement]]},
    )


def _named(tried: _Tried, label: int) -> str:
    name = tried.base.conditions.names[label]
    return f"“{name}”" if isinstance(tried.base.conditions, Concepts) else f"class {name}"


def _said(found: Fraction) -> str:
    return f"{found.value:.1%} (interval {found.low:.1%} to {found.high:.1%}) of {found.n:,}"


def _unseen(detail: str, found: Fraction) -> UserError:
    title = "There is too little to judge from"
    return UserError(
        "insufficient-evidence", title, f"On the base, {detail}.", pointer="/judge", given=found.n, needed=None,
        measured=found.value,
    )  # fmt: skip
