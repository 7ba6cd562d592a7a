"""The paper's engine: its objective term by term on the released schedule, the peer that others are held against.

Likelihoods are in bits per dimension (in nats the sigmoid of eq. 9 has no gradient in float32), and the divergence is
written with tensor logarithms, so that each of its two directions is right by itself.
"""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from models.images import flow_input
from models.protocol import Density
from unlearning import micro_batch as micro
from unlearning.errors import DivergedError
from unlearning.likelihood import density_nll, float32, nll_of, statistics
from unlearning.optimiser import pack, unpack
from unlearning.randomness import stream
from unlearning.taming_parameters import TamingParameters


class PaperEngine:
    """Algorithm 1 with every layer tuned; see the module."""

    def __init__(
        self,
        base: nn.Module,
        tamed: nn.Module,
        forget: Tensor,
        remember: Tensor,
        values: TamingParameters,
        *,
        n_bits: int,
        seed: int,
        micro_batch: int,
    ) -> None:
        self._base, self._flow = cast(Density, base), cast(Density, tamed)
        self._values, self._seed, self._n_bits = values, seed, n_bits
        self._micro_batch = micro_batch
        self._forget, self._remember = forget.cpu(), remember.cpu()
        self._bits = math.prod(forget.shape[1:]) * math.log(2)  # nats to bits per dimension
        self._parameters = {name: p for name, p in tamed.named_parameters() if p.requires_grad}
        self._device = next(iter(self._parameters.values())).device
        self._optimiser = torch.optim.Adam(self._parameters.values(), lr=values.learning_rate or 0.0, fused=True)
        self._statistics = torch.zeros(2, dtype=torch.float64)  # mu_R, sigma_R in bits per dimension

    def check(self, step: int) -> bool:
        """Eq. 10 before each step: all of D_F on one fresh draw, against statistics that may be some steps old."""
        if step % self._values.refresh_every == 0:
            self._refresh(step)
        mu, sigma = (float(value) for value in self._statistics)
        nll = self._nll_of(self._forget, stream(self._seed, "stop", step))
        distance = nll / self._bits - (mu + self._values.delta * sigma)
        return bool((distance.abs() <= self._values.tolerance * self._values.delta * sigma).all())

    def rejected(self, shortfall: float) -> None:
        """Nothing changes: the recipe goes on."""

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """Eq. 9, 11, 12 on a batch of each set."""
        values = self._values
        generator = stream(self._seed, "step", step)
        rows_f = torch.randperm(len(self._forget), generator=generator)[: values.forget_batch]
        rows_r = torch.randperm(len(self._remember), generator=generator)[: values.remember_batch]
        x_f = self._noisy(self._forget[rows_f], generator)
        x_r = self._noisy(self._remember[rows_r], generator)
        nll_b = density_nll(self._base, x_r, batch=self._micro_batch)
        mu, sigma = (float(value) for value in self._statistics)
        parts: dict[str, Tensor] = {}

        def loss(nll: Tensor) -> Tensor:
            bpd_f, bpd_r = nll[: len(x_f)] / self._bits, nll[len(x_f) :] / self._bits
            bpd_b = nll_b / self._bits
            distance = bpd_f - (mu + values.delta * sigma)  # sigma_R d(x), eq. 8
            forget_loss = torch.sigmoid(distance.square()).mean()  # eq. 9
            forward = gaussian_kl(bpd_b.mean(), bpd_b.std(), bpd_r.mean(), bpd_r.std())
            reverse = gaussian_kl(bpd_r.mean(), bpd_r.std(), bpd_b.mean(), bpd_b.std())
            terms = {
                "nll": (1 - values.gamma) * bpd_r.mean(),
                "kl_forward": values.gamma * forward,
                "kl_reverse": values.gamma * reverse,
            }
            remember_loss = _sum(terms, values.without)  # eq. 11
            parts.update(z=(bpd_f.detach() - mu) / sigma, forget=forget_loss.detach(), remember=remember_loss.detach())
            losses = {"forget": values.alpha * forget_loss, "remember": (1 - values.alpha) * remember_loss}
            return _sum(losses, values.without)  # eq. 12

        self._optimiser.zero_grad(set_to_none=True)
        total = micro.backward(self._log_prob, (torch.cat([x_f, x_r]),), loss, self._micro_batch)
        if not bool(torch.isfinite(total)):
            raise DivergedError(f"the loss was not finite at step {step}; lower the learning rate")
        self._optimiser.step()
        losses = {"loss": float(total), "forget": float(parts["forget"]), "remember": float(parts["remember"])}
        metrics = {"z_min": float(parts["z"].min()), "mu": mu * self._bits, "sigma": sigma * self._bits}
        return losses, metrics

    def tensors(self) -> dict[str, Tensor]:
        """Weights, Adam's moments, statistics."""
        return {**pack(self._parameters, self._optimiser), "statistics": self._statistics}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        unpack(tensors, self._parameters, self._optimiser)
        self._statistics = tensors["statistics"].clone()

    def _refresh(self, step: int) -> None:
        """mu_R and sigma_R of the tamed flow over 1,024 images of D_R, or as many as it holds, one draw each."""
        generator = stream(self._seed, "refresh", step)
        rows = torch.randperm(len(self._remember), generator=generator)[: self._values.statistics_images]
        nll = self._nll_of(self._remember[rows], generator)
        found = statistics(nll / self._bits)
        self._statistics = torch.tensor([found.mu, found.sigma], dtype=torch.float64)

    def _noisy(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return flow_input(self._flow, images, self._n_bits, generator)

    def _log_prob(self, x: Tensor) -> Tensor:
        with float32(self._device.type):
            return self._flow.log_prob(x.to(self._device))

    def _nll_of(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return nll_of(self._flow, images, n_bits=self._n_bits, generator=generator, batch=self._micro_batch)


def _sum(terms: dict[str, Tensor], without: Sequence[str]) -> Tensor:
    """The terms that are not left out, added up."""
    return torch.stack([value for name, value in terms.items() if name not in without] or [torch.zeros(())]).sum()


def gaussian_kl(mean_p: Tensor, std_p: Tensor, mean_q: Tensor, std_q: Tensor) -> Tensor:
    """KL(N(mean_p, std_p^2) || N(mean_q, std_q^2)), in nats."""
    ratio: Tensor = (std_p.square() + (mean_p - mean_q).square()) / (2 * std_q.square())
    return torch.log(std_q / std_p) + ratio - 0.5
