"""The judge of Selective Amnesia: one call that draws from a model before and after and says what a judge sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from evidence.amnesia_records import AmnesiaEvaluation, Goal, Kept, Shown, drop_of, mean_of, share
from evidence.classifier import Classifier
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Fraction, fraction_of
from evidence.kid import LARGEST_SET, Extractor, Kid, kid_beside_floor, pca_extractor
from evidence.likelihood import derive_seed
from evidence.readings import NOTHING, Reading, read
from models.conditional import LabelledSampler

__all__ = ["BATCH", "evaluate_amnesia", "labels_in_turn", "looked_at", "samples_of"]

BATCH = 250
"""Samples drawn at once, whatever the memory: a batch has a seed of its own, so that it is part of what is drawn."""

Progress = Callable[[int, int], None]


def samples_of(
    model: LabelledSampler, labels: Tensor, *, seed: int, on_batch: Callable[[], None] = lambda: None
) -> Tensor:
    """Draw an image of each label.

    Args:
        model: drawn from, by its own way to sample.
        labels: int64 (n,).
        seed: of the latents: equal seeds give equal latents to models of one architecture.
        on_batch: called after every BATCH samples.

    Returns:
        uint8 (n, c, h, w), on the CPU.
    """
    parts = []
    for number, part in enumerate(torch.split(labels, BATCH)):
        generator = torch.Generator().manual_seed(derive_seed(seed, "batch", number))
        parts.append(model.sample(part, generator=generator).cpu())
        on_batch()
    return torch.cat(parts)


def labels_in_turn(labels: Sequence[int], n: int) -> Tensor:
    """n labels (n,), each as often as the others, but for a remainder."""
    return torch.tensor(labels, dtype=torch.int64)[torch.arange(n) % len(labels)]


def looked_at(reading: Reading, label: int, classes: int, confidence: float = CONFIDENCE) -> Shown:
    """What a judge of so many classes says of samples that were drawn under the condition `label`."""
    seen, answers = reading.seen, reading.probabilities
    n, hits = len(seen), torch.bincount(seen[seen != NOTHING], minlength=classes)
    shares = tuple(fraction_of(int(one), n, confidence=confidence) for one in hits)
    if answers is None:
        return Shown(shares, None, None, None)
    most = float(torch.tensor(float(classes)).log())
    entropy = -torch.xlogy(answers, answers).sum(1)
    return Shown(
        shares,
        mean_of(answers[:, label], 1.0, confidence=confidence),
        mean_of(entropy, most, confidence=confidence),
        share(seen == NOTHING, confidence),
    )


def evaluate_amnesia(
    base: LabelledSampler,
    changed: LabelledSampler,
    judge: Classifier,
    *,
    label: int,
    shows: Mapping[int, int] | None = None,
    names: Sequence[str] | None = None,
    image_shape: tuple[int, int, int],
    n_bits: int,
    samples: int,
    others: int,
    goal: Goal,
    replacement: int | None = None,
    confidence: float = CONFIDENCE,
    seed: int,
    independent: bool = True,
    extractor: Extractor | None = None,
    on_progress: Progress | None = None,
) -> AmnesiaEvaluation:
    """Judge a model that forgot a class by what it draws (arXiv 2305.10120, Sec. 5.1, Table 1).

    Samples of the two models are drawn from equal latents, so that what stays can be compared sample by sample; those
    of the distance are drawn apart from each other, as it needs.

    Args:
        base: the model before.
        changed: the model after.
        judge: who tells what samples show.
        label: of the forgotten class.
        shows: the judge's class of each label that is judged; None: its first classes are the model's, in their order,
            and further ones are what else it tells.
        names: of every label; the judge's names of what they show if None.
        image_shape: (c, h, w) of the samples.
        n_bits: bits a channel.
        samples: to draw of each model under the forgotten condition.
        others: to draw of each over all other classes, rounded up to as many of each.
        goal: what is asked.
        replacement: the class that is to be shown instead, if it is one of the model's.
        confidence: of each interval by itself.
        seed: of all samples; never one that the method drew from.
        independent: whether the judge learned from anything but samples of the base.
        extractor: features for the distance; principal components of both models' samples if None.
        on_progress: called with (step, total) after every batch.

    Raises:
        TargetError: nothing is to be drawn, or the judge does not tell the model's classes.
    """
    shows = dict(shows if shows is not None else {one: one for one in range(base.n_classes)})
    kept = [one for one in shows if one != label]
    told = len(judge.classes)
    if (
        samples < 1
        or others < 1
        or not kept
        or label not in shows
        or any(not 0 <= one < told for one in shows.values())
    ):
        raise TargetError(
            f"there is nothing to judge in {samples} samples of class {label} and {others} of {len(kept)} others by a "
            f"judge of {told} classes"
        )
    others = -(-others // len(kept)) * len(kept)
    staying, forgotten = labels_in_turn(kept, others), torch.full((samples,), label, dtype=torch.int64)
    expected = torch.tensor([shows[one] for one in staying.tolist()])
    apart = labels_in_turn(kept, min(others, LARGEST_SET))
    steps = _Steps(on_progress, 2 * _batches(forgotten) + 2 * _batches(staying) + _batches(apart))

    def drawn(model: LabelledSampler, labels: Tensor, which: str) -> Tensor:
        return samples_of(model, labels, seed=derive_seed(seed, "evaluation", which), on_batch=steps.advance)

    shown = [
        looked_at(read(judge, drawn(model, forgotten, "forgotten")), shows[label], told, confidence)
        for model in (base, changed)
    ]
    pictures = [drawn(model, staying, "others") for model in (base, changed)]
    right = [read(judge, some).seen == expected for some in pictures]
    return AmnesiaEvaluation(
        label=shows[label],
        replacement=None if replacement is None else shows.get(replacement),
        classes=tuple(judge.classes),
        judge=judge.name,
        accuracy=_accuracy(judge),
        independent=independent,
        goal=goal,
        before=shown[0],
        after=shown[1],
        kept=tuple(
            Kept(
                names[one] if names else judge.classes[shows[one]],
                *(share(some[staying == one], confidence) for some in right),
            )
            for one in kept
        ),
        drop=drop_of(right[0], right[1], confidence=confidence),
        kid=_distance(pictures[0][: len(apart)], drawn(changed, apart, "apart"), extractor, seed),
        image_shape=image_shape,
        n_bits=n_bits,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


def _distance(before: Tensor, after: Tensor, extractor: Extractor | None, seed: int) -> Kid:
    features = extractor or pca_extractor(torch.cat([before, after]))
    return kid_beside_floor(before, after, features, seed=derive_seed(seed, "kid"))


def _accuracy(judge: Classifier) -> Fraction | None:
    found = getattr(judge, "accuracy", None)
    return found if isinstance(found, Fraction) else None


def _batches(labels: Tensor) -> int:
    return -(-len(labels) // BATCH)


class _Steps:
    """Counts batches for the caller's progress bar."""

    def __init__(self, report: Progress | None, total: int) -> None:
        self._report, self._total, self._step = report, total, 0

    def advance(self) -> None:
        self._step += 1
        if self._report is not None:
            self._report(self._step, self._total)
