"""The fast engine: only what lies below the last cut of the flow is tuned, and everything above it is computed once.

Departures from the paper, each for a measured reason: a one-sided Huber hinge on z instead of sigmoid(sigma^2 d^2),
whose gradient vanishes far from the target; a gradient through mu_R, so that D_F is pushed away from D_R and not with
it; a keep loss on the change of each image's own likelihood instead of a divergence between Gaussians fitted to eight
values; virtual images beside D_R, for people whom D_R does not show; and mu_R, sigma_R followed by a control variate
instead of 1,024 fresh forwards.
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
from unlearning.replay import generate_remember
from unlearning.taming_parameters import TamingParameters

OVERSHOOT = 0.2
"""Slope of the forget loss for an image that lies more than half a sigma_R past its target, against 1 before it."""
BETAS = (0.9, 0.99)
"""Adam's decays; the second is short, since a run has some tens of steps."""
PATIENCE = 100
"""Steps after which the keep loss begins to yield: an easy run has ended by then."""
RELAX = 0.98
"""By how much the weight of the keep loss falls each step from then on."""
WARMUP = 10
"""Steps over which the learning rate rises: Adam's first steps are sign steps, which would move every image."""
BATCH = 128
"""Images in one forward without gradients."""
SMOOTHING = 0.8
"""Decay of the running difference between tamed and base statistics."""
SLACK = 0.25
"""In sigma_R: how far past the criterion the step's own z must be before a confirmation is tried."""
BISECTIONS = 5
"""Halvings of the way back to the base's weights."""


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
        self._optimiser = torch.optim.Adam(
            self._parameters.values(), lr=values.learning_rate or 0.0, fused=True, betas=BETAS
        )

        # What is frozen is computed once: the prefix of every image and draw, and the base's nll.
        count = min(len(remember), values.statistics_images)
        rows = torch.randperm(len(remember), generator=stream(seed, "pool"))[:count]
        true = remember[rows]
        kept = torch.cat([true, *self._virtual(true)])
        self._n_true = len(true)
        self._remember_h, self._remember_share = self._cache(kept, "remember", 1)
        self._remember_nll = self._suffix_nll(self._remember_h, self._remember_share)  # (m,)
        self._base = statistics(self._remember_nll[: self._n_true])
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
        self._origin = [p.detach().clone() for p in self._parameters.values()]
        self._settled = torch.zeros((), dtype=torch.bool)  # whether the weights stand where `_settle` put them

    def check(self, step: int) -> bool:
        """Whether every forget image passes the criterion with a little slack; then takes back what it needs not."""
        del step
        if bool(self._settled):
            return True
        return bool((self._last >= self._reach()).all()) and self._settle()

    def _reach(self) -> float:
        return self._values.delta * (1 - self._values.tolerance) + SLACK + float(self._extra)

    @torch.no_grad()
    def _settle(self) -> bool:
        """Go back along the line to the base's weights as far as every forget image still passes on all cached noise.

        Steps have momentum and overshoot, and what they overshoot by is damage. False, and nothing is changed, if
        the images do not pass where the weights are.
        """
        here = [p.detach().clone() for p in self._parameters.values()]

        def passes(share: float) -> bool:
            for p, start, end in zip(self._parameters.values(), self._origin, here, strict=True):
                p.copy_(torch.lerp(start, end, share))
            return self._lowest() >= self._reach()

        if not passes(1.0):
            return False
        low, high = 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (low, middle) if passes(middle) else (middle, high)
        passes(high)
        self._settled.fill_(True)
        return True

    def _lowest(self) -> float:
        """The smallest z of the forget images, averaged over the cached noise, under the tamed flow's statistics."""
        now = statistics(self._suffix_nll(self._remember_h[: self._n_true], self._remember_share[: self._n_true]))
        per_draw = (self._values.forget_variants + 1) * self._n_forget
        rows = torch.cat([draw * per_draw + torch.arange(self._n_forget) for draw in range(self._values.noise_draws)])
        nll = self._suffix_nll(self._forget_h[rows], self._forget_share[rows]).view(-1, self._n_forget)
        return float(now.z(nll.double().mean(0)).min())

    def rejected(self, lowest: float) -> None:
        """Ask for as much more as the confirmation fell short by."""
        target = self._values.delta * (1 - self._values.tolerance)
        self._extra += max(0.05, target - lowest)
        self._last.fill_(-torch.inf)
        self._settled.fill_(False)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One Adam step on forget hinge + keep loss, with D_F and D_R in one forward."""
        values = self._values
        generator = stream(self._seed, "step", step)
        images = torch.randperm(self._n_forget, generator=generator)[: values.forget_batch]  # (f,)
        rows_f = self._forget_rows(images, generator)  # (f,) or, with a copy of each, (2f,)
        rows_r, true = self._keep_rows(generator)  # (r,), how many of them lead and are images of D_R themselves
        h = torch.cat([self._forget_h[rows_f], self._remember_h[rows_r]])
        share = torch.cat([self._forget_share[rows_f], self._remember_share[rows_r]])
        with float32(self._device.type):
            nll = -(share + self._suffix_log_prob(h)).float()
        nll_f, nll_r = nll[: len(rows_f)], nll[len(rows_f) :]
        nll_b = self._remember_nll[rows_r].to(nll)
        sigma_b = self._base.sigma
        moved = (nll_r - nll_b) / sigma_b  # (r,)
        mu, sigma = self._track(nll_r.detach()[:true], nll_b[:true])

        # mu_R has the running value, and the gradient of this batch: D_F is pushed away from D_R, not with it.
        z = (nll_f - (mu + (nll_r - nll_r.detach()).mean())) / sigma  # (f,)
        target = torch.full_like(z, values.delta * (1 - values.tolerance) + values.margin + float(self._extra))
        target[len(images) :] *= values.variant_target
        gap = torch.where(z < target, target - z, (z - target - 0.5).clamp(min=0) * OVERSHOOT)
        forget_loss = torch.where(gap < 1, 0.5 * gap.square(), gap - 0.5).mean()
        keep_loss = moved.square().mean()
        keep_weight = values.keep_weight * RELAX ** max(0, step - PATIENCE)
        loss = forget_loss + keep_weight * keep_loss
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), values.clip)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(loss)):
            raise DivergedError(f"the loss or its gradient was not finite at step {step}; lower the learning rate")
        for group in self._optimiser.param_groups:
            group["lr"] = (values.learning_rate or 0.0) * min(1.0, (step + 1) / WARMUP)
        self._optimiser.step()
        self._last[images] = z.detach()[: len(images)].cpu().to(self._last)
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
            "settled": self._settled,
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`."""
        unpack(tensors, self._parameters, self._optimiser)
        self._last, self._shift = tensors["last"].clone(), tensors["shift"].clone()
        self._extra, self._settled = tensors["extra"].clone(), tensors["settled"].clone()

    def _virtual(self, images: Tensor) -> list[Tensor]:
        """Images for the people whom D_R does not show: its own moved, blends of two, samples of the base."""
        if not self._values.virtual_share:
            return []
        generator = stream(self._seed, "virtual")
        images = images[: max(2, len(images) // 2)]
        moved = augment(images, generator, flip=True, shift=1)
        partner = images[torch.randperm(len(images), generator=generator)].float()
        weight = 0.3 + 0.4 * torch.rand(len(images), 1, 1, 1, generator=generator)
        blended = (weight * images.float() + (1 - weight) * partner).to(torch.uint8)
        sampled = generate_remember(self._flow, max(2, len(images)), self._n_bits, self._seed)
        return [moved, blended, sampled]

    def _forget_rows(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of these forget images in the cache, on one of their noise draws, then of one copy of each."""
        per_draw = self._values.forget_variants + 1
        draw = torch.randint(self._values.noise_draws, (len(images),), generator=generator)
        rows = images + draw * per_draw * self._n_forget
        if per_draw == 1:
            return rows
        copy = 1 + torch.randint(per_draw - 1, (len(images),), generator=generator)
        return torch.cat([rows, rows + copy * self._n_forget])

    def _keep_rows(self, generator: torch.Generator) -> tuple[Tensor, int]:
        """Rows of the keep pool for one step, those of D_R first, and how many these are."""
        size = self._values.remember_batch or 2
        virtual = len(self._remember_h) - self._n_true
        share = round(size * self._values.virtual_share) if virtual else 0
        true = min(max(2, size - share), self._n_true)
        rows = torch.randperm(self._n_true, generator=generator)[:true]
        others = self._n_true + torch.randperm(virtual, generator=generator)[:share]
        return torch.cat([rows, others]), true

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
        with float32(self._device.type):
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
        with float32(self._device.type):
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
                # The count on the weights' device, as a fused step asks; the moments in the weights' layout.
                key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in found.items()
            }
