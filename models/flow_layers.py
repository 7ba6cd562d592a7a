"""Parts that RealNVP, MAF and IAF share: layers that start from a passed generator, and checks of what they take."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import check_image, check_ranges
from models.errors import ArchitectureError

MAX_VECTOR = 4096
"""Dimensions."""
LEAST_DEVIATION = 0.05
"""In units of x: a channel or pixel that hardly varies is not blown up by more than one over this at the start."""


class Norm(nn.Module):
    """y = (x + loc) exp(log_scale), one pair a channel, or a dimension of a vector; set from data by `initialize`."""

    def __init__(self, channels: int, *, spatial: bool) -> None:
        super().__init__()
        shape = (1, channels, 1, 1) if spatial else (1, channels)
        self.loc = nn.Parameter(torch.zeros(shape))
        self.log_scale = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, c, h, w) or (b, d) -> the same shape, and log|det|, a scalar that the batch shares."""
        return (x + self.loc) * self.log_scale.exp(), self.log_scale.sum() * math.prod(x.shape[2:])

    def inverse(self, y: Tensor) -> Tensor:
        """The exact inverse of `forward`'s map."""
        return y * torch.exp(-self.log_scale) - self.loc

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set both so that each channel of y has mean 0 and deviation 1 on x, which has 2 rows or more."""
        over = [axis for axis in range(x.ndim) if axis != 1]
        self.loc.copy_(-x.mean(dim=over, keepdim=True))
        self.log_scale.copy_(-x.std(dim=over, keepdim=True).clamp(min=LEAST_DEVIATION).log())


class Linear(nn.Module):
    """x W^T + b, at zero until `reset`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator, gain: float = 2.0) -> None:
        """Start from N(0, gain / inputs) weights and no bias (He et al., 2015: 2 for ReLU)."""
        deviation = math.sqrt(gain / self.weight[0].numel())
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * deviation)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs) -> (b, outputs)."""
        return F.linear(x, self.weight, self.bias)


class Conv(Linear):
    """The same as a 3x3 convolution, zero-padded."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        return F.conv2d(x, self.weight, self.bias, padding=1)


def log_normal(latents: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, I) summed over a batch of latents, each (b, ...): (b,) nats."""
    flat = torch.cat([z.flatten(1) for z in latents], dim=1)  # (b, d)
    return -0.5 * (flat.square().sum(dim=1) + flat.shape[1] * math.log(2 * math.pi))


def check_input(x: Tensor, image_shape: tuple[int, ...]) -> None:
    """Refuse a batch of another shape than the flow's.

    Raises:
        ArchitectureError: with both shapes.
    """
    if tuple(x.shape[1:]) != image_shape:
        what = "vectors" if len(image_shape) == 1 else "images"
        raise ArchitectureError(f"this flow takes {what} of shape {image_shape}, not {tuple(x.shape[1:])}")


def check_shape(image_shape: Sequence[int], n_bits: int) -> tuple[int, ...]:
    """Refuse what is neither an image's shape, (c, h, w), nor a vector's, (d,); the shape as a tuple.

    Raises:
        ArchitectureError: with the value.
    """
    if len(image_shape) != 1:
        return check_image(image_shape, n_bits)
    check_ranges({"n_bits": (n_bits, 1, 8), "dimensions": (image_shape[0], 2, MAX_VECTOR)})
    return (image_shape[0],)
