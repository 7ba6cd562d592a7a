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

from evidence.classifier import TrainedClassifier, check_accuracy, train_classifier
from evidence.fractions import fraction_of

__all__ = ["FAINTEST", "faded", "train_on_samples"]

FAINTEST = 0.1
"""Contrast of the faintest samples that still count as their class."""
GRAIN = 0.5
"""Largest range of the noise that samples fade into, of the whole range of a pixel."""
COARSEST = 4.0
"""Largest range of noise with nothing in it, which is then cut off at black and white: most of its pixels are either.
A diffusion model that has learnt noise shows it as strong as that, and a judge that never saw it takes it for a class.
"""
BLANK = 0.5
"""Pictures of nothing for each sample of a class, of fine and of coarse noise alike. More would make a judge less sure
of clear samples too."""
FINE, COARSE = (0.0, GRAIN), (GRAIN, COARSEST)


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
        some = own[: max(1, round(BLANK * len(own)))]
        blank = [faded(some, generator, faintest=0.0, clearest=0.0, grain=grain) for grain in (FINE, COARSE)]
        sets[one] = torch.cat([own, faded(own, generator), *blank])  # blank ones are in each class alike: undecided
    judge = train_classifier(sets, seed=seed, name=name)
    right = judge(fresh[0]) == fresh[1]
    recall = {one: float(right[fresh[1] == label].double().mean()) for label, one in enumerate(classes)}
    accuracy = fraction_of(int(right.sum()), len(right))
    check_accuracy(accuracy, len(classes), name)  # what it held out itself holds faded copies of what it learnt from
    return replace(judge, accuracy=accuracy, recall=recall)


def faded(
    images: Tensor,
    generator: torch.Generator,
    *,
    faintest: float = FAINTEST,
    clearest: float = 1.0,
    grain: tuple[float, float] = FINE,
) -> Tensor:
    """Each image mixed with noise around a grey of its own, at a contrast of its own.

    Args:
        images: (n, c, h, w) uint8.
        generator: of contrasts, greys and noise.
        faintest: least contrast that is left, in [0, 1].
        clearest: most of it.
        grain: least and largest range of the noise, of the whole range of a pixel.
    """
    n = (len(images), 1, 1, 1)
    contrast = faintest + (clearest - faintest) * torch.rand(n, generator=generator)
    grey = torch.rand(n, generator=generator)
    strength = grain[0] + (grain[1] - grain[0]) * torch.rand(n, generator=generator)
    noise = grey + strength * (torch.rand(images.shape, generator=generator) - 0.5)
    mixed = contrast * (images.cpu().float() / 255) + (1 - contrast) * noise
    return (mixed * 255).round().clamp(0, 255).to(torch.uint8)
