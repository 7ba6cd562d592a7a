"""The judge of flow taming: one call that measures a base and a tamed flow alike and says what was forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from evidence import likelihood
from evidence.drift import (
    Drift,
    KlEstimate,
    SampleHealth,
    draw_samples,
    kl_per_dim,
    nll_drift,
    sample_health,
)
from evidence.embedding import PcaEmbedding, nearest_neighbours
from evidence.likelihood import FloatArray, ImageNll, bits_per_dim, derive_seed
from evidence.quantiles import (
    MINIMUM_REFERENCE,
    Normality,
    Reference,
    choose_primary,
    normality,
    quantile_drop,
)
from evidence.records import FlowEvaluation, ForgetImage, QuantileChange, RememberSource, SetEvaluation, SetKey
from models.protocol import Flow

__all__ = ["KL_SAMPLES", "NEIGHBOURS", "Progress", "evaluate_taming"]

NEIGHBOURS = 5
"""Nearest images to remember that each forget image contributes to D_R^NN."""

KL_SAMPLES = 128
"""Samples of the base model for the divergence."""

HEALTH_SAMPLES = 64
"""Of these, as many as are looked at for their health, beside as many of the tamed model."""

SIGMA_RATIO_RANGE = (0.9, 1.1)
"""Outside of it the likelihoods to remember have widened or narrowed enough to be named in the notes."""

Progress = Callable[[int, int], None]


def evaluate_taming(
    base: Flow,
    tamed: Flow,
    *,
    forget: Tensor,
    remember: Tensor,
    remember_source: RememberSource,
    same_identity: Tensor | None = None,
    held_out: Tensor | None = None,
    n_bits: int,
    delta: float,
    tolerance: float,
    seed: int,
    draws: int = likelihood.DRAWS,
    remember_draws: int = likelihood.DRAWS,
    two_sided: bool = False,
    neighbours: int = NEIGHBOURS,
    kl_samples: int = KL_SAMPLES,
    batch_size: int = likelihood.BATCH,
    on_progress: Progress | None = None,
) -> FlowEvaluation:
    """Judge a tamed flow against its base on fresh, common noise (arXiv 2211.16488, Sec. 4.1, Eq. 13-15, Table 1).

    An image is forgotten when its z under the tamed model, among the tamed model's likelihoods to remember, is at
    least delta (1 - tolerance); with `two_sided`, when it is no further than tolerance * delta from delta (Eq. 10).

    Args:
        base: the model before.
        tamed: the model after.
        forget: D_F, (n, c, h, w) uint8, as all sets.
        remember: D_R without D_F and its near-duplicates; gives mu_R and sigma_R under each model.
        remember_source: "images", or "generated" for samples of the base flow.
        same_identity: D'_F, other images of the forgotten person, unseen by the method.
        held_out: D_R^id, people whom neither training nor taming has seen.
        n_bits: bits a channel.
        delta: threshold in units of sigma_R, above 0.
        tolerance: share of delta in [0, 1).
        seed: of noise and samples; never one that the method trained with.
        draws: noise draws an image of D_F and D'_F, where single images count.
        remember_draws: noise draws an image of D_R, D_R^NN and D_R^id, which are read as a whole. One draw moves an
            image by some .05 sigma_R and mu_R by that over sqrt(n): one suffices where time counts. The report
            names the number.
        two_sided: as the paper's stop; the default takes overshooting as forgotten.
        neighbours: images of D_R that each forget image contributes to D_R^NN; 0 leaves the set out.
        kl_samples: base samples for divergence and health; 0 leaves both out.
        batch_size: images that pass through a model at once.
        on_progress: called with (step, total) after every batch.
    """
    if not delta > 0 or not 0 <= tolerance < 1:
        raise ValueError(f"delta must be positive and tolerance in [0, 1), got {delta} and {tolerance}")
    given: dict[SetKey, Tensor | None] = {
        "forget": forget, "same_identity": same_identity, "remember": remember, "held_out": held_out,
    }  # fmt: skip
    images = {key: value for key, value in given.items() if value is not None}
    _check_shapes(images)
    set_draws = {key: draws if key in ("forget", "same_identity") else remember_draws for key in images}
    total = sum(2 * likelihood.batch_count(len(images[key]), set_draws[key], batch_size) for key in images)
    progress = _Steps(on_progress, total + (2 if kl_samples else 0))

    def nll(model: Flow, key: SetKey) -> ImageNll:
        return likelihood.image_nll(
            model,
            images[key],
            n_bits=n_bits,
            draws=set_draws[key],
            seed=derive_seed(seed, "evaluation", key),
            batch_size=batch_size,
            on_batch=progress.advance,
        )

    measured = {key: (nll(base, key), nll(tamed, key)) for key in images}
    references = Reference.of(measured["remember"][0].nll), Reference.of(measured["remember"][1].nll)
    embedding = PcaEmbedding.fit(remember)
    if neighbours > 0:
        nearest = nearest_neighbours(embedding.embed(forget), embedding.embed(remember), neighbours).numpy()
        measured["neighbours"] = _take(measured["remember"][0], nearest), _take(measured["remember"][1], nearest)
    sets = tuple(_set(key, pair, references, n_bits) for key, pair in measured.items())
    normal = normality(references[0].values), normality(references[1].values)
    before, after = measured["forget"][0].nll, measured["forget"][1].nll
    kl, health_base, health_tamed = _samples(base, tamed, kl_samples, seed, batch_size, progress)
    return FlowEvaluation(
        image_shape=(forget.shape[1], forget.shape[2], forget.shape[3]),
        n_bits=n_bits,
        delta=delta,
        tolerance=tolerance,
        two_sided=two_sided,
        seed=seed,
        remember_source=remember_source,
        sets=sets,
        forget_images=_verdicts(before, after, references, delta, tolerance, two_sided),
        reference_base=references[0],
        reference_tamed=references[1],
        normality_base=normal[0],
        normality_tamed=normal[1],
        primary=choose_primary(*normal),
        neighbours_method=f"the {neighbours} nearest to each forget image; {embedding.method}",
        drift_remember=_drift(measured["remember"], references[0]),
        drift_held_out=_drift(measured["held_out"], references[0]) if "held_out" in measured else None,
        kl=kl,
        health_base=health_base,
        health_tamed=health_tamed,
        notes=_notes(sets, references, normal, health_base),
    )


class _Steps:
    """Counts batches for the caller's progress bar."""

    def __init__(self, report: Progress | None, total: int) -> None:
        self._report = report
        self._total = total
        self._step = 0

    def advance(self) -> None:
        self._step += 1
        if self._report is not None:
            self._report(self._step, self._total)


def _check_shapes(images: dict[SetKey, Tensor]) -> None:
    for key, one in images.items():
        likelihood.check_images(one)
        if one.shape[1:] != images["forget"].shape[1:]:
            shapes = tuple(one.shape[1:]), tuple(images["forget"].shape[1:])
            raise ValueError(f"images of {key} are {shapes[0]}, those of forget {shapes[1]}: all must agree")


def _set(
    key: SetKey, pair: tuple[ImageNll, ImageNll], references: tuple[Reference, Reference], n_bits: int
) -> SetEvaluation:
    base, tamed = pair

    def bpd(one: ImageNll) -> float:
        return bits_per_dim(_mean(one.nll), dims=one.dims, n_bits=n_bits)

    return SetEvaluation(
        key=key,
        n=base.n,
        draws=base.draws,
        nll_base=base.nll,
        nll_tamed=tamed.nll,
        bpd_base=bpd(base),
        bpd_tamed=bpd(tamed),
        gaussian=_change(references[0].gaussian(base.nll), references[1].gaussian(tamed.nll)),
        empirical=_change(references[0].empirical(base.nll), references[1].empirical(tamed.nll)),
    )


def _change(before: FloatArray, after: FloatArray) -> QuantileChange:
    return QuantileChange(_mean(before), _mean(after), quantile_drop(before, after))


def _mean(values: FloatArray) -> float:
    with np.errstate(invalid="ignore"):
        return float(values.mean()) if len(values) else math.nan


def _take(one: ImageNll, index: np.typing.NDArray[np.int64]) -> ImageNll:
    return ImageNll(one.nll[index], one.noise_std[index], one.draws, one.dims)


def _drift(pair: tuple[ImageNll, ImageNll], reference: Reference) -> Drift:
    return nll_drift(pair[0].nll, pair[1].nll, reference.std)


def _verdicts(
    before: FloatArray,
    after: FloatArray,
    references: tuple[Reference, Reference],
    delta: float,
    tolerance: float,
    two_sided: bool,
) -> tuple[ForgetImage, ...]:
    base, tamed = references
    z = tamed.z(after)
    forgotten = np.abs(z - delta) <= tolerance * delta if two_sided else z >= delta * (1 - tolerance)
    columns: dict[str, FloatArray] = {
        "z_before": base.z(before),
        "z_after": z,
        "z_after_base": base.z(after),
        "q_gaussian_before": base.gaussian(before),
        "q_gaussian_after": tamed.gaussian(after),
        "q_empirical_before": base.empirical(before),
        "q_empirical_after": tamed.empirical(after),
    }
    no_more_likely = tamed.no_more_likely(after)
    return tuple(
        ForgetImage(
            index=i,
            no_more_likely=int(no_more_likely[i]),
            forgotten=bool(forgotten[i] and np.isfinite(z[i])),
            **{name: float(values[i]) for name, values in columns.items()},
        )
        for i in range(len(after))
    )


def _samples(
    base: Flow, tamed: Flow, n: int, seed: int, batch_size: int, progress: _Steps
) -> tuple[KlEstimate | None, SampleHealth | None, SampleHealth | None]:
    if n < 1:
        return None, None, None
    seed = derive_seed(seed, "evaluation", "samples")
    drawn = draw_samples(base, n, seed=seed, batch_size=batch_size)
    kl = kl_per_dim(base, tamed, drawn, batch_size=batch_size)
    looked_at = drawn[:HEALTH_SAMPLES]
    health_base = sample_health(base, looked_at, batch_size=batch_size)
    progress.advance()
    again = draw_samples(tamed, len(looked_at), seed=seed, batch_size=batch_size)
    health_tamed = sample_health(tamed, again, batch_size=batch_size)
    progress.advance()
    return kl, health_base, health_tamed


def _notes(
    sets: tuple[SetEvaluation, ...],
    references: tuple[Reference, Reference],
    normal: tuple[Normality, Normality],
    health_base: SampleHealth | None,
) -> tuple[str, ...]:
    notes = []
    base, tamed = references
    if not base.sufficient:
        notes.append(
            f"Insufficient evidence for the far tail: {base.n} images to remember resolve quantiles down to "
            f"{base.resolution:.2g}; {MINIMUM_REFERENCE:,} or more are advised."
        )
    if not (base.std > 0 and tamed.std > 0):
        notes.append("mu_R and sigma_R could not be computed: too few images to remember, or an infinite likelihood.")
    elif not SIGMA_RATIO_RANGE[0] <= tamed.std / base.std <= SIGMA_RATIO_RANGE[1]:
        notes.append(
            f"sigma_R changed by a factor of {tamed.std / base.std:.2f}: read z under the base model's statistics too."
        )
    if any(test.rejected for test in normal):
        notes.append("Gaussian quantiles are shown for comparison only; z keeps its meaning as a distance.")
    if health_base is not None and not health_base.sound:
        notes.append(
            f"The base model itself is not sound: {health_base.finite:.0%} of its samples are finite, and its inverse "
            f"leaves an error of up to {health_base.round_trip_error or 0:.2g}. The tamed model is held against that."
        )
    notes.extend(f"{one.key}: {one.n} image(s), too few for an interval." for one in sets if one.n < 2)
    return tuple(notes)
