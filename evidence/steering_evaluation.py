"""The judge of steering: one call that draws from a base and a steered flow and says how often each shows what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evidence import likelihood
from evidence.drift import Drift, SampleHealth, draw_samples, nll_drift, sample_health
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Bound, Fraction, count, judge
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
from models.protocol import Flow, LabelledFlow

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
    latents of their own, so that the distance of what they draw has no bias. Bounds `by_label` are held against the
    classes that the samples were drawn of; the classifier's reading follows as a judge without bounds. A sample of
    values that are not finite is counted, and fails flows that draw more of them than their base; judges see black.

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
        extractor: features for the distance within each class; principal components of both flows' samples if None.
        kind: what was done: "attribute", "debias", "access removal" (the prior no longer draws the class, the weights
            still hold it) or "unlearning".
        relearn: what a re-training brought back, where it was tried.
        notes: sentences to be kept with the evaluation's own.
        on_progress: called with (step, total) after every batch.

    Raises:
        TargetError: nothing is asked, or by label of flows that do not tell what they draw.
    """
    if samples < 1 or not constraints:
        raise TargetError(f"there is nothing to judge in {samples} samples by {len(constraints)} classifiers")
    kept = {"remember": remember, "held_out": held_out}
    images = {key: one for key, one in kept.items() if one is not None}
    total = 2 * likelihood.batch_count(samples, 1, batch_size) + len(constraints)
    total += sum(2 * likelihood.batch_count(len(one), draws, batch_size) for one in images.values())
    steps = _Steps(on_progress, total)

    def drawn(flow: Flow, which: str) -> _Samples:
        one = derive_seed(seed, "evaluation", "samples", which)
        return _sampled(flow, samples, n_bits=n_bits, seed=one, batch_size=batch_size, on_batch=steps.advance)

    before, after = drawn(base, "base"), drawn(steered, "steered")
    health = before.health(base, batch_size), after.health(steered, batch_size)
    judges: list[JudgeEvaluation] = []
    features = extractor or pca_extractor(torch.cat([before.pictures, after.pictures]))
    for constraint in constraints:
        judges.extend(_judged(constraint, before, after, confidence, features, seed))
        steps.advance()
    changes = _likelihoods(base, steered, images, n_bits, draws, seed, batch_size, steps.advance)
    return SteeringEvaluation(
        kind=kind,
        image_shape=(before.pictures.shape[1], before.pictures.shape[2], before.pictures.shape[3]),
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
    found = _sampled(flow, n, n_bits=n_bits, seed=seed, batch_size=batch_size, on_batch=on_batch)
    return found.pictures, found.raw


@dataclass(frozen=True, eq=False)
class _Samples:
    """Pictures (n, c, h, w) uint8, the first few as they were drawn, and the class that each was drawn of, if known."""

    pictures: Tensor
    raw: Tensor
    labels: Tensor | None
    finite: int
    """Samples of finite values; the others are black pictures."""

    def health(self, flow: Flow, batch_size: int) -> SampleHealth:
        """How sound they are: whether all are finite, the rest by the first few."""
        counted = self.finite, len(self.pictures)
        return sample_health(flow, self.raw, batch_size=batch_size, finite_of=counted)


def _sampled(
    flow: Flow, n: int, *, n_bits: int, seed: int, batch_size: int, on_batch: Callable[[], None] | None
) -> _Samples:
    pictures, raw, labels, whole, device = [], [], [], 0, device_of(flow)
    for index, start in enumerate(range(0, n, batch_size)):
        size = min(batch_size, n - start)
        x, drawn_of = _drawn(flow, size, derive_seed(seed, "batch", index))
        raw.append(x[: max(0, HEALTH_SAMPLES - start)])
        labels += [] if drawn_of is None else [drawn_of]
        with torch.no_grad():
            clean = denoised(flow, x.to(device)).cpu()
        whole += int((x.isfinite() & clean.isfinite()).flatten(1).all(1).sum())
        pictures.append(to_uint8(clean, n_bits))
        if on_batch is not None:
            on_batch()
    return _Samples(torch.cat(pictures), torch.cat(raw), torch.cat(labels) if labels else None, whole)


def _drawn(flow: Flow, n: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """What `draw_samples` draws in one batch; of a flow that knows it, also the class of each, (n,) int64."""
    if isinstance(flow, LabelledFlow):
        generator = torch.Generator().manual_seed(derive_seed(seed, "samples", 0))
        with torch.no_grad():
            x, labels = flow.sample_with_labels(n, generator=generator)
        return x.cpu(), labels.cpu()
    # Cloned: a flow that denoises takes a gradient, which an inference tensor cannot carry.
    return draw_samples(flow, n, seed=seed, batch_size=n).clone(), None


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
    constraint: FractionBounds, before: _Samples, after: _Samples, confidence: float, extractor: Extractor, seed: int
) -> list[JudgeEvaluation]:
    """What the classifier reads; before it, where bounds are by label, how often each class was drawn."""
    classifier = constraint.classifier

    def counted(
        name: str, labels: tuple[Tensor, Tensor], bounds: Mapping[str, Bound], *, drawn: bool = False
    ) -> JudgeEvaluation:
        fractions = [count(one, classifier.classes, confidence=confidence) for one in labels]
        changes = []
        for label, one in enumerate(classifier.classes):
            distance = kid_beside_floor(
                before.pictures[labels[0] == label],
                after.pictures[labels[1] == label],
                extractor,
                seed=derive_seed(seed, "kid", name, one),
                comparisons=len(classifier.classes),
            )
            bound = bounds.get(one)
            told = None if bound is None else judge(fractions[1], {one: bound})
            changes.append(ClassChange(one, fractions[0][one], fractions[1][one], bound, told, distance))
        accuracy = None if drawn else getattr(classifier, "accuracy", None)
        return JudgeEvaluation(
            name=name,
            changes=tuple(changes),
            judgement=judge(fractions[1], bounds),
            accuracy=accuracy if isinstance(accuracy, Fraction) else None,
            drawn=drawn,
        )

    read = classifier(before.pictures), classifier(after.pictures)
    if not constraint.by_label:
        return [counted(classifier.name, read, constraint.bounds)]
    if before.labels is None or after.labels is None:
        raise TargetError(f"bounds by label are on flows that tell what they draw; {classifier.name} has to read these")
    drawn = counted(f"drawn {classifier.name}", (before.labels, after.labels), constraint.bounds, drawn=True)
    return [drawn, counted(classifier.name, read, {})]


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
                f"{one.name}: samples of {', '.join(moved)} differ from the base's by more than chance makes two sets "
                "of the same pictures differ."
            )
    for which, found in zip(("base", "steered"), health, strict=True):
        broken = round((1 - found.finite) * found.n)
        if broken:
            notes.append(
                f"{broken:,} of {found.n:,} samples of the {which} flow hold values that are no numbers; judges saw "
                "black pictures in their place."
            )
    if not health[0].sound:
        error = finite(health[0].round_trip_error or 0.0)
        notes.append(
            f"The base flow itself is not sound: {health[0].finite:.0%} of its samples are finite, and its inverse "
            f"leaves an error of {'no finite size' if error is None else f'up to {error:.2g}'}. The steered flow is "
            "held against that."
        )
    return notes
