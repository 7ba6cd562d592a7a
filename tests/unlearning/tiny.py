"""Tiny flows and tiny sets of images, so that a whole taming run takes a second."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.glow import Glow
from models.images import dequantize, quantize
from models.tarflow import TarFlow
from models.training import TrainingRecipe, fit_flow

N_BITS = 5


def blobs(n: int, seed: int, size: int = 8) -> Tensor:
    """n grey images of one soft blob each, uint8 (n, 1, size, size)."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.rand(n, 2, 1, 1, generator=generator) * (size - 3) + 1
    width = torch.rand(n, 1, 1, generator=generator) * 2 + 1.5
    axis = torch.arange(size, dtype=torch.float32)
    distance = (axis[None, :, None] - centre[:, 0]) ** 2 + (axis[None, None, :] - centre[:, 1]) ** 2
    image = 40 + 180 * torch.exp(-distance / (2 * width**2))
    return (image + 4 * torch.randn(n, size, size, generator=generator)).clamp(0, 255).to(torch.uint8)[:, None]


def trained_flow() -> Glow:
    """A Glow of two scales, trained for a moment on blobs."""
    generator = torch.Generator().manual_seed(0)
    flow = Glow((1, 8, 8), N_BITS, n_block=2, n_flow=2, hidden=16, affine=True, generator=generator)
    images = blobs(256, 1)
    flow.initialize(dequantize(quantize(images, N_BITS), N_BITS, generator))
    fit_flow(flow, images, TrainingRecipe(steps=120, learning_rate=3e-3), n_bits=N_BITS, generator=generator)
    return flow


class DiagonalGaussian(nn.Module):
    """A foreign flow: only log_prob(x) and sample(n), no split, no generator."""

    def __init__(self, size: int = 64) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(size))
        self.log_sd = nn.Parameter(torch.full((size,), -1.5))

    def log_prob(self, x: Tensor) -> Tensor:
        """(b, 1, 8, 8) -> (b,) nats."""
        return (
            torch.distributions.Normal(self.mean, self.log_sd.exp(), validate_args=False).log_prob(x.flatten(1)).sum(1)
        )

    def sample(self, n: int) -> Tensor:
        """(n, 1, 8, 8)."""
        return (torch.randn(n, 64) * self.log_sd.exp() + self.mean).detach().reshape(n, 1, 8, 8)


def labelled_tarflow() -> TarFlow:
    """An untrained TarFlow of three classes, no part of it the identity."""
    sizes = {"patch_size": 2, "width": 16, "n_block": 2, "n_layer": 1}
    flow = TarFlow((1, 8, 8), 8, n_classes=3, generator=torch.Generator().manual_seed(0), **sizes)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draws))
    return flow
