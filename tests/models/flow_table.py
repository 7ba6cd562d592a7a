"""The table of flows that the law tests (`tests/models/test_laws.py`) run over; a new flow joins by one entry.

To join, add an entry to `FLOWS` for each variant of a flow that has code of its own:

    "myflow-affine": entry(MyFlow, (1, 4, 4), n_block=2, affine=True),

which builds `MyFlow((1, 4, 4), 5, n_block=2, affine=True, generator=...)`, lets it see a batch where it has an
`initialize(x)`, and moves every parameter at random, so that no part of it is the identity. Keep it tiny: the Jacobian
of each is computed by autograd. All else is optional and named: `inputs` where a flow's inputs are not uniform in
[-0.5, 0.5), `base` where its latents are not standard normal, `scale` where it cannot bear to be moved that far. A flow
over vectors goes to `VECTORS`: it obeys the same laws, and no checkpoint holds it. An image that is not square has
"oblong" in its name.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from models.autoregressive import IAF, MAF
from models.class_prior import ClassPriorFlow
from models.glow import Glow
from models.realnvp import RealNVP
from models.tarflow import TarFlow

Latents = Tensor | list[Tensor]


class LawfulFlow(Protocol):
    """What the laws ask: a `CheckpointedFlow` that is a module, with its two directions."""

    image_shape: tuple[int, ...]

    def __call__(self, x: Tensor) -> tuple[Latents, Tensor]:
        """`forward`: x (b, ...) to one latent or a list of them, and log|det| (b,) in nats."""
        ...

    def inverse(self, latents: Any) -> Tensor:
        """What `forward` gave back to x."""
        ...

    def log_prob(self, x: Tensor) -> Tensor: ...
    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor: ...
    def parameters(self) -> Any: ...


def generator(seed: int = 0) -> torch.Generator:
    """A seeded generator."""
    return torch.Generator().manual_seed(seed)


def images(flow: Any, n: int, seed: int = 0) -> Tensor:
    """n inputs, uniform in [-0.5, 0.5), of the flow's shape and dtype; any flow over images takes them."""
    weight = next(flow.parameters())
    return (torch.rand(n, *flow.image_shape, generator=generator(seed)) - 0.5).to(weight)


def perturbed(flow: Any, seed: int = 0, scale: float = 0.03) -> Any:
    """The flow after its data-dependent start, if it has one, with every parameter moved at random."""
    draws = generator(seed + 1)
    if hasattr(flow, "initialize"):
        flow.initialize(images(flow, 32, seed))
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draws) * scale)
    return flow


def standard_normal(flow: Any, latents: Sequence[Tensor]) -> Tensor:
    """log N(z; 0, I) of the latents of a batch, (b,) nats."""
    flat = torch.cat([z.flatten(1) for z in latents], dim=1)  # (b, d)
    return -0.5 * (flat.square() + math.log(2 * math.pi)).sum(dim=1)


def class_priors(flow: Any, latents: Sequence[Tensor]) -> Tensor:
    """log of the mixture of a flow's class priors, (b,) nats."""
    density: Tensor = flow.prior_log_prob(latents[0])
    return density


@dataclass(frozen=True)
class Entry:
    """One flow of the table; calling it makes the flow anew, the same each time."""

    make: Callable[[], Any]
    inputs: Callable[..., Tensor] = images
    """(flow, n, seed) -> n inputs."""
    base: Callable[[Any, Sequence[Tensor]], Tensor] = standard_normal
    """(flow, list of latents) -> log-density of the latents, (b,) nats."""

    def __call__(self) -> Any:
        return self.make()


def entry(
    family: Callable[..., Any],
    shape: tuple[int, ...],
    *,
    scale: float = 0.03,
    inputs: Callable[..., Tensor] = images,
    base: Callable[[Any, Sequence[Tensor]], Tensor] = standard_normal,
    **architecture: Any,
) -> Entry:
    """A flow of 5 bits whose every parameter was moved at random by `scale`."""

    def make() -> Any:
        return perturbed(family(shape, 5, generator=generator(), **architecture), scale=scale)

    return Entry(make, inputs, base)


def _glow(shape: tuple[int, int, int], **architecture: Any) -> Entry:
    return entry(Glow, shape, **{"n_block": 2, "n_flow": 2, "hidden": 8, **architecture})


FLOWS: dict[str, Entry] = {
    "additive-lu": _glow((1, 4, 4)),
    "affine-lu": _glow((1, 4, 4), affine=True),
    "additive-plain": _glow((1, 4, 4), lu=False),
    "affine-plain": _glow((1, 4, 4), affine=True, lu=False),
    "mixed-convolutions": _glow((1, 4, 4), lu=[False, True]),
    "one-block": _glow((1, 4, 4), n_block=1),
    "three-blocks": _glow((1, 8, 8), n_block=3, affine=True),
    "rgb": _glow((3, 4, 4), affine=True),
    "two-channels-oblong": _glow((2, 8, 4)),
    "realnvp": entry(RealNVP, (1, 4, 4), n_block=2, n_flow=2, hidden=8),
    "realnvp-rgb": entry(RealNVP, (3, 4, 4), n_block=2, n_flow=2, hidden=8, depth=0),
    "realnvp-oblong": entry(RealNVP, (2, 2, 4), n_block=1, n_flow=3, hidden=8, depth=2),
    "maf": entry(MAF, (1, 4, 4), n_flow=3, hidden=20),
    "maf-rgb": entry(MAF, (3, 4, 4), n_flow=2, hidden=24, depth=2),  # fewer units than dimensions
    "maf-one-layer-oblong": entry(MAF, (2, 2, 4), n_flow=1, hidden=20),
    "iaf": entry(IAF, (1, 4, 4), n_flow=2, hidden=20, depth=2),
    "iaf-rgb": entry(IAF, (3, 2, 2), n_flow=3, hidden=7),
    "tarflow": entry(TarFlow, (1, 4, 4), patch_size=2, width=8, n_block=3, n_layer=1, noise_std=0.05),
    "tarflow-classes-rgb": entry(
        TarFlow, (3, 4, 4), patch_size=2, width=8, head_width=4, n_block=2, n_layer=2, noise_std=0.05, n_classes=3
    ),
    "tarflow-dequantised-oblong": entry(TarFlow, (2, 2, 4), patch_size=1, width=8, n_block=1, n_layer=1, noise_std=0.0),
    "class-prior": entry(
        ClassPriorFlow, (1, 4, 4), patch_size=2, width=8, n_block=3, n_layer=1, n_classes=3, base=class_priors
    ),
    "class-prior-dequantised-one-block": entry(
        ClassPriorFlow, (1, 4, 4), patch_size=2, width=8, n_block=1, noise_std=0.0, n_classes=2, base=class_priors
    ),
}
"""Flows over images."""

VECTORS: dict[str, Entry] = {
    "vector-realnvp": entry(RealNVP, (5,), n_block=2, n_flow=2, hidden=8),
    "vector-realnvp-one-block": entry(RealNVP, (4,), n_block=1, n_flow=3, hidden=8),
    "vector-maf": entry(MAF, (5,), n_flow=2, hidden=8, depth=2),
    "vector-maf-two-dimensions": entry(MAF, (2,), n_flow=2, hidden=4),
    "vector-iaf": entry(IAF, (5,), n_flow=2, hidden=8, depth=2),
}
"""Flows over vectors, image_shape (d,)."""


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a module's state."""
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
