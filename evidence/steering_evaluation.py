"""The judge of steering: one call that draws from a base and a steered flow and says how often each shows what."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from evidence import likelihood
from evidence.drift import Drift, SampleHealth, draw_samples, nll_drift, sample_health
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Fraction, count, judge
from evidence.kid import Extractor, kid_beside_floor, pca_extractor
from evidence.likelihood import derive_seed, device_of
from evidence.quantiles import Reference
from evidence.records import finite
from evidence.steering_records import (
    ClassChange,
    FractionBounds,
    JudgeEvaluation,
    LikelihoodChange,
    RelearnProbe,
    SteeringEvaluation,
)
from models.images import denoised, to_uint8
from models.protocol import Flow

__all__ = ["FractionBounds", "RelearnProbe", "SteeringEvaluation", "evaluate_steering", "sampled_images"]

HEALTH_SAMPLES = 64
"""Of the samples, as many as are looked at for their health."""

DRAWS = 1
"""Noise draws an image: sets are read as a whole, and the report names the number."""

Progress = Callable[[int, int], None]


def evaluate_steering(
    base: Flow,
    steered: Flow,
    constraints: Sequence[FractionBounds],
    *,
    n_bits: int,
    samples: int,
    confidence: float = CONFIDENCE,
    seed: int,
    remember: Tensor | None = None,
    held_out: Tensor | None = None,
    batch_size: int = likelihood.BATCH,
    draws: int = DRAWS,
    extractor: Extractor | None = None,
    kind: str = "attribute",
    relearn: RelearnProbe | None = None,
    notes: Sequence[str] = (),
    on_progress: Progress | None = None,
) -> SteeringEvaluation:
    """Judge a steered flow by what it draws, on fresh latents (arXiv 2211.16488, Sec. 4.2, Fig. 4).

    The constraints are kept when the interval of every bounded fraction lies inside its bound. Both flows draw from
    latents of their own, so that the distance of what they draw has no bias.

    Args:
        base: the flow before.
        steered: the flow after.
        constraints: what is asked of the samples, one for each classifier.
        n_bits: bits a channel.
        samples: to draw of each flow; `evidence.fractions.samples_for` says how many a tolerance takes.
        confidence: of each classifier's intervals together.
        seed: of noise and samples; never one that the method trained with.
        remember: (n, c, h, w) uint8, images whose likelihood should stay.
        held_out: likewise, of images that nothing has seen.
        batch_size: images that pass through a flow at once.
        draws: noise draws an image for likelihoods.
        extractor: features for the distance within each class; principal components of the base's samples if None.
        kind: what was done: "attribute", "debias", "access removal" (the prior no longer draws the class, the weights
            still hold it) or "unlearning".
        relearn: what a re-training brought back, where it was tried.
        notes: sentences to be kept with the evaluation's own.
        on_progress: called with (step, total) after every batch.
    """
    if samples < 1 or not constraints:
        raise TargetError(f"there is nothing to judge in {samples} samples by {len(constraints)} classifiers")
    kept = {"remember": remember, "held_out": held_out}
    images = {key: one for key, one in kept.items() if one is not None}
    total = 2 * likelihood.batch_count(samples, 1, batch_size) + len(constraints)
    total += sum(2 * likelihood.batch_count(len(one), draws, batch_size) for one in images.values())
    steps = _Steps(on_progress, total)

    def drawn(flow: Flow, which: str) -> tuple[Tensor, Tensor]:
        one = derive_seed(seed, "evaluation", "samples", which)
        return sampled_images(flow, samples, n_bits=n_bits, seed=one, batch_size=batch_size, on_batch=steps.advance)

    (before, raw_before), (after, raw_after) = drawn(base, "base"), drawn(steered, "steered")
    health = (
        sample_health(base, raw_before, batch_size=batch_size),
        sample_health(steered, raw_after, batch_size=batch_size),
    )
    judges = []
    for constraint in constraints:
        judges.append(_judged(constraint, before, after, confidence, extractor or pca_extractor(before), seed))
        steps.advance()
    changes = _likelihoods(base, steered, images, n_bits, draws, seed, batch_size, steps.advance)
    return SteeringEvaluation(
        kind=kind,
        image_shape=(before.shape[1], before.shape[2], before.shape[3]),
        n_bits=n_bits,
        samples=samples,
        confidence=confidence,
        seed=seed,
        judges=tuple(judges),
        remember=changes.get("remember"),
        held_out=changes.get("held_out"),
        health_base=health[0],
        health_steered=health[1],
        relearn=relearn,
        notes=(*notes, *_notes(judges, health)),
    )


def sampled_images(
    flow: Flow,
    n: int,
    *,
    n_bits: int,
    seed: int,
    batch_size: int = likelihood.BATCH,
    on_batch: Callable[[], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw pictures from a flow.

    Args:
        flow: any; what it draws is denoised where it offers that.
        n: how many.
        n_bits: bits a channel.
        seed: of the latents.
        batch_size: pictures that pass through the flow at once.
        on_batch: called after each batch.

    Returns:
        The pictures (n, c, h, w) uint8, and the first HEALTH_SAMPLES as the flow drew them, float32.
    """
    pictures, raw, device = [], [], device_of(flow)
    for index, start in enumerate(range(0, n, batch_size)):
        size = min(batch_size, n - start)
        # Cloned: a flow that denoises takes a gradient, which an inference tensor cannot carry.
        x = draw_samples(flow, size, seed=derive_seed(seed, "batch", index), batch_size=size).clone()
        raw.append(x[: max(0, HEALTH_SAMPLES - start)])
        with torch.no_grad():
            pictures.append(to_uint8(denoised(flow, x.to(device)).cpu(), n_bits))
        if on_batch is not None:
            on_batch()
    return torch.cat(pictures), torch.cat(raw)


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


def _judged(
    constraint: FractionBounds, before: Tensor, after: Tensor, confidence: float, extractor: Extractor, seed: int
) -> JudgeEvaluation:
    classifier, bounds = constraint.classifier, constraint.bounds
    labels = classifier(before), classifier(after)
    fractions = [count(one, classifier.classes, confidence=confidence) for one in labels]
    changes = []
    for label, name in enumerate(classifier.classes):
        shown = before[labels[0] == label], after[labels[1] == label]
        distance = kid_beside_floor(
            *shown,
            extractor,
            seed=derive_seed(seed, "kid", classifier.name, name),
            comparisons=len(classifier.classes),
        )
        bound = bounds.get(name)
        told = None if bound is None else judge(fractions[1], {name: bound})
        changes.append(ClassChange(name, fractions[0][name], fractions[1][name], bound, told, distance))
    accuracy = getattr(classifier, "accuracy", None)
    return JudgeEvaluation(
        name=classifier.name,
        changes=tuple(changes),
        judgement=judge(fractions[1], bounds),
        accuracy=accuracy if isinstance(accuracy, Fraction) else None,
    )


def _likelihoods(
    base: Flow,
    steered: Flow,
    images: dict[str, Tensor],
    n_bits: int,
    draws: int,
    seed: int,
    batch_size: int,
    on_batch: Callable[[], None],
) -> dict[str, LikelihoodChange]:
    """Likelihoods of each set, the drift of all in the spread of the first: that of images to remember, if given."""
    measured = {}
    for key, one in images.items():
        noise = derive_seed(seed, "evaluation", key)
        measured[key] = tuple(
            likelihood.image_nll(
                flow, one, n_bits=n_bits, draws=draws, seed=noise, batch_size=batch_size, on_batch=on_batch
            ).nll
            for flow in (base, steered)
        )
    if not measured:
        return {}
    spread = Reference.of(next(iter(measured.values()))[0]).std
    return {
        key: LikelihoodChange(before, after, draws, _drift(before, after, spread))
        for key, (before, after) in measured.items()
    }


def _drift(before: likelihood.FloatArray, after: likelihood.FloatArray, spread: float) -> Drift:
    return nll_drift(before, after, spread) if math.isfinite(spread) else Drift(math.nan, None, len(before))


def _notes(judges: Sequence[JudgeEvaluation], health: tuple[SampleHealth, SampleHealth]) -> list[str]:
    notes = []
    for one in judges:
        if one.accuracy is not None:
            wrong = 1 - one.accuracy.value
            notes.append(
                f"The judge {one.name} was trained for this job and errs on {wrong:.1%} of unseen labelled images: its "
                "fractions may be off by as much, before and after alike."
            )
        few = [change.name for change in one.changes if change.kid.floor is None]
        if few:
            notes.append(
                f"{one.name}: too few samples of {', '.join(few)} in one of the flows to say whether they still look "
                "as they did."
            )
        moved = [change.name for change in one.changes if change.kid.within_noise is False]
        if moved:
            notes.append(
                f"{one.name}: samples of {', '.join(moved)} differ from the base's by more than halves of the base's "
                "own differ."
            )
    if not health[0].sound:
        error = finite(health[0].round_trip_error or 0.0)
        notes.append(
            f"The base flow itself is not sound: {health[0].finite:.0%} of its samples are finite, and its inverse "
            f"leaves an error of {'no finite size' if error is None else f'up to {error:.2g}'}. The steered flow is "
            "held against that."
        )
    return notes
