"""From an evaluation and the job's facts to a report: the verdict in words, the criteria, and the limits."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import JsonValue

from evidence import schema
from evidence.drift import Drift, KlEstimate, SampleHealth
from evidence.likelihood import FloatArray, bits_per_dim
from evidence.quantiles import Normality, Reference
from evidence.records import FlowEvaluation, QuantileChange, SetEvaluation, SetKey, finite
from evidence.rendering import render_html
from evidence.schema import Criterion, Report, json_schema

__all__ = ["Criterion", "Report", "RunFacts", "build_report", "json_schema", "render_html", "software_versions"]

KEPT_VALUES = 1000
"""Likelihoods of a large set that the report keeps for its figures, evenly spaced in rank."""

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


@dataclass(frozen=True)
class RunFacts:
    """What the measures cannot know about a run; every field has a neutral default.

    Attributes:
        job: its id.
        method: the method and its engine.
        created_at: moment, as text; left out rather than taken from the clock, so that equal runs give equal bytes.
        attempt: how many attempts it took, from 1.
        resumed_from_step: step at which an earlier attempt was taken up; None if it was not.
        steps: optimisation steps in all.
        parameters: the method's parameters as used.
        defaults: the method's defaults; a parameter without one is shown as changed.
        seeds: by purpose. The evaluation's is added.
        digests: by object, such as base_checkpoint, tamed_checkpoint, remember_set; never of a forget image.
        software: name to version; None: `software_versions()`.
        device: in words.
        seconds: by phase.
        losses: by name, (step, value) pairs.
        near_duplicates_removed: images that left D_R for being too close to D_F.
        image_fitting: how images were brought to the model's size and channels, in a sentence.
    """

    job: str | None = None
    method: str = "flow-taming"
    created_at: str | None = None
    attempt: int = 1
    resumed_from_step: int | None = None
    steps: int | None = None
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    software: Mapping[str, str] | None = None
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    near_duplicates_removed: int = 0
    image_fitting: str = "images were used at the model's size as they came"


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
    met = all(criterion.met for criterion in criteria)
    return Report(
        title=title,
        verdict=schema.Verdict(
            outcome="succeeded" if met else "criteria_not_met",
            sentence=_sentence(evaluation, criteria),
            criteria=criteria,
        ),
        sets=tuple(_row(evaluation, one) for one in evaluation.sets),
        forget_images=tuple(
            schema.ForgetImageRow(
                **{name: _rounded(value) if isinstance(value, float) else value for name, value in vars(image).items()}
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
        provenance=_provenance(evaluation, run),
        losses={
            name: tuple(schema.LossPoint(step=step, value=_rounded(value)) for step, value in points)
            for name, points in sorted(run.losses.items())
        },
        notes=evaluation.notes,
        limitations=LIMITATIONS,
        distributions=_distributions(evaluation),
    )


def software_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    versions = {"python": platform.python_version()}
    for name in ("forgetd", "numpy", "scipy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def _criteria(evaluation: FlowEvaluation) -> tuple[Criterion, ...]:
    z = f"{evaluation.threshold_z:.2f}"
    reach = f"lies at least {z} sigma_R above mu_R"
    if evaluation.two_sided:
        reach = f"lies within {evaluation.tolerance * evaluation.delta:.2f} sigma_R of {evaluation.delta:g} above mu_R"
    forgotten = Criterion(
        name="every_image_forgotten",
        statement=f"The negative log-likelihood of every image to forget {reach}, by the tamed model on fresh noise.",
        threshold=_rounded(evaluation.threshold_z),
        value=_rounded(evaluation.smallest_z),
        met=evaluation.forgotten,
    )
    if evaluation.health_tamed is None or evaluation.health_base is None:
        return (forgotten,)
    healthy = Criterion(
        name="samples_sound",
        statement="Samples of the tamed model are as finite, invertible and in range as those of the base model.",
        threshold=_rounded(evaluation.health_base.finite_floor()),
        value=_rounded(evaluation.health_tamed.finite),
        met=evaluation.healthy,
    )
    return forgotten, healthy


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
        q_before=_rounded(change.before),
        q_after=_rounded(change.after),
        quantile_drop=schema.Interval(
            value=_rounded(drop.value), low=_rounded(drop.low), high=_rounded(drop.high), confidence=drop.confidence
        ),
        q_before_gaussian=_rounded(one.gaussian.before),
        q_after_gaussian=_rounded(one.gaussian.after),
        q_before_empirical=_rounded(one.empirical.before),
        q_after_empirical=_rounded(one.empirical.after),
        bpd_before=_rounded(one.bpd_base),
        bpd_after=_rounded(one.bpd_tamed),
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
        mu_before=_rounded(base.mean),
        mu_after=_rounded(tamed.mean),
        sigma_before=_rounded(base.std),
        sigma_after=_rounded(tamed.std),
        normality_before=_normality(evaluation.normality_base),
        normality_after=_normality(evaluation.normality_tamed),
        primary_quantile=evaluation.primary.kind,
        primary_reason=evaluation.primary.reason,
        resolution=base.resolution,
    )


def _normality(test: Normality) -> schema.NormalityTest:
    return schema.NormalityTest(
        statistic=_rounded(test.statistic),
        p_value=_rounded(test.p_value),
        p_value_naive=_rounded(test.p_value_naive),
        skew=_rounded(test.skew),
        excess_kurtosis=_rounded(test.excess_kurtosis),
        rejected=test.rejected,
    )


def _side_effects(evaluation: FlowEvaluation) -> schema.SideEffects:
    held_out, kl = evaluation.drift_held_out, evaluation.kl
    return schema.SideEffects(
        drift_remember=_estimate(evaluation.drift_remember, "sigma_R of the base model"),
        drift_held_out=None if held_out is None else _estimate(held_out, "sigma_R of the base model"),
        kl_per_dim=None if kl is None else _estimate(kl, "nats per dimension"),
        sigma_ratio=_rounded(evaluation.sigma_ratio),
        health_before=_health(evaluation.health_base),
        health_after=_health(evaluation.health_tamed),
    )


def _estimate(one: Drift | KlEstimate, unit: str) -> schema.Estimate:
    return schema.Estimate(value=_rounded(one.value), standard_error=_rounded(one.standard_error), n=one.n, unit=unit)


def _health(one: SampleHealth | None) -> schema.Health | None:
    if one is None:
        return None
    return schema.Health(
        n=one.n,
        finite=_rounded(one.finite),
        in_range=_rounded(one.in_range),
        round_trip_error=_rounded(one.round_trip_error),
    )


def _provenance(evaluation: FlowEvaluation, run: RunFacts) -> schema.Provenance:
    software = software_versions() if run.software is None else run.software
    return schema.Provenance(
        job=run.job,
        method=run.method,
        created_at=run.created_at,
        attempt=run.attempt,
        resumed_from_step=run.resumed_from_step,
        steps=run.steps,
        seeds=dict(sorted({**run.seeds, "evaluation": evaluation.seed}.items())),
        digests=dict(sorted(run.digests.items())),
        software=dict(sorted(software.items())),
        device=run.device,
        seconds={name: _rounded(value, 4) for name, value in run.seconds.items()},
        parameters=_parameters(run.parameters, run.defaults),
    )


def _parameters(used: Mapping[str, JsonValue], defaults: Mapping[str, JsonValue]) -> tuple[schema.Parameter, ...]:
    return tuple(
        schema.Parameter(
            name=name,
            value=used.get(name, defaults.get(name)),
            default=defaults.get(name),
            changed=used.get(name, defaults.get(name)) != defaults.get(name),
        )
        for name in sorted({*used, *defaults})
    )


def _distributions(evaluation: FlowEvaluation) -> schema.Distributions:
    dims = math.prod(evaluation.image_shape)

    def bpd(nll: FloatArray) -> tuple[float | None, ...]:
        return tuple(_rounded(bits_per_dim(float(v), dims=dims, n_bits=evaluation.n_bits)) for v in nll)

    def spread(key: SetKey) -> schema.SetDistribution | None:
        one = evaluation.set(key)
        if one is None:
            return None
        return schema.SetDistribution(before=bpd(_thinned(one.nll_base)), after=bpd(_thinned(one.nll_tamed)))

    def threshold(reference: Reference) -> float | None:
        nll = reference.mean + evaluation.threshold_z * reference.std
        return _rounded(bits_per_dim(nll, dims=dims, n_bits=evaluation.n_bits))

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


def _thinned(values: FloatArray) -> FloatArray:
    ordered = np.sort(values)
    if len(ordered) <= KEPT_VALUES:
        return ordered
    kept = np.linspace(0, len(ordered) - 1, KEPT_VALUES).round().astype(np.int64)
    return np.take(ordered, kept)


def _rounded(value: float | None, digits: int = 6) -> float | None:
    """Six significant digits; None for what is missing or not finite."""
    if value is None or finite(value) is None:
        return None
    return float(f"{value:.{digits}g}")
