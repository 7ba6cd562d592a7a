"""The table of flows that the law tests run over; a new flow joins by one entry."""

from collections.abc import Callable

import torch
from torch import nn

from models.glow import Glow


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def perturbed(flow: Glow, seed: int = 0, scale: float = 0.03) -> Glow:
    """The flow with every parameter moved at random, so that no part of it is the identity."""
    draws = generator(seed + 1)
    flow.initialize(images(flow, 32, seed))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * scale)
    return flow


def images(flow: Glow, n: int, seed: int = 0) -> torch.Tensor:
    """n images in [-0.5, 0.5) of the flow's shape and dtype."""
    weight = next(flow.parameters())
    return (torch.rand(n, *flow.image_shape, generator=generator(seed)) - 0.5).to(weight)


def _glow(shape: tuple[int, int, int], **architecture: object) -> Callable[[], Glow]:
    def make() -> Glow:
        sizes = {"n_block": 2, "n_flow": 2, "hidden": 8, **architecture}
        return perturbed(Glow(shape, 5, generator=generator(), **sizes))  # type: ignore[arg-type]

    return make


FLOWS: dict[str, Callable[[], Glow]] = {
    "additive-lu": _glow((1, 4, 4)),
    "affine-lu": _glow((1, 4, 4), affine=True),
    "additive-plain": _glow((1, 4, 4), lu=False),
    "affine-plain": _glow((1, 4, 4), affine=True, lu=False),
    "mixed-convolutions": _glow((1, 4, 4), lu=[False, True]),
    "one-block": _glow((1, 4, 4), n_block=1),
    "three-blocks": _glow((1, 8, 8), n_block=3, affine=True),
    "rgb": _glow((3, 4, 4), affine=True),
    "two-channels-oblong": _glow((2, 8, 4)),
}


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
