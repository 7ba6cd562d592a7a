"""From an evaluation and the job's facts to a report: the verdict in words, the criteria, and the limits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evidence import schema
from evidence.likelihood import FloatArray, bits_per_dim
from evidence.quantiles import Normality, Reference
from evidence.records import FlowEvaluation, QuantileChange, SetEvaluation, SetKey
from evidence.rendering import render_html
from evidence.report_parts import (
    RunFacts,
    estimate,
    health,
    losses,
    provenance,
    rounded,
    samples_sound,
    software_versions,
    thinned,
    verdict,
)
from evidence.schema import Criterion, Report, json_schema

__all__ = ["Criterion", "Report", "RunFacts", "build_report", "json_schema", "render_html", "software_versions"]

SETS: dict[SetKey, tuple[str, str]] = {
    "forget": ("D_F", "images to forget"),
    "same_identity": ("D'_F", "other images of the same person, not used"),
    "remember": ("D_R", "images to remember"),
    "held_out": ("D_R^id", "people whom the model has never seen"),
    "neighbours": ("D_R^NN", "images to remember that look most like D_F"),
}

LIMITATIONS = (
    "Likelihood is not identity. A quantile says how probable the model finds given pictures; it does not say whether "
    "the person can appear in what the model draws. No face recogniser judged samples for this report.",
    "Only the listed images were measured. Other pictures of the person are covered as far as the row D'_F shows, and "
    "flips, crops or re-compressed copies were not tried.",
    "Quantiles are taken among the images to remember, under each model's own mean and spread. For those images "
    "themselves the quantile drop is near zero by construction: read damage from drift and divergence.",
    "Intervals cover the choice of images, taken as independent. Several pictures of one person are not, so the truth "
    "is wider; the error of mu_R and sigma_R is not included.",
    "mu_R and sigma_R come from the images to remember, which the method saw; people it never saw may lie elsewhere, "
    "as far as the row D_R^id shows. Each row names its noise draws: with one, read the set and not its single images.",
    "Gaussian quantiles below 1 / (n + 1) extrapolate beyond what n images can confirm.",
    "Resistance to an attack was not tested: a short re-training on the forgotten images might bring them back. The "
    "base checkpoint, its copies and earlier samples still hold what they held.",
    "The divergence weighs what the base model draws often; what it draws rarely may change unseen.",
)


def build_report(
    evaluation: FlowEvaluation,
    run: RunFacts | None = None,
    *,
    title: str = "Forgetting report",
    extra_criteria: Sequence[Criterion] = (),
) -> Report:
    """Put an evaluation and the facts of its run into a report.

    Args:
        evaluation: what was measured.
        run: the facts around it.
        title: of the document.
        extra_criteria: further conditions of the job, judged by the caller; one that is not met fails the job.

    Returns:
        The report; the same input gives the same bytes.
    """
    run = run or RunFacts()
    criteria = (*_criteria(evaluation), *extra_criteria)
    return Report(
        title=title,
        verdict=verdict(_sentence(evaluation, criteria), criteria),
        sets=tuple(_row(evaluation, one) for one in evaluation.sets),
        forget_images=tuple(
            schema.ForgetImageRow(
                **{name: rounded(value) if isinstance(value, float) else value for name, value in vars(image).items()}
            )
            for image in evaluation.forget_images
        ),
        reference=_reference(evaluation),
        side_effects=_side_effects(evaluation),
        data=schema.DataFacts(
            image_shape=evaluation.image_shape,
            n_bits=evaluation.n_bits,
            near_duplicates_removed=run.near_duplicates_removed,
            image_fitting=run.image_fitting,
            neighbours_method=evaluation.neighbours_method,
        ),
        provenance=provenance(run, evaluation.seed),
        losses=losses(run),
        notes=evaluation.notes,
        limitations=LIMITATIONS,
        distributions=_distributions(evaluation),
    )


def _criteria(evaluation: FlowEvaluation) -> tuple[Criterion, ...]:
    z = f"{evaluation.threshold_z:.2f}"
    reach = f"lies at least {z} sigma_R above mu_R"
    if evaluation.two_sided:
        reach = f"lies within {evaluation.tolerance * evaluation.delta:.2f} sigma_R of {evaluation.delta:g} above mu_R"
    forgotten = Criterion(
        name="every_image_forgotten",
        statement=f"The negative log-likelihood of every image to forget {reach}, by the tamed model on fresh noise.",
        threshold=rounded(evaluation.threshold_z),
        value=rounded(evaluation.smallest_z),
        met=evaluation.forgotten,
    )
    if evaluation.health_tamed is None or evaluation.health_base is None:
        return (forgotten,)
    return forgotten, samples_sound(evaluation.health_base, evaluation.health_tamed, "tamed model")


def _sentence(evaluation: FlowEvaluation, criteria: Sequence[Criterion]) -> str:
    n = len(evaluation.forget_images)
    if n == 0:
        return "There were no images to judge, so nothing was shown to be forgotten."
    if not evaluation.forgotten:
        missing = sum(not image.forgotten for image in evaluation.forget_images)
        least = evaluation.smallest_z
        return (
            f"The criteria were not met: {missing} of {n} image{'s' * (n > 1)} to forget missed the threshold of "
            f"{_threshold(evaluation)} standard deviations (the lowest is at "
            f"{f'{math.floor(least * 100) / 100:.2f}' if math.isfinite(least) else 'no finite number'})."
        )
    failed = [criterion.name.replace("_", " ") for criterion in criteria if not criterion.met]
    if failed:
        reasons = ", ".join(failed)
        return f"The criteria were not met: the images to forget passed, but another condition failed ({reasons})."
    kind = (
        "images to remember"
        if evaluation.remember_source == "images"
        else "base-model samples that stand in for images to remember"
    )
    subject, object_ = ("The one image to forget is", "it") if n == 1 else (f"All {n} images to forget are", "them")
    return (
        f"{subject} now at least {evaluation.smallest_z:.2f} standard deviations less likely "
        f"than the average of the {evaluation.reference_tamed.n:,} {kind} ({_threshold(evaluation)} required): by this "
        f"criterion the model has forgotten {object_}."
    )


def _threshold(evaluation: FlowEvaluation) -> str:
    if evaluation.two_sided:
        return f"{evaluation.delta:g} ± {evaluation.tolerance * evaluation.delta:.2f}"
    return f"{evaluation.threshold_z:.2f}"


def _row(evaluation: FlowEvaluation, one: SetEvaluation) -> schema.SetRow:
    symbol, description = SETS[one.key]
    if one.key == "remember" and evaluation.remember_source == "generated":
        description = "samples of the base flow, in place of images to remember"
    change: QuantileChange = getattr(one, evaluation.primary.kind)
    drop = change.drop
    return schema.SetRow(
        key=one.key,
        symbol=symbol,
        description=description,
        n=one.n,
        draws=one.draws,
        q_before=rounded(change.before),
        q_after=rounded(change.after),
        quantile_drop=schema.Interval(
            value=rounded(drop.value), low=rounded(drop.low), high=rounded(drop.high), confidence=drop.confidence
        ),
        q_before_gaussian=rounded(one.gaussian.before),
        q_after_gaussian=rounded(one.gaussian.after),
        q_before_empirical=rounded(one.empirical.before),
        q_after_empirical=rounded(one.empirical.after),
        bpd_before=rounded(one.bpd_base),
        bpd_after=rounded(one.bpd_tamed),
    )


def _reference(evaluation: FlowEvaluation) -> schema.ReferenceFacts:
    base, tamed = evaluation.reference_base, evaluation.reference_tamed
    remember = evaluation.set("remember")
    sentence = f"mu_R and sigma_R come from {base.n:,} images to remember that the requester supplied."
    if evaluation.remember_source == "generated":
        sentence = (
            f"No images to remember were supplied: {base.n:,} samples of the base flow stand in for them, so every "
            "quantile is taken among what the base model draws, not among real pictures."
        )
    return schema.ReferenceFacts(
        source=evaluation.remember_source,
        source_sentence=sentence,
        n=base.n,
        draws=0 if remember is None else remember.draws,
        mu_before=rounded(base.mean),
        mu_after=rounded(tamed.mean),
        sigma_before=rounded(base.std),
        sigma_after=rounded(tamed.std),
        normality_before=_normality(evaluation.normality_base),
        normality_after=_normality(evaluation.normality_tamed),
        primary_quantile=evaluation.primary.kind,
        primary_reason=evaluation.primary.reason,
        resolution=base.resolution,
    )


def _normality(test: Normality) -> schema.NormalityTest:
    return schema.NormalityTest(
        statistic=rounded(test.statistic),
        p_value=rounded(test.p_value),
        p_value_naive=rounded(test.p_value_naive),
        skew=rounded(test.skew),
        excess_kurtosis=rounded(test.excess_kurtosis),
        rejected=test.rejected,
    )


def _side_effects(evaluation: FlowEvaluation) -> schema.SideEffects:
    held_out, kl = evaluation.drift_held_out, evaluation.kl
    return schema.SideEffects(
        drift_remember=estimate(evaluation.drift_remember, "sigma_R of the base model"),
        drift_held_out=None if held_out is None else estimate(held_out, "sigma_R of the base model"),
        kl_per_dim=None if kl is None else estimate(kl, "nats per dimension"),
        sigma_ratio=rounded(evaluation.sigma_ratio),
        health_before=health(evaluation.health_base),
        health_after=health(evaluation.health_tamed),
    )


def _distributions(evaluation: FlowEvaluation) -> schema.Distributions:
    dims = math.prod(evaluation.image_shape)

    def bpd(nll: FloatArray) -> tuple[float | None, ...]:
        return tuple(rounded(bits_per_dim(float(v), dims=dims, n_bits=evaluation.n_bits)) for v in nll)

    def spread(key: SetKey) -> schema.SetDistribution | None:
        one = evaluation.set(key)
        if one is None:
            return None
        return schema.SetDistribution(before=bpd(thinned(one.nll_base)), after=bpd(thinned(one.nll_tamed)))

    def threshold(reference: Reference) -> float | None:
        nll = reference.mean + evaluation.threshold_z * reference.std
        return rounded(bits_per_dim(nll, dims=dims, n_bits=evaluation.n_bits))

    empty = schema.SetDistribution(before=(), after=())
    forget = evaluation.set("forget")
    return schema.Distributions(
        remember=spread("remember") or empty,
        forget=empty
        if forget is None
        else schema.SetDistribution(before=bpd(forget.nll_base), after=bpd(forget.nll_tamed)),
        held_out=spread("held_out"),
        threshold_before=threshold(evaluation.reference_base),
        threshold_after=threshold(evaluation.reference_tamed),
    )
