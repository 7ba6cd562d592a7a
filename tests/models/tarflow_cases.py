"""Small TarFlows and inputs that the tests of the model, its samplers and its import share."""

from __future__ import annotations

import torch
from torch import Tensor

from models.tarflow import TarFlow
from tests.models.flow_table import generator, perturbed

SHAPE = (1, 8, 8)


def small(scale: float = 0.06, **architecture: object) -> TarFlow:
    """A flow of 16 tokens of 4 values, each of its parameters moved at random."""
    sizes = {"patch_size": 2, "width": 16, "head_width": 8, "n_block": 3, "n_layer": 2, "noise_std": 0.05}
    flow = TarFlow(SHAPE, 8, generator=generator(), **(sizes | architecture))  # type: ignore[arg-type]  # mixed values
    moved = perturbed(flow, scale=scale)
    assert isinstance(moved, TarFlow)
    return moved.eval()


def noisy_images(n: int, seed: int = 0) -> Tensor:
    """n inputs of `small`."""
    return torch.rand(n, *SHAPE, generator=generator(seed)) - 0.5


def latents(n: int, seed: int = 0) -> Tensor:
    """n standard normal latents of `small`."""
    return torch.randn(n, 16, 4, generator=generator(seed))
