"""The fast engine: only what lies below the first scale is tuned, and everything above it is computed once.

Departures from the paper, each for a measured reason: a one-sided Huber hinge on z instead of sigmoid(sigma^2 d^2),
whose gradient vanishes far from the target; a keep loss on the change of each image's own likelihood instead of a
divergence between Gaussians fitted to eight values; and mu_R, sigma_R followed by a control variate instead of 1,024
fresh forwards.
"""

from typing import cast

import torch
from torch import Tensor, nn

from models.images import dequantize, quantize
from models.protocol import Flow, SplitFlow
from models.training import augment
from unlearning.errors import DivergedError
from unlearning.likelihood import float32, statistics
from unlearning.randomness import stream
from unlearning.taming_parameters import TamingParameters

BATCH = 128
"""Images in one forward without gradients."""
SMOOTHING = 0.8
"""Decay of the running difference between tamed and base statistics."""
SLACK = 0.05
"""In sigma_R: how far past the criterion the step's own z must be before a confirmation is tried."""


class FastEngine:
    """Cached prefix, tuned suffix; see the module."""

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
    ) -> None:
        del base  # the tamed copy still is the base when its likelihoods are cached
        self._values, self._seed, self._n_bits = values, seed, n_bits
        self._flow = cast(Flow, tamed)
        split = cast(SplitFlow, tamed) if isinstance(tamed, SplitFlow) and tamed.suffix_parameters() else None
        self._split = split
        tuned = {id(p) for p in split.suffix_parameters()} if split is not None else None
        self._parameters: dict[str, nn.Parameter] = {}
        for name, parameter in tamed.named_parameters():
            parameter.requires_grad_(tuned is None or id(parameter) in tuned)
            if parameter.requires_grad:
                self._parameters[name] = parameter
        self._device = next(iter(self._parameters.values())).device
        self._optimiser = torch.optim.Adam(self._parameters.values(), lr=values.learning_rate or 0.0)

        # What is frozen is computed once: the prefix of every image and draw, and the base's nll.
        count = min(len(remember), values.statistics_images)
        rows = torch.randperm(len(remember), generator=stream(seed, "pool"))[:count]
        self._remember_h, self._remember_share = self._cache(remember[rows], "remember", values.noise_draws)
        self._remember_nll = self._suffix_nll(self._remember_h, self._remember_share)  # (m,)
        self._base = statistics(self._remember_nll)
        copies = [forget]
        for variant in range(values.forget_variants):
            copies.append(
                augment(forget, stream(seed, "variant", variant), flip=True, shift=min(values.forget_shift, 8))
            )
        self._n_forget = len(forget)
        self._forget_h, self._forget_share = self._cache(torch.cat(copies), "forget", values.noise_draws)
        self._last = torch.full((self._n_forget,), -torch.inf)  # newest z of each forget image
        self._shift = torch.zeros(2, dtype=torch.float64)  # running (mu, sigma) of tamed less base, in sigma_base
        self._extra = torch.zeros((), dtype=torch.float64)  # raised target after a failed confirmation

    def check(self, step: int) -> bool:
        """Whether the newest z of every forget image passes the criterion with a little slack."""
        del step
        target = self._values.delta * (1 - self._values.tolerance)
        return bool((self._last >= target + SLACK + float(self._extra)).all())

    def rejected(self, lowest: float) -> None:
        """Ask for as much more as the confirmation fell short by."""
        target = self._values.delta * (1 - self._values.tolerance)
        self._extra += max(0.05, target - lowest)
        self._last.fill_(-torch.inf)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One Adam step on forget hinge + keep loss, with D_F and D_R in one forward."""
        values = self._values
        generator = stream(self._seed, "step", step)
        images = torch.randperm(self._n_forget, generator=generator)[: values.forget_batch]  # (f,)
        copies = len(self._forget_h) // self._n_forget
        pick = torch.randint(copies, (len(images),), generator=generator)
        rows_f = images + pick * self._n_forget  # (f,)
        size = min(values.remember_batch or 1, len(self._remember_h))
        rows_r = torch.randperm(len(self._remember_h), generator=generator)[:size]  # (r,)
        h = torch.cat([self._forget_h[rows_f], self._remember_h[rows_r]])
        share = torch.cat([self._forget_share[rows_f], self._remember_share[rows_r]])
        with float32():
            nll = -(share + self._suffix_log_prob(h)).float()
        nll_f, nll_r = nll[: len(images)], nll[len(images) :]
        nll_b = self._remember_nll[rows_r].to(nll)
        sigma_b = self._base.sigma
        moved = (nll_r - nll_b) / sigma_b  # (r,)
        mu, sigma = self._track(nll_r.detach(), nll_b)

        z = (nll_f - mu) / sigma  # (f,)
        target = values.delta * (1 - values.tolerance) + values.margin + float(self._extra)
        gap = torch.relu(target - z)
        forget_loss = torch.where(gap < 1, 0.5 * gap.square(), gap - 0.5).mean()
        keep_loss = moved.square().mean()
        loss = forget_loss + values.keep_weight * keep_loss
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), values.clip)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss or its gradient was not finite at step {step}; lower the learning rate")
        self._optimiser.step()
        self._last[images] = z.detach().cpu().to(self._last)
        losses = {
            "loss": float(loss.detach()),
            "forget": float(forget_loss.detach()),
            "remember": float(keep_loss.detach()),
        }
        metrics = {
            "z_min": float(self._last.min()),
            "drift": float(moved.detach().abs().mean()),
            "mu": mu,
            "sigma": sigma,
        }
        return losses, metrics

    def tensors(self) -> dict[str, Tensor]:
        """Tuned weights, Adam's moments, running values."""
        return {
            **pack(self._parameters, self._optimiser),
            "last": self._last,
            "shift": self._shift,
            "extra": self._extra,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        unpack(tensors, self._parameters, self._optimiser)
        self._last, self._shift = tensors["last"].clone(), tensors["shift"].clone()
        self._extra = tensors["extra"].clone()

    def _track(self, nll_r: Tensor, nll_b: Tensor) -> tuple[float, float]:
        """mu_R, sigma_R of the tamed flow: the base's, plus the running change on the steps' own remember images."""
        sigma_b = self._base.sigma
        now = (
            torch.stack([(nll_r - nll_b).double().mean(), nll_r.double().std() - nll_b.double().std()]).cpu() / sigma_b
        )
        self._shift = SMOOTHING * self._shift + (1 - SMOOTHING) * now
        mu = self._base.mu + float(self._shift[0]) * sigma_b
        return mu, sigma_b * max(0.1, 1 + float(self._shift[1]))

    @torch.no_grad()
    def _cache(self, images: Tensor, name: str, draws: int) -> tuple[Tensor, Tensor]:
        """Prefix outputs (draws * n, ...) and their shares of log p, draw after draw."""
        outputs, shares = [], []
        with float32():
            for draw in range(draws):
                x = dequantize(quantize(images.cpu(), self._n_bits), self._n_bits, stream(self._seed, name, draw))
                for part in torch.split(x, BATCH):
                    part = part.to(self._device)
                    h, share = self._split.prefix(part) if self._split else (part, part.new_zeros(len(part)))
                    outputs.append(h)
                    shares.append(share)
        return torch.cat(outputs), torch.cat(shares)

    @torch.no_grad()
    def _suffix_nll(self, h: Tensor, share: Tensor) -> Tensor:
        with float32():
            parts = [
                -(s + self._suffix_log_prob(p))
                for p, s in zip(torch.split(h, BATCH), torch.split(share, BATCH), strict=True)
            ]
        return torch.cat(parts)

    def _suffix_log_prob(self, h: Tensor) -> Tensor:
        return self._split.suffix_log_prob(h) if self._split else self._flow.log_prob(h)


def pack(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and Adam's moments under stable names."""
    packed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        packed[f"weight.{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            packed[f"adam.{key}.{name}"] = value
    return packed


@torch.no_grad()
def unpack(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """The reverse of `pack`."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        moments = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        found = {key: value.clone() for key, value in moments.items() if value is not None}
        if found:
            optimiser.state[parameter] = {
                key: value if key == "step" else value.to(parameter) for key, value in found.items()
            }
