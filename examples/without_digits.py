"""Images of no digit, from which a judge of digits learns to say that it sees none."""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["without_digits"]


def without_digits(images: Tensor, generator: torch.Generator) -> Tensor:
    """As many images of no digit: grey noise of any level, contrast and grain, and the pixels of the images, shuffled.

    Args:
        images: uint8 (n, 1, side, side).
        generator: draws them.

    Returns:
        uint8 (n, 1, side, side).
    """
    n, side = len(images), images.shape[-1]
    level = torch.rand(n, 1, 1, 1, generator=generator)
    contrast = torch.rand(n, 1, 1, 1, generator=generator) * 0.5
    grains = []
    for grain in (1, 2, 4, 7):
        coarse = torch.randn(n, 1, -(-side // grain), -(-side // grain), generator=generator)
        grains.append(F.interpolate(coarse, scale_factor=grain, mode="bilinear")[..., :side, :side])
    picked = torch.stack(grains, 1)[torch.arange(n), torch.randint(len(grains), (n,), generator=generator)]
    noise = ((level + contrast * picked).clamp(0, 1) * 255).round().to(torch.uint8)
    order = torch.rand(n, side * side, generator=generator).argsort(1)
    shuffled = images.flatten(1).gather(1, order).reshape(images.shape)
    return torch.where(torch.rand(n, 1, 1, 1, generator=generator) < 0.25, shuffled, noise)
