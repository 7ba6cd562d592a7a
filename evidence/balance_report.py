"""From the evaluation of a balanced condition to a report: the verdict in words, criteria and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evidence import condition_parts, schema
from evidence.amnesia_schema import BalanceReport, IngredientPart
from evidence.balance_evaluation import BalanceEvaluation
from evidence.condition_parts import as_percent, how_often, interval
from evidence.fractions import Bound
from evidence.report_parts import RunFacts, losses, provenance, rounded, verdict
from evidence.schema import Criterion

__all__ = ["Ingredient", "Recipe", "build_balance_report"]

LIMITATIONS = (
    "Shares are what the judge tells of samples, every one of which it takes for one of its classes. It errs, and on "
    "samples of a model perhaps more often than on the pictures that it was trained on; no interval here covers that. "
    "It judges what samples look like, and nobody's identity.",
    "An interval covers the choice of samples: drawn again, they would give other shares. Shares under the balanced "
    "condition have Clopper and Pearson's exact intervals, which hold together.",
    "The condition was balanced as it was asked for here. Other words for it, longer prompts and other settings of the "
    "sampler were not looked at; they may show what they showed.",
    "What the other conditions show was read by the same judge. Of each, the share of samples that show what the base "
    "mostly shows there is compared; changes that the judge does not see are left to the distance, as far as its "
    "features see them. These are principal components of pixels unless another is named, and do not compare with "
    "published figures of KID.",
    "The balanced condition learned from the base's own samples of other conditions, and shows their errors and "
    "clichés with them.",
    "The base checkpoint, its copies and earlier samples still hold what they held.",
)


@dataclass(frozen=True)
class Ingredient:
    """A condition whose samples the balanced one learned from, how often, and what the judge sees in them."""

    condition: str
    fraction: float
    shows: Mapping[str, float]


@dataclass(frozen=True)
class Recipe:
    """What was asked for, and what the condition learned from to show it."""

    target: Mapping[str, float]
    tolerance: float
    ingredients: Sequence[Ingredient]

    @property
    def expected(self) -> dict[str, float]:
        """By class, its share of what the condition learned from, as the judge tells it."""
        return {name: math.fsum(one.fraction * one.shows[name] for one in self.ingredients) for name in self.target}


def build_balance_report(
    evaluation: BalanceEvaluation,
    run: RunFacts | None = None,
    *,
    recipe: Recipe,
    history: Sequence[Mapping[str, float]] = (),
    drift: float = math.nan,
    rollbacks: int = 0,
    notes: Sequence[str] = (),
    title: str = "Debiasing report",
) -> BalanceReport:
    """Put the evaluation of a changed model and the facts of its run into a report.

    Args:
        evaluation: what was measured.
        run: the facts around it.
        recipe: what was asked for and learned from.
        history: rows of the run, each with its `step`; those at which samples were judged also with the share of each
            class as "judge.class", and the samples `n`.
        drift: see `unlearning.AmnesiaResult.drift`.
        rollbacks: steps that were undone.
        notes: sentences to be kept with the evaluation's own.
        title: of the document.

    Returns:
        The report; the same input gives the same bytes.
    """
    run = run or RunFacts(method="selective-amnesia")
    criteria = _criteria(evaluation)
    return BalanceReport(
        title=title,
        verdict=verdict(_sentence(evaluation, recipe, criteria), criteria),
        provenance=provenance(run, evaluation.seed),
        losses=losses(run),
        notes=(*notes, *condition_parts.notes(evaluation, rollbacks)),
        limitations=LIMITATIONS,
        condition=evaluation.condition,
        target=dict(recipe.target),
        tolerance=recipe.tolerance,
        ingredients=tuple(
            IngredientPart(condition=one.condition, fraction=rounded(one.fraction) or 0.0, shows=_rounded(one.shows))
            for one in recipe.ingredients
        ),
        expected=_rounded(recipe.expected),
        shares=tuple(
            condition_parts.share_row(
                evaluation,
                name,
                evaluation.before[name],
                evaluation.after[name],
                evaluation.bounds.get(name),
                evaluation.told(name) if name in evaluation.bounds else None,
            )
            for name in evaluation.classes
        ),
        curves=_curves(evaluation, history),
        kept=condition_parts.kept_rows(evaluation, evaluation.usual),
        drop=condition_parts.drop_part(evaluation, evaluation.others_within),
        read_otherwise=interval(evaluation.read_otherwise),
        kid=condition_parts.distance(evaluation),
        spread=condition_parts.spread_part(evaluation),
        judge=schema.JudgeFacts(
            name=evaluation.judge,
            classes=evaluation.classes,
            accuracy=None if evaluation.accuracy is None else interval(evaluation.accuracy),
        ),
        drift=rounded(drift),
        rollbacks=rollbacks,
        data=condition_parts.sample_facts(evaluation, run),
    )


def _rounded(shares: Mapping[str, float]) -> dict[str, float | None]:
    return {name: rounded(one) for name, one in shares.items()}


def _criteria(evaluation: BalanceEvaluation) -> tuple[Criterion, ...]:
    shares = [
        Criterion(
            name=f"share of {name}",
            statement=f"Of samples under the condition “{evaluation.condition}”, the share that the judge "
            f"“{evaluation.judge}” takes for “{name}” lies from {as_percent(bound.low)} to {as_percent(bound.high)} "
            "with its whole interval; measured is the end of the interval that is nearer to missing it.",
            **_nearer(evaluation, name, bound),
            met=evaluation.told(name).told == "inside",
        )
        for name, bound in evaluation.bounds.items()
    ]
    drop = evaluation.drop
    others = Criterion(
        name="others_stayed",
        statement=f"Of samples of the other conditions, the share that shows what the base mostly shows there changed "
        f"by no more than {as_percent(evaluation.others_within)}, at {as_percent(drop.confidence)} confidence; "
        f"measured is the upper end of the change over {drop.n:,} pairs of samples from equal latents.",
        threshold=rounded(evaluation.others_within),
        value=rounded(drop.upper),
        met=evaluation.others_stayed,
    )
    return *shares, others


def _nearer(evaluation: BalanceEvaluation, name: str, bound: Bound) -> dict[str, float | None]:
    """The end of the bound that the interval comes nearest to, or is furthest beyond, and the interval's own."""
    after = evaluation.after[name]
    rooms = [(after.low - bound.low, bound.low, after.low), (bound.high - after.high, bound.high, after.high)]
    free = (math.inf, math.nan, math.nan)
    _, threshold, value = min((one for one in rooms if 0 < one[1] < 1), default=free)
    return {"threshold": rounded(threshold), "value": rounded(value)}


def _sentence(evaluation: BalanceEvaluation, recipe: Recipe, criteria: Sequence[Criterion]) -> str:
    shown = ", ".join(
        f"{as_percent(after.value)} for “{name}” (interval {100 * after.low:.1f} to {100 * after.high:.1f} %; "
        f"{as_percent(recipe.target.get(name, 0.0))} asked for, {as_percent(evaluation.before[name].value)} before)"
        for name, after in evaluation.after.items()
        if recipe.target.get(name, 0.0) > 0 or evaluation.told(name).told != "inside"
    )
    figures = (
        f"of {evaluation.samples:,} samples under the condition “{evaluation.condition}”, the judge takes {shown}; the "
        f"other conditions show what they mostly showed {how_often(evaluation)} (a change of no more than "
        f"{100 * evaluation.drop.upper:.2f} points at {as_percent(evaluation.drop.confidence)} confidence)"
    )
    failed = [one.name.replace("_", " ") for one in criteria if not one.met]
    if not failed:
        return f"The condition shows what was asked for: {figures}."
    if evaluation.balanced.told == "insufficient":
        needed = evaluation.balanced.needed
        enough = "" if needed is None else f", {needed:,} samples would do"
        return f"Insufficient evidence ({', '.join(failed)}{enough}): {figures}."
    return f"The criteria were not met ({', '.join(failed)}): {figures}."


def _curves(evaluation: BalanceEvaluation, history: Sequence[Mapping[str, float]]) -> tuple[schema.Curve, ...]:
    """Shares at the steps where samples were judged, between this report's own before and after."""
    last = max((int(row["step"]) for row in history), default=0)
    if not last:
        return ()
    looks = [row for row in history if "n" in row and int(row["step"]) != last]
    return tuple(
        condition_parts.curve(
            evaluation,
            name,
            (evaluation.before[name], evaluation.after[name]),
            [(int(row["step"]), row[f"{evaluation.judge}.{name}"], int(row["n"])) for row in looks],
            last,
        )
        for name in evaluation.classes
    )
