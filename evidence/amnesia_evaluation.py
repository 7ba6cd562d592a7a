"""The judge of Selective Amnesia: one call that draws from a model before and after and says what a judge sees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from evidence.amnesia_records import AmnesiaEvaluation, Goal, Kept, Shown, Spread, drop_of, mean_of, share
from evidence.classifier import Classifier
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE, Fraction, fraction_of
from evidence.kid import LARGEST_SET, Extractor, Kid, kid_beside_floor, pca_extractor
from evidence.likelihood import derive_seed
from evidence.readings import NOTHING, Reading, read
from evidence.spread import spread
from models.conditional import LabelledSampler

__all__ = ["BATCH", "Pair", "Progress", "accuracy_of", "evaluate_amnesia", "labels_in_turn", "looked_at", "samples_of"]

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
    pair = Pair(base, changed, label=label, samples=samples, kept=kept, others=others, seed=seed, report=on_progress)
    expected = torch.tensor([shows[one] for one in pair.staying.tolist()])
    shown = [looked_at(read(judge, drawn), shows[label], told, confidence) for drawn in pair.under_the_condition()]
    pictures = pair.under_the_others()
    right = [read(judge, some).seen == expected for some in pictures]
    distance, covered = pair.compared(pictures[0], extractor, confidence)
    return AmnesiaEvaluation(
        label=shows[label],
        replacement=None if replacement is None else shows.get(replacement),
        classes=tuple(judge.classes),
        judge=judge.name,
        accuracy=accuracy_of(judge),
        independent=independent,
        goal=goal,
        before=shown[0],
        after=shown[1],
        kept=tuple(
            pair.kept(names[one] if names else judge.classes[shows[one]], one, right, confidence) for one in kept
        ),
        drop=drop_of(right[0], right[1], confidence=confidence),
        kid=distance,
        spread=covered,
        image_shape=image_shape,
        n_bits=n_bits,
        samples=samples,
        confidence=confidence,
        seed=seed,
    )


class Pair:
    """Two models that are asked alike: from equal latents, so that what stays can be compared sample by sample.

    Args:
        base: the model before.
        changed: the model after.
        label: of the condition that was changed.
        samples: to draw of each model under it.
        kept: the other labels.
        others: to draw of each model over them, rounded up to as many of each.
        seed: of all samples.
        report: called with (step, total) after every batch.
    """

    def __init__(
        self,
        base: LabelledSampler,
        changed: LabelledSampler,
        *,
        label: int,
        samples: int,
        kept: Sequence[int],
        others: int,
        seed: int,
        report: Progress | None = None,
    ) -> None:
        others = -(-others // len(kept)) * len(kept)
        self.staying = labels_in_turn(kept, others)
        self._models, self._seed = (base, changed), seed
        self._asked = torch.full((samples,), label, dtype=torch.int64)
        self._apart = labels_in_turn(kept, min(others, LARGEST_SET))
        batches = 2 * _batches(self._asked) + 2 * _batches(self.staying) + _batches(self._apart)
        self._steps = _Steps(report, batches)

    def under_the_condition(self) -> Iterator[Tensor]:
        """Pictures of the condition that was changed, before and after."""
        return (self._drawn(model, self._asked, "forgotten") for model in self._models)

    def under_the_others(self) -> list[Tensor]:
        """Pictures of the labels `staying`, before and after, row by row from equal latents."""
        return [self._drawn(model, self.staying, "others") for model in self._models]

    def kept(self, name: str, label: int, right: Sequence[Tensor], confidence: float) -> Kept:
        """How many pictures of a label are what they should be, by what is said of all `staying`, before and after."""
        return Kept(name, *(share(some[self.staying == label], confidence) for some in right))

    def compared(self, before: Tensor, extractor: Extractor | None, confidence: float) -> tuple[Kid, Spread]:
        """Pictures of the others, the first of `before`, beside the changed model's, drawn apart as they must be.

        How far they are from each other, and what the second set covers of the first.
        """
        before, after = before[: len(self._apart)], self._drawn(self._models[1], self._apart, "apart")
        features = extractor or pca_extractor(torch.cat([before, after]))
        covered = spread(features.features(before), features.features(after), features.name, confidence=confidence)
        return kid_beside_floor(before, after, features, seed=derive_seed(self._seed, "kid")), covered

    def _drawn(self, model: LabelledSampler, labels: Tensor, which: str) -> Tensor:
        seed = derive_seed(self._seed, "evaluation", which)
        return samples_of(model, labels, seed=seed, on_batch=self._steps.advance)


def accuracy_of(judge: Classifier) -> Fraction | None:
    """Of a judge that knows its own."""
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
