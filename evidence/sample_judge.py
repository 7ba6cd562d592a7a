"""A judge where no classifier is sent: it learns a model's classes from its own samples, and what is left of them.

What a half-forgotten class shows is a faded picture, grey where it was black. A judge that only ever saw clear ones
takes it for anything, most often for another class, and calls forgotten what everybody sees. So this one also learns
from samples that fade into noise, and to be undecided where nothing but noise is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from evidence.classifier import TrainedClassifier, train_classifier
from evidence.fractions import fraction_of

__all__ = ["FAINTEST", "faded", "train_on_samples"]

FAINTEST = 0.1
"""Contrast of the faintest samples that still count as their class."""
GRAIN = 0.5
"""Largest range of the noise that samples fade into, of the whole range of a pixel."""
BLANK = 0.25
"""Pictures of nothing, for each sample of a class."""


def train_on_samples(
    images: Tensor, labels: Tensor, fresh: tuple[Tensor, Tensor], classes: Sequence[str], *, seed: int, name: str
) -> TrainedClassifier:
    """Train a judge from samples of a model, each taken for the class that it was drawn under.

    Args:
        images: (n, c, h, w) uint8.
        labels: (n,) of them, as many of each class.
        fresh: samples and labels that its accuracy is measured on, and nothing else.
        classes: their names.
        seed: of the training.
        name: what a report calls it.

    Raises:
        InsufficientEvidenceError: the classes cannot be told apart.
    """
    generator = torch.Generator().manual_seed(seed)
    sets = {}
    for label, one in enumerate(classes):
        own = images[labels == label]
        nothing = own[: max(1, round(BLANK * len(own)))]  # faded all the way, and so for each class: undecided
        sets[one] = torch.cat([own, faded(own, generator), faded(nothing, generator, faintest=0.0, clearest=0.0)])
    judge = train_classifier(sets, seed=seed, name=name)
    right = judge(fresh[0]) == fresh[1]
    recall = {one: float(right[fresh[1] == label].double().mean()) for label, one in enumerate(classes)}
    return replace(judge, accuracy=fraction_of(int(right.sum()), len(right)), recall=recall)


def faded(images: Tensor, generator: torch.Generator, *, faintest: float = FAINTEST, clearest: float = 1.0) -> Tensor:
    """Each image mixed with noise around a grey of its own, at a contrast of its own.

    Args:
        images: (n, c, h, w) uint8.
        generator: of contrasts, greys and noise.
        faintest: least contrast that is left, in [0, 1].
        clearest: most of it.
    """
    n = (len(images), 1, 1, 1)
    contrast = faintest + (clearest - faintest) * torch.rand(n, generator=generator)
    grey, grain = torch.rand(n, generator=generator), GRAIN * torch.rand(n, generator=generator)
    noise = grey + grain * (torch.rand(images.shape, generator=generator) - 0.5)
    mixed = contrast * (images.cpu().float() / 255) + (1 - contrast) * noise
    return (mixed * 255).round().clamp(0, 255).to(torch.uint8)
