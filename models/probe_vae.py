"""Whether weights that load also make a VAE that a job can use, asked of its own samples.

What decides is far from what any training ends at. A model that says "half white" of every pixel, without looking,
costs d log 2 nats an image; a VAE that has learnt anything costs less on its own samples, and much more on noise.
"""

import math

import torch
from torch import Tensor

from models.errors import ModelError, UnusableModelError
from models.vae import ConditionalVAE

SEED = 0
FEWEST_IMAGES, MOST_IMAGES = 8, 64
"""Drawn: one of each class, within these."""
MOST_COST = 2.0
"""Nats of the negative ELBO of the samples, in units of d log 2, beyond which encoder and decoder are strangers."""
LEAST_APART = 0.06
"""In the same unit, what noise costs above samples. Fresh weights reach .05, a trained VAE of digits goes beyond 1."""
MOST_EXCESS = 0.1
"""Nats a dimension by which samples may cost more than uniform noise."""
SAME = 1
"""Levels of 8 bits by which two images may differ and count as one."""


@torch.no_grad()
def probe_vae(model: ConditionalVAE) -> list[str]:
    """Draw a few images of classes and hold their bound against that of noise. The seed is fixed.

    Returns:
        Warnings: what is suspicious and may yet be right; most often none.

    Raises:
        UnusableModelError: the bound of the samples is not finite, or far above that of noise or of no model at all;
            or all samples are one image.
    """
    generator = torch.Generator().manual_seed(SEED)
    count = max(FEWEST_IMAGES, min(MOST_IMAGES, model.n_classes))
    labels = torch.arange(count) % model.n_classes
    try:
        samples = model.sample(labels, generator=generator)  # (n, c, h, w)
        noise = torch.randint(256, samples.shape, generator=generator).to(torch.uint8)
        own, other = _cost(model, samples, labels), _cost(model, noise, labels)
    except ModelError as error:  # the model's own refusal of a NaN on the way
        raise UnusableModelError(f"the VAE cannot read its own samples: {error}") from error
    if not math.isfinite(own):
        raise UnusableModelError(
            "the bound of the VAE's own samples is not finite in float32: a weight is far too large; use an earlier "
            "checkpoint"
        )
    if _alike(samples, samples[:1]):
        raise UnusableModelError(
            f"all of {count} samples of the VAE are the same image: neither the latent nor the class matters; train "
            "it, or use a later checkpoint"
        )
    dims = math.prod(model.image_shape)
    nothing = dims * math.log(2)
    if own > other + MOST_EXCESS * dims or own > MOST_COST * nothing:
        raise UnusableModelError(
            f"the VAE's own samples cost {own:,.0f} nats an image, uniform noise {other:,.0f}, and {nothing:,.0f} a "
            "model that knows nothing: encoder and decoder do not belong together; use an earlier checkpoint"
        )
    warnings = []
    if other - own < LEAST_APART * nothing:
        warnings.append(
            f"the VAE's own samples cost {own:,.0f} nats an image and uniform noise {other:,.0f}: it is hardly trained"
        )
    if model.n_classes > 1 and _classes_are_alike(model, generator):
        warnings.append("one latent gives the same image for every class: the classes make no difference")
    return warnings


def _cost(model: ConditionalVAE, images: Tensor, labels: Tensor) -> float:
    """Median of the negative ELBO in nats, where NaN and infinity count as largest."""
    generator = torch.Generator().manual_seed(SEED)
    x = model.encode(images, generator=generator)
    losses = model.losses(x, labels, model.draw(len(x), generator=generator))
    return float(losses.nan_to_num(math.inf, math.inf, math.inf).median())


def _classes_are_alike(model: ConditionalVAE, generator: torch.Generator) -> bool:
    """Whether a latent gives the same image whatever the class."""
    count = min(MOST_IMAGES, model.n_classes)
    (z,) = model.draw(1, generator=generator)
    shared = z.expand(count, -1).to(next(model.parameters()).device)
    images = model.images(model.decode(shared, torch.arange(count)))
    return _alike(images, images[:1])


def _alike(images: Tensor, first: Tensor) -> bool:
    """Whether all uint8 images are that one, but for a level."""
    return int((images.int() - first.int()).abs().max()) <= SAME
