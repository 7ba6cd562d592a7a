"""Job ``debias``, method ``selective-amnesia``: a condition comes to show classes of a judge as often as asked.

It learns from a mixture of what the base shows under other conditions, one for each class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evidence.amnesia_evaluation import samples_of
from evidence.balance_evaluation import OTHERS_WITHIN, evaluate_balance
from evidence.balance_report import Ingredient, Recipe, build_balance_report
from evidence.fractions import CONFIDENCE, Bound, count
from evidence.likelihood import derive_seed
from evidence.schema import Document
from models.conditional import ConditionalModel
from unlearning import Check, Criterion, Mixture, Pool, mixing_fractions
from worker.runner.amnesia_inputs import label_of, refused, surrogates_of
from worker.runner.amnesia_judge import Effort, effort_of
from worker.runner.contract import Reporter, Stop
from worker.runner.judges import Wanted, wanted_of
from worker.runner.problems import UserError, escaped
from worker.runner.remapping import Changed, Opened, remap
from worker.runner.samples import samples_around

__all__ = ["run"]

MOST_MISSED = 0.8
"""Share of the tolerance by which a mixture itself may miss the target; training and chance need the rest."""
DEARLY_MISSED = 0.5
"""The same where samples are many: from here on, what it misses takes more than four times as many as a mixture that
misses nothing, since their number goes with 1 / (1 - missed / tolerance)^2."""
MORE = 4
"""Times as many samples after each portion of a look as after the one before."""
STEP = 0.005
"""Half a point: between the tolerances that a refusal names."""
WIDEST = 0.5
"""Of the tolerances that can be asked for."""


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Let a condition show classes as often as asked, see `remapping.remap`."""
    remap(job, folder, reporter, stop, named="condition", planned=_planned)


@dataclass(frozen=True)
class _Balancing:
    """What the condition is to show, and who says whether it does."""

    opened: Opened
    wanted: Wanted
    surrogate: Mixture
    recipe: Recipe
    aims: Mapping[str, Bound]
    """Where a check wants the shares: nearer to the target than asked, so that fresh samples show it again."""
    samples: int
    """Under the condition."""
    others: int
    """Over all other conditions."""
    others_within: float
    confidence: float
    effort: Effort
    kind: str = "balance"
    losses: tuple[str, ...] = ("surrogate", "replay", "penalty")

    @property
    def digests(self) -> Mapping[str, str]:
        """Of the classifier that was sent."""
        return {f"classifier/{self.wanted.judge.name}": self.wanted.digest} if self.wanted.digest else {}

    @property
    def criterion(self) -> Criterion:
        """Fresh samples show every class nearly as often as asked.

        They are drawn in portions, and the rest is spared where those that are there show that it does not.
        """

        def look(model: ConditionalModel, seed: int) -> Check:
            labels = torch.empty(0, dtype=torch.int64)
            for n in _portions(self.effort.first_look, self.samples):
                fresh = self._judged(model, n - len(labels), derive_seed(seed, "from", len(labels)))
                labels = torch.cat([labels, fresh])
                check = self._check(labels, certain=n == self.samples)
                if not check.met:
                    break
            return check

        return look

    def _judged(self, model: ConditionalModel, n: int, seed: int) -> Tensor:
        """The judge's classes of n samples under the condition."""
        sampler = self.opened.base.conditions.sampler(model)
        asked = torch.full((n,), self.opened.label, dtype=torch.int64)
        return self.wanted.judge(samples_of(sampler, asked, seed=seed, on_batch=self.opened.reporter.alive)).cpu()

    def _check(self, labels: Tensor, *, certain: bool) -> Check:
        """Whether samples show what is aimed at; if not `certain`, whether they leave that possible."""
        judge = self.wanted.judge
        shares = count(labels, judge.classes, confidence=self.confidence)
        met = all(
            bound.low <= (shares[name].value if certain else shares[name].high)
            and (shares[name].value if certain else shares[name].low) <= bound.high
            for name, bound in self.aims.items()
        )
        return Check(
            met, {"n": float(len(labels)), **{f"{judge.name}.{name}": one.value for name, one in shares.items()}}
        )

    def judged(self, changed: Changed) -> tuple[Document, Mapping[str, Any]]:
        """See `remapping.Remapping`."""
        base = self.opened.base
        evaluation = evaluate_balance(
            base.sampler,
            changed.sampler,
            self.wanted.judge,
            label=self.opened.label,
            names=base.conditions.names,
            bounds=self.wanted.bounds,
            image_shape=base.image_shape,
            n_bits=base.n_bits,
            samples=self.samples,
            others=self.others,
            others_within=self.others_within,
            confidence=self.confidence,
            seed=derive_seed(self.opened.seed, "judge"),
            on_progress=changed.on_progress,
        )
        report = build_balance_report(
            evaluation,
            changed.facts(),
            recipe=self.recipe,
            history=changed.result.history,
            drift=changed.result.drift,
            rollbacks=changed.result.rollbacks,
        )
        return report, {**self.wanted.summary(), **evaluation.summary()}


def _planned(opened: Opened) -> _Balancing:
    job, base = opened.job, opened.base
    confidence, tolerance = float(job.get("confidence") or CONFIDENCE), float(job["tolerance"])
    within = _others_within(job)
    labels = _replacements(opened)
    (wanted,) = wanted_of(job, opened.folder, opened.reader, base, on_batch=opened.reporter.alive)
    asked = job["target_distribution"]
    target = {name: float(asked.get(name, 0.0)) for name in wanted.judge.classes}
    _check_replacements(labels, target)
    effort = effort_of(base)
    others = effort.others_for(within, confidence)
    samples_around(target.values(), tolerance, confidence, slack=effort.slack)  # before anything is drawn
    recipe = _mixed(opened, wanted, labels, target, tolerance)
    looks = _Looks(recipe, effort, confidence)
    _check_reachable(recipe, wanted, looks, surrogates_of(base))
    samples = samples_around(target.values(), tolerance, confidence, slack=looks.slack(tolerance))
    _check_affordable(recipe, wanted, looks, samples)
    return _Balancing(
        opened,
        wanted,
        _mixture(opened, labels, recipe),
        recipe,
        aims={name: Bound.around(share, tolerance * looks.slack(tolerance)) for name, share in target.items()},
        samples=samples,
        others=others,
        others_within=within,
        confidence=confidence,
        effort=effort,
    )


def _portions(first: int, last: int) -> list[int]:
    """How many samples a look has seen after each of its portions."""
    seen = [min(first, last)]
    while seen[-1] < last:
        seen.append(min(MORE * seen[-1], last))
    return seen


def _others_within(job: Mapping[str, Any]) -> float:
    given = job["criteria"].get("others_within")
    within = OTHERS_WITHIN if given is None else float(given)
    if not 0 < within < 1:
        raise refused(
            f"others_within lies between 0 and 1, not at {within:g}: no samples could show it otherwise.",
            "/criteria/others_within",
        )
    return within


def _replacements(opened: Opened) -> dict[str, int]:
    """The label whose samples show a class of the judge, by the class."""
    labels = {}
    for name, condition in opened.job["replacements"].items():
        pointer = f"/replacements/{escaped(name)}"
        labels[name] = label_of(condition, opened.base, pointer)
        if labels[name] == opened.label:
            raise refused(
                f"“{opened.base.conditions.names[opened.label]}” is what is to be balanced; name another condition, "
                f"whose samples show “{name}”.",
                f"{pointer}/{'concept' if condition.get('concept') else 'class_label'}",
            )
    return labels


def _check_replacements(labels: Mapping[str, int], target: Mapping[str, float]) -> None:
    """Every class that is asked for has a replacement, and no other thing has one."""
    known = ", ".join(target)
    for name in labels:
        if name not in target:
            raise refused(f"The judge does not tell “{name}”; it tells {known}.", f"/replacements/{escaped(name)}")
    missing = [name for name, share in target.items() if share > 0 and name not in labels]
    if missing:
        raise refused(
            f"Nothing says which condition shows “{missing[0]}”, and {target[missing[0]]:.4g} of samples are to show "
            "it; name one, or ask for none of it.",
            "/replacements",
        )


@dataclass(frozen=True)
class _Looks:
    """How many samples show that a mixture keeps a tolerance, of which it uses up a part itself."""

    recipe: Recipe
    effort: Effort
    confidence: float

    @property
    def missed(self) -> float:
        """By how much the share of the class that is furthest off misses its target."""
        return max(abs(self.recipe.expected[name] - share) for name, share in self.recipe.target.items())

    def slack(self, tolerance: float) -> float:
        """Share of the tolerance that the mixture uses up, and of what it leaves, the training."""
        return self.effort.slack + (1 - self.effort.slack) * self.missed / tolerance

    def dear(self, tolerance: float, samples: int) -> bool:
        """Whether a look takes many samples, and mostly for what the mixture misses."""
        return samples > self.effort.plenty and self.missed > DEARLY_MISSED * tolerance

    def enough(self) -> tuple[float, int] | None:
        """The least tolerance, in steps, that would not be refused, with the samples a look; None where none is."""
        tolerance = self.recipe.tolerance
        for number in range(math.ceil(max(tolerance, self.missed / MOST_MISSED) / STEP), round(WIDEST / STEP) + 1):
            wider = number * STEP
            with suppress(UserError):
                samples = samples_around(self.recipe.target.values(), wider, self.confidence, slack=self.slack(wider))
                if self.missed <= MOST_MISSED * wider and not self.dear(wider, samples):
                    return wider, samples
        return None


def _mixed(
    opened: Opened, wanted: Wanted, labels: Mapping[str, int], target: Mapping[str, float], tolerance: float
) -> Recipe:
    """How often to take samples of each replacement, so that together they show the target, or come nearest to it."""
    used = list(dict.fromkeys(labels.values()))
    n, classes = surrogates_of(opened.base), tuple(target)
    shown = torch.stack([_shares(wanted, _pictures(opened, label, n), len(classes)) for label in used])
    fractions = mixing_fractions(shown, list(target.values()))
    return Recipe(
        target,
        tolerance,
        [
            Ingredient(opened.base.conditions.names[label], fraction, dict(zip(classes, shares.tolist(), strict=True)))
            for label, fraction, shares in zip(used, fractions, shown, strict=True)
        ],
    )


def _mixture(opened: Opened, labels: Mapping[str, int], recipe: Recipe) -> Mixture:
    """What the condition learns from."""
    used, n = dict.fromkeys(labels.values()), surrogates_of(opened.base)
    pools = tuple(Pool(opened.own.examples([label], n, _purpose(label)).x) for label in used)
    return Mixture(pools, tuple(one.fraction for one in recipe.ingredients))


def _pictures(opened: Opened, label: int, n: int) -> Tensor:
    """The very pictures that the condition is to learn from."""
    sent = opened.sent.get(label)
    return opened.own.pictures([label], n, _purpose(label))[0] if sent is None else sent


def _purpose(label: int) -> str:
    """Examples and pictures of one purpose are the same samples."""
    return f"surrogate {label}"


def _shares(wanted: Wanted, pictures: Tensor, classes: int) -> Tensor:
    found = wanted.judge(pictures).cpu()
    return found.bincount(minlength=classes).double() / len(found)


def _check_reachable(recipe: Recipe, wanted: Wanted, looks: _Looks, n: int) -> None:
    if looks.missed <= MOST_MISSED * recipe.tolerance:
        return
    name = _furthest(recipe)
    raise UserError(
        "target-unreachable",
        "The target cannot be reached from this checkpoint",
        f"{_comes_to(recipe, wanted, name)}; to keep {recipe.tolerance:.1%} it has to come within "
        f"{MOST_MISSED * recipe.tolerance:.1%}. {_what_would_do(name, looks)}",
        pointer=f"/replacements/{escaped(name)}",
        measured=recipe.expected[name],
        samples=n,
        **{"class": name},
    )


def _check_affordable(recipe: Recipe, wanted: Wanted, looks: _Looks, samples: int) -> None:
    """What is within reach may still leave so little of the tolerance that to show it takes a multitude of samples."""
    if not looks.dear(recipe.tolerance, samples):
        return
    name = _furthest(recipe)
    raise UserError(
        "insufficient-evidence",
        "There is too little to judge from",
        f"{_comes_to(recipe, wanted, name)}. That is within {recipe.tolerance:.1%}, yet leaves so little of it that "
        f"every look would take {samples:,} samples. {_what_would_do(name, looks)}",
        pointer="/tolerance",
        given=looks.effort.plenty,
        needed=samples,
    )


def _furthest(recipe: Recipe) -> str:
    """The class that is to be shown and falls shortest of it."""
    return max(recipe.target, key=lambda one: recipe.target[one] - recipe.expected[one])


def _comes_to(recipe: Recipe, wanted: Wanted, name: str) -> str:
    return (
        f"The judge “{wanted.judge.name}” sees in samples of the base: {_seen(recipe.ingredients)}. However they are "
        f"mixed, “{name}” comes to {recipe.expected[name]:.1%} where {recipe.target[name]:.1%} is asked for"
    )


def _what_would_do(name: str, looks: _Looks) -> str:
    enough = looks.enough()
    wider = "" if enough is None else f"; a tolerance of {enough[0]:g} would do, at {enough[1]:,} samples a look"
    return f"Name a condition that shows “{name}” more surely, or ask for less of it{wider}."


def _seen(ingredients: Sequence[Ingredient]) -> str:
    """Such as: under “a queen” female in 97.0 %, male in 3.0 %."""
    return "; ".join(
        f"under “{one.condition}” " + ", ".join(f"{name} in {share:.1%}" for name, share in one.shows.items())
        for one in ingredients
    )
