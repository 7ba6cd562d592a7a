"""From the evaluation of a model that forgot a condition to a report: the verdict in words, criteria and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evidence import condition_parts, schema
from evidence.amnesia_records import AmnesiaEvaluation, Shown
from evidence.amnesia_schema import AmnesiaJudge, AmnesiaReport, ShownPart
from evidence.condition_parts import as_percent, how_often, interval
from evidence.fractions import Bound, Judgement
from evidence.report_parts import RunFacts, losses, provenance, rounded, verdict
from evidence.schema import Criterion

__all__ = ["build_amnesia_report"]

LIMITATIONS = (
    "Shares are what the judge tells of samples. It errs, and on samples of a model perhaps more often than on the "
    "pictures that it was trained on; no interval here covers that. A class counts as seen where the judge gives it a "
    "probability of one half or more; a judge that tells labels alone names one even where a sample shows none. One "
    "that never saw faint pictures, or pictures of nothing, may be sure of another class where people still see the "
    "forgotten one: look at samples too.",
    "An interval covers the choice of samples: drawn again, they would give another share. Shares have Clopper and "
    "Pearson's exact interval, means a normal one, each holding by itself.",
    "A share of 0 among n samples says that the class is rarely shown, at most at the interval's upper end. It does "
    "not say that the weights hold nothing of it: resistance to re-training was not tested.",
    "The condition was forgotten, and not the pictures: what another condition shows of them was measured only as far "
    "as the judge tells it.",
    "The drop counts samples that the judge no longer takes for what they are. Samples that it still does may have "
    "changed all the same, which the distance shows as far as its features see it; they are principal components of "
    "pixels unless another is named, and do not compare with published figures of KID.",
    "The base checkpoint, its copies and earlier samples still hold what they held.",
)


def build_amnesia_report(
    evaluation: AmnesiaEvaluation,
    run: RunFacts | None = None,
    *,
    replacement: str,
    history: Sequence[Mapping[str, float]] = (),
    drift: float = math.nan,
    rollbacks: int = 0,
    notes: Sequence[str] = (),
    title: str = "Forgetting report",
    extra_criteria: Sequence[Criterion] = (),
) -> AmnesiaReport:
    """Put the evaluation of a changed model and the facts of its run into a report.

    Args:
        evaluation: what was measured.
        run: the facts around it.
        replacement: what the condition is to show instead, in words, such as "uniform noise".
        history: rows of the run, each with its `step`; those at which samples were judged also with `forgotten`, the
            share judged as the forgotten class, `replaced` where a class replaces it, and the samples `n`.
        drift: see `unlearning.AmnesiaResult.drift`.
        rollbacks: steps that were undone.
        notes: sentences to be kept with the evaluation's own.
        title: of the document.
        extra_criteria: further conditions of the job, judged by the caller; one that is not met fails the job.

    Returns:
        The report; the same input gives the same bytes.
    """
    run = run or RunFacts(method="selective-amnesia")
    criteria = (*_criteria(evaluation), *extra_criteria)
    return AmnesiaReport(
        title=title,
        verdict=verdict(_sentence(evaluation, criteria), criteria),
        provenance=provenance(run, evaluation.seed),
        losses=losses(run),
        notes=(*notes, *_notes(evaluation, rollbacks)),
        limitations=LIMITATIONS,
        forgotten=evaluation.classes[evaluation.label],
        replacement=replacement,
        shares=_shares(evaluation),
        before=_shown(evaluation.before),
        after=_shown(evaluation.after),
        curves=_curves(evaluation, history),
        kept=condition_parts.kept_rows(evaluation),
        drop=condition_parts.drop_part(evaluation, evaluation.goal.others_within),
        kid=condition_parts.distance(evaluation),
        spread=condition_parts.spread_part(evaluation),
        judge=AmnesiaJudge(
            name=evaluation.judge,
            classes=evaluation.classes,
            accuracy=None if evaluation.accuracy is None else interval(evaluation.accuracy),
            independent=evaluation.independent,
            entropy_most=rounded(math.log(len(evaluation.classes))) or 0.0,
        ),
        drift=rounded(drift),
        rollbacks=rollbacks,
        data=condition_parts.sample_facts(evaluation, run),
    )


def _criteria(evaluation: AmnesiaEvaluation) -> tuple[Criterion, ...]:
    goal, after = evaluation.goal, evaluation.after.shares
    name, drop = evaluation.classes[evaluation.label], evaluation.drop
    found = [
        Criterion(
            name="forgotten",
            statement=f"Of samples under the forgotten condition, the share that the judge “{evaluation.judge}” "
            f"takes for “{name}” lies at or below {as_percent(goal.forgotten_at_most)} with its whole interval; "
            "measured is its upper end.",
            threshold=rounded(goal.forgotten_at_most),
            value=rounded(after[evaluation.label].high),
            met=evaluation.forgotten.told == "inside",
        )
    ]
    if evaluation.replaced is not None and evaluation.replacement is not None and goal.replaced_at_least is not None:
        found.append(
            Criterion(
                name="replaced",
                statement=f"The share that it takes for “{evaluation.classes[evaluation.replacement]}” lies at or "
                f"above {as_percent(goal.replaced_at_least)} with its whole interval; measured is its lower end.",
                threshold=rounded(goal.replaced_at_least),
                value=rounded(after[evaluation.replacement].low),
                met=evaluation.replaced.told == "inside",
            )
        )
    found.append(
        Criterion(
            name="others_stayed",
            statement=f"Of samples of the other classes, the share taken for what they are fell by no more than "
            f"{as_percent(goal.others_within)}, at {as_percent(drop.confidence)} confidence; measured is the upper end "
            f"of the drop over {drop.n:,} pairs of samples from equal latents.",
            threshold=rounded(goal.others_within),
            value=rounded(drop.upper),
            met=evaluation.others_stayed,
        )
    )
    return tuple(found)


def _sentence(evaluation: AmnesiaEvaluation, criteria: Sequence[Criterion]) -> str:
    name, before, after = evaluation.classes[evaluation.label], evaluation.before, evaluation.after
    now = after.shares[evaluation.label]
    figures = (
        f"of samples under the condition “{name}”, {as_percent(now.value)} are still judged as “{name}” (interval "
        f"{100 * now.low:.1f} to {100 * now.high:.1f} %, n = {now.n:,}), where "
        f"{as_percent(before.shares[evaluation.label].value)} were"
    )
    if evaluation.replacement is not None:
        shown = after.shares[evaluation.replacement]
        figures += f", and {as_percent(shown.value)} as “{evaluation.classes[evaluation.replacement]}”"
    figures += (
        f"; the other classes are recognised {how_often(evaluation)} (no more than "
        f"{100 * evaluation.drop.upper:.2f} points less at {as_percent(evaluation.drop.confidence)} confidence)"
    )
    failed = [one.name.replace("_", " ") for one in criteria if not one.met]
    if not failed:
        return f"The class was forgotten: {figures}."
    return f"The criteria were not met ({', '.join(failed)}): {figures}."


def _notes(evaluation: AmnesiaEvaluation, rollbacks: int) -> list[str]:
    notes = []
    if not evaluation.independent:
        notes.append(
            f"The judge “{evaluation.judge}” was trained on samples of the base, each taken for the class that it was "
            "drawn under. It is not independent: what the base confuses, it learned confused, and it says nothing of "
            "how well the base draws its classes. Send a classifier for a judgement of its own."
        )
    if evaluation.after.probability is None:
        notes.append(
            f"The judge “{evaluation.judge}” tells classes and no probabilities: P(y = forgotten) and the entropy of "
            "its answers were not measured; read the shares."
        )
    seen = "labelled images" if evaluation.independent else "samples"
    return notes + condition_parts.notes(evaluation, rollbacks, seen=seen)


def _shares(evaluation: AmnesiaEvaluation) -> tuple[schema.FractionRow, ...]:
    asked: dict[int, tuple[Bound, Judgement]] = {}
    if evaluation.replacement is not None and evaluation.replaced is not None and evaluation.goal.replaced is not None:
        asked[evaluation.replacement] = evaluation.goal.replaced, evaluation.replaced
    asked[evaluation.label] = evaluation.goal.forgotten, evaluation.forgotten
    return tuple(
        condition_parts.share_row(
            evaluation,
            name,
            evaluation.before.shares[number],
            evaluation.after.shares[number],
            *asked.get(number, (None, None)),
        )
        for number, name in enumerate(evaluation.classes)
    )


def _shown(one: Shown) -> ShownPart:
    return ShownPart(
        probability=None if one.probability is None else interval(one.probability),
        entropy=None if one.entropy is None else interval(one.entropy),
        unrecognisable=None if one.blank is None else interval(one.blank),
    )


def _curves(evaluation: AmnesiaEvaluation, history: Sequence[Mapping[str, float]]) -> tuple[schema.Curve, ...]:
    """Shares at the steps where samples were judged, between this report's own before and after."""
    asked = {"forgotten": evaluation.label, "replaced": evaluation.replacement}
    last = max((int(row["step"]) for row in history), default=0)
    curves = []
    for column, number in asked.items():
        rows = [row for row in history if column in row and int(row["step"]) != last]
        if number is None or not last:
            continue
        ends = evaluation.before.shares[number], evaluation.after.shares[number]
        measured = [(int(row["step"]), row[column], int(row["n"])) for row in rows]
        curves.append(condition_parts.curve(evaluation, evaluation.classes[number], ends, measured, last))
    return tuple(curves)
