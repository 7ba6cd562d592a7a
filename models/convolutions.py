"""The convolutions of a coupling net; their weights are set by `reset`, never by a global seed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.05
"""Standard deviation of the first two convolutions of a coupling net at initialisation."""
ZERO_CONV_GAIN = 3.0
"""A zero convolution's output is multiplied by exp(3 scale), so that its scale learns three times as fast."""


class Conv(nn.Module):
    """A convolution that keeps height and width, zero-padded."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))

    @torch.no_grad()
    def reset(self, generator: torch.Generator) -> None:
        """Start from N(0, 0.05^2) weights and no bias."""
        self.weight.copy_(torch.randn(self.weight.shape, generator=generator) * INIT_STD)
        self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


class UnpaddedConv(nn.Module):
    """The 3x3 convolution inside a zero convolution, whose padding its owner does."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h + 2, w + 2) -> (b, outputs, h, w)."""
        return F.conv2d(x, self.weight, self.bias)


class ZeroConv(nn.Module):
    """A 3x3 convolution that starts at zero; padded with ONES, so that it sees the border, and scaled by exp(3 s)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = UnpaddedConv(inputs, outputs)
        self.scale = nn.Parameter(torch.zeros(1, outputs, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(b, inputs, h, w) -> (b, outputs, h, w)."""
        padded = F.pad(x, (1, 1, 1, 1), value=1.0)  # (b, inputs, h + 2, w + 2)
        return as_tensor(self.conv(padded)) * torch.exp(self.scale * ZERO_CONV_GAIN)


def as_tensor(value: Any) -> Tensor:
    """Modules are untyped callables; this gives their one output its type."""
    return value  # type: ignore[no-any-return]  # a call of a module is Any
