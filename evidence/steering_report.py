"""From the evaluation of a steered flow and the job's facts to a report: the verdict in words, criteria and limits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evidence import schema
from evidence.fractions import Fraction, fraction_of
from evidence.likelihood import FloatArray, bits_per_dim
from evidence.report_parts import (
    RunFacts,
    estimate,
    health,
    losses,
    provenance,
    rounded,
    samples_sound,
    thinned,
    verdict,
)
from evidence.schema import Criterion, SteeringReport
from evidence.steering_records import ClassChange, JudgeEvaluation, LikelihoodChange, SteeringEvaluation

__all__ = ["build_steering_report"]

KINDS = {
    "attribute": "The flow was steered so that its samples show an attribute less or more often.",
    "debias": "The flow was steered so that its samples spread over classes as asked.",
    "access removal": "The flow no longer draws the class when asked for samples. Its weights still hold the class: "
    "this is access removal, which whoever holds the checkpoint can undo, and no unlearning.",
    "unlearning": "The weights of the flow were changed so that it no longer draws the class.",
}

LIKELIHOOD_ROWS: dict[str, str] = {
    "remember": "images to remember",
    "held_out": "images that nothing has seen",
}

LIMITATIONS = (
    "Fractions are what the classifiers tell of samples. A classifier errs, and on samples of a flow perhaps more "
    "often than on the pictures that it was trained on; no interval here covers that.",
    "An interval covers the choice of samples: drawn again, they would give another fraction. It is Clopper and "
    "Pearson's exact one, and the intervals of one classifier hold together.",
    "A fraction of 0 among n samples says that the class is rare, at most at the interval's upper end. It does not say "
    "that the flow cannot draw it.",
    "What was not asked of a classifier was not measured: an attribute that goes with the steered one may have moved "
    "too.",
    "The distance of samples within a class sees what its features see, principal components of pixels unless another "
    "is named: light, pose and framing before finer things. It does not compare with published figures of KID.",
    "The base checkpoint, its copies and earlier samples still hold what they held. Where no re-training is shown "
    "above, resistance to it was not tested.",
)


def build_steering_report(
    evaluation: SteeringEvaluation,
    run: RunFacts | None = None,
    *,
    history: Sequence[Mapping[str, float]] = (),
    history_samples: int | None = None,
    title: str = "Steering report",
    extra_criteria: Sequence[Criterion] = (),
) -> SteeringReport:
    """Put the evaluation of a steered flow and the facts of its run into a report.

    Args:
        evaluation: what was measured.
        run: the facts around it.
        history: rows of the run, each with its `step`, in some the fraction of samples in each class, and the samples
            `n` behind them. A class is named "classifier.class", or "class" where there is one classifier; other
            columns are left alone.
        history_samples: samples behind the fractions of a row without `n`; None: these get no interval.
        title: of the document.
        extra_criteria: further conditions of the job, judged by the caller; one that is not met fails the job.

    Returns:
        The report; the same input gives the same bytes.
    """
    run = run or RunFacts(method="steering")
    criteria = (*_criteria(evaluation), *extra_criteria)
    return SteeringReport(
        title=title,
        verdict=verdict(_sentence(evaluation, criteria), criteria),
        kind=evaluation.kind,
        provenance=provenance(run, evaluation.seed),
        losses=losses(run),
        notes=(*((KINDS[evaluation.kind],) if evaluation.kind in KINDS else ()), *evaluation.notes),
        limitations=LIMITATIONS,
        fractions=tuple(_row(judge, one, evaluation) for judge in evaluation.judges for one in judge.changes),
        curves=_curves(evaluation, run, history, history_samples),
        kid=tuple(_kid(judge, one) for judge in evaluation.judges for one in judge.changes),
        judges=tuple(_judge(one) for one in evaluation.judges if not one.drawn),
        likelihoods=_likelihoods(evaluation),
        health_before=health(evaluation.health_base),
        health_after=health(evaluation.health_steered),
        relearn=None if evaluation.relearn is None else schema.Relearn(**vars(evaluation.relearn)),
        data=schema.SampleFacts(
            image_shape=evaluation.image_shape,
            n_bits=evaluation.n_bits,
            samples=evaluation.samples,
            confidence=evaluation.confidence,
            image_fitting=run.image_fitting,
        ),
        distributions=_distributions(evaluation),
    )


def _criteria(evaluation: SteeringEvaluation) -> tuple[Criterion, ...]:
    asked = [
        Criterion(
            name=f"{judge.name}/{one.name}",
            statement=f"The interval of the fraction of samples {_shown(judge, one)} lies {_wanted(one)}.",
            threshold=rounded(_nearer(one)),
            value=rounded(one.after.value),
            met=one.judgement.told == "inside",
        )
        for judge in evaluation.judges
        for one in judge.changes
        if one.judgement is not None
    ]
    return *asked, samples_sound(evaluation.health_base, evaluation.health_steered, "steered flow")


def _shown(judge: JudgeEvaluation, one: ClassChange) -> str:
    return f"that were drawn of class {one.name}" if judge.drawn else f"that {judge.name} takes for {one.name}"


def _wanted(one: ClassChange) -> str:
    if one.bound is None:
        return "anywhere"
    low, high = f"{100 * one.bound.low:.4g} %", f"{100 * one.bound.high:.4g} %"
    if one.bound.low <= 0:
        return f"at or below {high}"
    if one.bound.high >= 1:
        return f"at or above {low}"
    return f"between {low} and {high}"


def _nearer(one: ClassChange) -> float:
    """The bound that the fraction is nearer to missing."""
    if one.bound is None:
        return math.nan
    if one.bound.low <= 0 or one.bound.high >= 1:
        return one.bound.high if one.bound.low <= 0 else one.bound.low
    return min((one.bound.low, one.bound.high), key=lambda bound: abs(bound - one.after.value))


def _sentence(evaluation: SteeringEvaluation, criteria: Sequence[Criterion]) -> str:
    asked = [(judge, one) for judge in evaluation.judges for one in judge.changes if one.judgement is not None]
    if evaluation.told == "insufficient":
        open_ = [pair for pair in asked if pair[1].judgement and pair[1].judgement.told == "insufficient"]
        enough = "no number of samples is known that would decide it"
        if evaluation.needed is not None:
            enough = f"{evaluation.needed:,} samples would do where {evaluation.samples:,} were drawn"
        return (
            f"Insufficient evidence: {_fractions(open_)}, inside what was asked, but with an interval that reaches "
            f"beyond; {enough}."
        )
    if evaluation.told == "outside":
        missed = [pair for pair in asked if pair[1].judgement and pair[1].judgement.told == "outside"]
        return f"The criteria were not met: {_fractions(missed)} ({'; '.join(_asked(one) for _, one in missed)})."
    failed = [one.name.replace("_", " ") for one in criteria if not one.met]
    if failed:
        reasons = ", ".join(failed)
        return f"The criteria were not met: all fractions are as asked, but another condition failed ({reasons})."
    kept = f"with its whole interval, by {evaluation.samples:,} samples"
    if len(asked) == 1:
        return f"The fraction that was asked for is kept, {kept}: {_fractions(asked)} ({_asked(asked[0][1])})."
    return f"All {len(asked)} fractions that were asked for are kept, each {kept}: {_fractions(asked)}."


def _asked(one: ClassChange) -> str:
    return f"“{one.name}” {_wanted(one)} was asked for"


def _fractions(pairs: Sequence[tuple[JudgeEvaluation, ClassChange]]) -> str:
    """Such as: “smile” from 48.0 % to 9.1 % (interval 7.6 to 10.8 %)."""
    return ", ".join(
        f"“{one.name}” from {100 * one.before.value:.1f} % to {100 * one.after.value:.1f} % of samples "
        f"(interval {100 * one.after.low:.1f} to {100 * one.after.high:.1f} %)"
        for _, one in pairs
    )


def _row(judge: JudgeEvaluation, one: ClassChange, evaluation: SteeringEvaluation) -> schema.FractionRow:
    bound = one.bound
    return schema.FractionRow(
        judge=judge.name,
        label=one.name,
        before=_interval(one.before),
        after=_interval(one.after),
        n=evaluation.samples,
        low=rounded(bound.low) if bound is not None and bound.low > 0 else None,
        high=rounded(bound.high) if bound is not None and bound.high < 1 else None,
        told=None if one.judgement is None else one.judgement.told,
        samples_needed=None if one.judgement is None else one.judgement.needed,
    )


def _interval(one: Fraction) -> schema.Interval:
    return schema.Interval(
        value=rounded(one.value), low=rounded(one.low), high=rounded(one.high), confidence=one.confidence
    )


def _kid(judge: JudgeEvaluation, one: ClassChange) -> schema.KidRow:
    return schema.KidRow(
        judge=judge.name,
        label=one.name,
        value=rounded(one.kid.value),
        standard_error=rounded(one.kid.standard_error),
        floor=rounded(one.kid.floor),
        within_noise=one.kid.within_noise,
        n_before=one.kid.n,
        n_after=one.kid.m,
        extractor=one.kid.extractor,
    )


def _judge(one: JudgeEvaluation) -> schema.JudgeFacts:
    return schema.JudgeFacts(
        name=one.name,
        classes=tuple(change.name for change in one.changes),
        accuracy=None if one.accuracy is None else _interval(one.accuracy),
    )


def _curves(
    evaluation: SteeringEvaluation, run: RunFacts, history: Sequence[Mapping[str, float]], samples: int | None
) -> tuple[schema.Curve, ...]:
    """Fractions against the step. A step that the judge's own samples stand for, the last, is theirs."""
    alone = len(evaluation.judges) == 1
    curves = []
    for judge in evaluation.judges:
        for one in judge.changes:
            named = f"{judge.name}.{one.name}"
            found = {int(row["step"]): row for row in history if named in row or (alone and one.name in row)}
            points = [
                _point(step, float(row.get(named, row.get(one.name, math.nan))), row.get("n", samples), one.after)
                for step, row in found.items()
            ]
            if not points:
                continue
            if run.steps is not None:
                ends = {0: one.before, run.steps: one.after}
                points = [point for point in points if point.step not in ends]
                points += [schema.CurvePoint(step=step, **_ends(end)) for step, end in ends.items()]
            ordered = tuple(sorted(points, key=lambda point: point.step))
            curves.append(schema.Curve(judge=judge.name, label=one.name, points=ordered))
    return tuple(curves)


def _point(step: int, value: float, samples: float | None, like: Fraction) -> schema.CurvePoint:
    """A fraction of the run, with an interval of the same level as the report's own."""
    if not samples or not 0 <= value <= 1:
        return schema.CurvePoint(step=step, value=rounded(value), low=None, high=None)
    n = int(samples)
    return schema.CurvePoint(step=step, **_ends(fraction_of(round(value * n), n, confidence=like.level)))


def _ends(one: Fraction) -> dict[str, float | None]:
    return {"value": rounded(one.value), "low": rounded(one.low), "high": rounded(one.high)}


def _likelihoods(evaluation: SteeringEvaluation) -> tuple[schema.LikelihoodRow, ...]:
    return tuple(
        schema.LikelihoodRow(
            key=key,
            description=LIKELIHOOD_ROWS[key],
            n=len(one.nll_base),
            draws=one.draws,
            bpd_before=_mean(evaluation, one.nll_base),
            bpd_after=_mean(evaluation, one.nll_steered),
            drift=estimate(one.drift, "sigma_R of the base model"),
        )
        for key, one in (("remember", evaluation.remember), ("held_out", evaluation.held_out))
        if one is not None
    )


def _mean(evaluation: SteeringEvaluation, nll: FloatArray) -> float | None:
    values = [value for value in _bpd(evaluation, nll) if value is not None]
    return rounded(sum(values) / len(values)) if values and len(values) == len(nll) else None


def _bpd(evaluation: SteeringEvaluation, nll: FloatArray) -> tuple[float | None, ...]:
    dims = math.prod(evaluation.image_shape)
    return tuple(rounded(bits_per_dim(float(one), dims=dims, n_bits=evaluation.n_bits)) for one in nll)


def _distributions(evaluation: SteeringEvaluation) -> schema.Distributions | None:
    def spread(one: LikelihoodChange | None) -> schema.SetDistribution | None:
        if one is None:
            return None
        before, after = (_bpd(evaluation, thinned(nll)) for nll in (one.nll_base, one.nll_steered))
        return schema.SetDistribution(before=before, after=after)

    remember = spread(evaluation.remember)
    if remember is None:
        return None
    return schema.Distributions(
        remember=remember,
        forget=schema.SetDistribution(before=(), after=()),
        held_out=spread(evaluation.held_out),
        threshold_before=None,
        threshold_after=None,
    )
