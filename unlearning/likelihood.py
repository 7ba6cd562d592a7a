"""Likelihoods as the taming methods read them: nll in nats on named noise, in batches, and the statistics over D_R."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.images import evaluation_batch, flow_input
from models.protocol import Density
from unlearning.errors import DivergedError


@dataclass(frozen=True)
class Statistics:
    """mu_R and sigma_R: mean and standard deviation of nll over D_R, in nats."""

    mu: float
    sigma: float

    def z(self, nll: Tensor) -> Tensor:
        """(nll - mu_R) / sigma_R, (n,)."""
        result: Tensor = (nll - self.mu) / self.sigma
        return result


def statistics(nll: Tensor) -> Statistics:
    """mu_R and sigma_R of nll values (m,).

    Raises:
        DivergedError: a value is not finite.
    """
    values = nll.double()
    if not bool(torch.isfinite(values).all()):
        raise DivergedError("the likelihood of a remember image is not finite; lower the learning rate")
    return Statistics(float(values.mean()), max(float(values.std()), 1e-6))


def float32(device: str) -> torch.autocast:
    """A context in which likelihoods are computed in float32 whatever the caller's autocast says."""
    return torch.autocast(device, enabled=False)


@torch.no_grad()
def nll_of(
    flow: Density, images: Tensor, *, n_bits: int, generator: torch.Generator, draws: int = 1, batch: int = 128
) -> Tensor:
    """-log p of uint8 images, averaged over noise draws: (n,) nats, on the CPU.

    Args:
        flow: any flow; its device is told from its parameters, where it has any.
        images: uint8 (n, c, h, w).
        n_bits: colour depth.
        generator: draws the noise; on the CPU.
        draws: noise draws an image.
        batch: most images in one forward.
    """
    total = torch.zeros(len(images), dtype=torch.float64)
    for _ in range(draws):
        x = flow_input(flow, images.cpu(), n_bits, generator)
        total += density_nll(flow, x, batch=batch).double()
    mean: Tensor = total / draws
    return mean


@torch.no_grad()
def density_nll(flow: Density, x: Tensor, *, batch: int = 128) -> Tensor:
    """-log p of dequantised images x (n, c, h, w), in float32 batches on the flow's device: (n,) nats, on the CPU."""
    parameters: Callable[[], object] | None = getattr(flow, "parameters", None)
    first = next(iter(parameters()), None) if parameters is not None else None  # type: ignore[call-overload]  # any flow
    device = first.device if isinstance(first, Tensor) else torch.device("cpu")
    parts = torch.split(x, evaluation_batch(flow, x, device, batch))
    with float32(device.type):
        return torch.cat([-flow.log_prob(part.to(device)).float().cpu() for part in parts])
