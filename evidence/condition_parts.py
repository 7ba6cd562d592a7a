"""What both reports on a changed condition are put together from: rows, curves and what is said of the judge."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from evidence import schema
from evidence.amnesia_records import ConditionEvaluation, Mean
from evidence.amnesia_schema import DropPart, KeptRow, SpreadPart
from evidence.fractions import Bound, Fraction, Judgement, fraction_of
from evidence.report_parts import RunFacts, rounded

__all__ = [
    "as_percent", "curve", "distance", "drop_part", "how_often", "interval", "kept_rows", "notes", "sample_facts",
    "share_row", "spread_part",
]  # fmt: skip

STAYED = "what stays"


def interval(one: Fraction | Mean) -> schema.Interval:
    """An estimate as the report holds it."""
    return schema.Interval(
        value=rounded(one.value), low=rounded(one.low), high=rounded(one.high), confidence=one.confidence
    )


def share_row(
    evaluation: ConditionEvaluation,
    name: str,
    before: Fraction,
    after: Fraction,
    bound: Bound | None,
    told: Judgement | None,
) -> schema.FractionRow:
    """How often samples under the condition show a class."""
    return schema.FractionRow(
        judge=evaluation.judge,
        label=name,
        before=interval(before),
        after=interval(after),
        n=evaluation.samples,
        low=rounded(bound.low) if bound is not None and bound.low > 0 else None,
        high=rounded(bound.high) if bound is not None and bound.high < 1 else None,
        told=None if told is None else told.told,
        samples_needed=None if told is None else told.needed,
    )


def curve(
    evaluation: ConditionEvaluation,
    name: str,
    ends: tuple[Fraction, Fraction],
    measured: Iterable[tuple[int, float, int]],
    last: int,
) -> schema.Curve:
    """The share of a class against the step.

    Args:
        evaluation: of the changed model.
        name: of the class.
        ends: the report's own shares, before the first step and after the last.
        measured: step, share and samples, where the run looked.
        last: step of the run.
    """
    points = {0: ends[0]}
    for step, value, n in measured:
        points[step] = fraction_of(round(value * n), n, confidence=ends[1].level)
    points[last] = ends[1]
    return schema.Curve(
        judge=evaluation.judge,
        label=name,
        points=tuple(
            schema.CurvePoint(step=step, value=rounded(one.value), low=rounded(one.low), high=rounded(one.high))
            for step, one in sorted(points.items())
        ),
    )


def kept_rows(evaluation: ConditionEvaluation, usual: Sequence[str] | None = None) -> tuple[KeptRow, ...]:
    """What every other condition shows; `usual`: the class that stands for each."""
    return tuple(
        KeptRow(
            label=one.name,
            shows=None if usual is None else usual[number],
            before=interval(one.before),
            after=interval(one.after),
            n=one.after.n,
        )
        for number, one in enumerate(evaluation.kept)
    )


def drop_part(evaluation: ConditionEvaluation, allowed: float) -> DropPart:
    """By how much fewer samples of the others show what they should."""
    drop = evaluation.drop
    return DropPart(
        value=rounded(drop.value),
        upper=rounded(drop.upper),
        allowed=allowed,
        lost=drop.lost,
        gained=drop.gained,
        n=drop.n,
        confidence=drop.confidence,
    )


def distance(evaluation: ConditionEvaluation) -> schema.KidRow:
    """Between the others' samples, before and after."""
    one = evaluation.kid
    return schema.KidRow(
        judge=evaluation.judge,
        label=STAYED,
        value=rounded(one.value),
        standard_error=rounded(one.standard_error),
        floor=rounded(one.floor),
        within_noise=one.within_noise,
        n_before=one.n,
        n_after=one.m,
        extractor=one.extractor,
    )


def spread_part(evaluation: ConditionEvaluation) -> SpreadPart:
    """What the changed model covers of the others' samples."""
    one = evaluation.spread
    return SpreadPart(
        precision=interval(one.precision),
        recall=interval(one.recall),
        fid=None if one.fid is None else rounded(one.fid),
        n=one.precision.n,
        extractor=one.extractor,
    )


def sample_facts(evaluation: ConditionEvaluation, run: RunFacts) -> schema.SampleFacts:
    """What was drawn, and of what."""
    return schema.SampleFacts(
        image_shape=evaluation.image_shape,
        n_bits=evaluation.n_bits,
        samples=evaluation.samples,
        confidence=evaluation.confidence,
        image_fitting=run.image_fitting,
    )


def notes(evaluation: ConditionEvaluation, rollbacks: int, *, seen: str = "labelled images") -> list[str]:
    """What this judge, these samples and this run leave open; `seen`: what a trained judge was measured on."""
    found = []
    if evaluation.accuracy is not None:
        found.append(
            f"The judge “{evaluation.judge}” was trained for this job and errs on {1 - evaluation.accuracy.value:.1%} "
            f"of unseen {seen}: its shares may be off by as much, before and after alike."
        )
    if evaluation.kid.within_noise is False:
        found.append(
            "Samples of what stays differ from the base's by more than chance makes two sets of the same pictures "
            "differ."
        )
    if rollbacks:
        found.append(f"{rollbacks} times a step was not finite; the run went back and on at half the learning rate.")
    return found


def how_often(evaluation: ConditionEvaluation) -> str:
    """The drop in words, such as: 0.30 points less often."""
    points = -100 * evaluation.drop.value
    if abs(points) < 0.005:
        return "as often as before"
    return f"{abs(points):.2f} points {'more' if points > 0 else 'less'} often"


def as_percent(value: float) -> str:
    """Such as: 12.5 %."""
    return f"{100 * value:.4g} %"
