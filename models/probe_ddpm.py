"""Whether weights that load also make a diffusion model of classes that a job can use, asked of its own samples.

What decides is how much of the noise in noisy samples it finds, against a network that answers 0 throughout: that one
costs 1 in this unit, and so does a model of fresh weights, whose last layer is zero. A trained one costs a fraction.
"""

import contextlib
import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from models.conditional import ClassConditional, Draws, GuidedConditional, Sampling
from models.diffusion import Diffusion
from models.errors import UnusableModelError

SEED = 0
IMAGES = 4
"""Drawn, of the first classes; few, since a network of 35 M parameters takes a third of a second an image and step."""
STEPS = 4
"""Of the sampler, without guidance: the samples are rough, and their noise is as easily told."""
TIMESTEPS = 3
"""At which each sample is made noisy, spread over the range."""
HARDLY = 0.9
"""Squared error over that of answering 0, from which on a model is hardly trained. After 300 steps on digits: .1"""
MOST = 2.0
"""The same, from which on it answers something else than is asked of it."""
SAME = 1
"""Levels of 8 bits by which two images may differ and count as one."""
APART = 1e-4
"""Least difference, relative to the answer, that a class makes where classes matter."""


class ClassDiffusion(ClassConditional, GuidedConditional, Protocol):
    """A diffusion model over classes."""

    diffusion: Diffusion


@torch.no_grad()
def probe_ddpm(model: ClassDiffusion) -> list[str]:
    """Draw a few images of classes in a few steps, and hold what the network says of them against saying nothing.

    The seed is fixed; about 50 images go through the network once.

    Returns:
        Warnings: what is suspicious and may yet be right; most often none.

    Raises:
        UnusableModelError: samples or losses are not finite, all samples are one image, or the error is far above
            that of answering 0.
    """
    generator = torch.Generator().manual_seed(SEED)
    labels = torch.arange(IMAGES) % model.n_classes
    with _drawing(model, Sampling(min(STEPS, model.terms), 1.0)):
        x = model.generate(labels, generator=generator)  # (n, ...)
    if not bool(torch.isfinite(x).all()):
        raise UnusableModelError(
            "the model's own samples are not finite in float32: a weight is far too large; use an earlier checkpoint"
        )
    images = model.images(x)
    if int((images.int() - images[:1].int()).abs().max()) <= SAME:
        raise UnusableModelError(
            f"all of {len(images)} samples of the model are the same image: neither the noise nor the class matters; "
            "use an earlier checkpoint"
        )
    rows = torch.arange(IMAGES).repeat(TIMESTEPS)
    draws = tuple(part.to(x.device) for part in model.draw_stratified(len(rows), generator=generator))
    x, labels = model.encode(images, generator=generator)[rows], labels[rows]
    told, untold = _share(model, x, labels, draws), _share(model, x, torch.full_like(labels, -1), draws)
    if not math.isfinite(told):
        raise UnusableModelError(
            "the loss of the model's own samples is not finite in float32: a weight is far too large; use an earlier "
            "checkpoint"
        )
    if told > MOST:
        raise UnusableModelError(
            f"what the model says of its own noisy samples is {told:.1f} times as far off as saying nothing: it was "
            f"trained to predict something else than {model.diffusion.config['prediction_type']!r}, on images of "
            "another scale, or is damaged; state the prediction type that it was trained with, or use another "
            "checkpoint"
        )
    warnings = []
    if told > HARDLY:
        warnings.append(f"the model is hardly trained: its error is {told:.2f} of that of saying nothing")
    elif not untold <= HARDLY:
        warnings.append(
            f"without a class the model's error is {untold:.2f} of that of saying nothing, with one {told:.2f}: it was "
            "hardly trained without classes, and guidance counts on it; draw at guidance_scale 1"
        )
    if told <= HARDLY and _classes_are_alike(model, x[:1], draws):
        warnings.append("one noisy image gives the same answer for every class: the classes make no difference")
    return warnings


def _share(model: ClassDiffusion, x: Tensor, labels: Tensor, draws: Draws) -> float:
    """The squared error of all rows over that of answering 0."""
    nothing = model.diffusion.target(x, *draws).square().sum()
    return float(model.losses(x, labels, draws).sum() / nothing)


def _classes_are_alike(model: ClassDiffusion, x: Tensor, draws: Draws) -> bool:
    """Whether the loss of one noisy image is the same for the first classes and for none."""
    labels = torch.arange(-1, min(IMAGES, model.n_classes))
    steps, noise = (part[len(part) // 2 :][:1].repeat(len(labels), *[1] * (part.ndim - 1)) for part in draws)
    losses = model.losses(x.expand(len(labels), *x.shape[1:]), labels, (steps, noise))
    return float(losses.max() - losses.min()) <= APART * float(losses.max())


@contextlib.contextmanager
def _drawing(model: ClassDiffusion, sampling: Sampling) -> Iterator[None]:
    """While this lasts, the model draws so."""
    before = model.sampling
    model.sampling = sampling
    try:
        yield
    finally:
        model.sampling = before
