"""What diffusion models share: the forward process, the training target and the sampler of a scheduler's configuration.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Song et al., "Denoising Diffusion Implicit Models" (2021);
Ho and Salimans, "Classifier-Free Diffusion Guidance" (2022). The arithmetic is that of `diffusers`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from models.architecture import check_ranges
from models.conditional import Draws, Sampling
from models.errors import ArchitectureError

__all__ = ["Diffusion", "Predict", "check_sampling", "guided"]

PREDICTIONS = ("epsilon", "v_prediction", "sample")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("leading", "trailing", "linspace")
MAX_TERMS = 10_000
MAX_GUIDANCE = 100.0

KNOWN: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "clip_sample_range": 1.0,
    "set_alpha_to_one": True,
    "steps_offset": 0,
    "timestep_spacing": "leading",
    "rescale_betas_zero_snr": False,
}
"""What a configuration may say, with what is assumed where it is silent. Others concern samplers that are not used."""

Predict = Callable[[Tensor, Tensor], Tensor]
"""The network's answer (n, ...) to x_t (n, ...) and timesteps (n,)."""


class Diffusion:
    """The forward process x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and its reverse.

    Args:
        config: of a diffusers scheduler; names beyond `KNOWN` are left out.

    Raises:
        ArchitectureError: a value is none that this release can train and sample with.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = {name: config.get(name, default) for name, default in KNOWN.items()}
        _check(self.config, config)
        self.terms = int(self.config["num_train_timesteps"])
        shared = {name: value for name, value in self.config.items() if name != "set_alpha_to_one"}
        with torch.device("cpu"):  # a model may be built on the meta device, where betas could not be looked at
            self._forward = DDPMScheduler(**shared)
        abar = self._forward.alphas_cumprod
        if not bool(((abar >= 0) & (abar < 1)).all()):
            raise ArchitectureError("the scheduler's betas leave (0, 1); correct its configuration")

    def draw(self, n: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Draws:
        """(timesteps int64 (n,), noise float32 (n, *shape)), uniform and N(0, I), on the CPU."""
        steps = torch.randint(self.terms, (n,), generator=generator)
        return steps, torch.randn(n, *shape, generator=generator)

    def draw_stratified(self, n: int, shape: tuple[int, ...], *, generator: torch.Generator) -> Draws:
        """As `draw`, with a timestep uniform in each of n equal parts of the range: all, once each, if n is `terms`."""
        steps = ((torch.arange(n) + torch.rand(n, generator=generator)) * self.terms / n).long()
        return steps.clamp_(max=self.terms - 1), torch.randn(n, *shape, generator=generator)

    def noised(self, x: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """x_t, (n, ...), of x_0, on the device of `x`."""
        noised: Tensor = self._forward.add_noise(x, noise, steps)
        return noised

    def target(self, x: Tensor, steps: Tensor, noise: Tensor) -> Tensor:
        """What the network is to answer: the noise, the velocity, or x_0, as the configuration has it."""
        kind = self.config["prediction_type"]
        if kind == "epsilon":
            return noise
        if kind == "sample":
            return x
        velocity: Tensor = self._forward.get_velocity(x, noise, steps)
        return velocity

    @torch.no_grad()
    def reverse(self, predict: Predict, start: Tensor, steps: int) -> Tensor:
        """x_0 from x_T = `start` by DDIM without noise of its own, so that equal starts give equal samples.

        Args:
            predict: the network, guided or not.
            start: (n, ...), N(0, I).
            steps: see `Sampling`.
        """
        steps = min(steps, self.terms)
        # where every timestep is asked for, an offset would lead past the last one
        sampler = DDIMScheduler(**self.config | ({"steps_offset": 0} if steps == self.terms else {}))
        sampler.set_timesteps(steps, device=start.device)
        x = start * sampler.init_noise_sigma
        for step in sampler.timesteps[sampler.timesteps >= 0]:  # rounding can add one before 0 to trailing ones
            answer = predict(sampler.scale_model_input(x, step), step.expand(len(x)))
            # where x_0 is clipped, the noise must be what is left of x_t then, or each step strays from the process
            x = sampler.step(answer, step, x, eta=0.0, use_clipped_model_output=True).prev_sample
        drawn: Tensor = x
        return drawn


def check_sampling(sampling: Sampling, terms: int) -> None:
    """Raise ArchitectureError unless a model of so many timesteps can draw by it."""
    check_ranges({"sampling steps": (sampling.steps, 1, terms)})
    if not 0 < sampling.guidance_scale <= MAX_GUIDANCE:
        raise ArchitectureError(
            f"guidance_scale lies above 0 and at {MAX_GUIDANCE:g} at most, not at {sampling.guidance_scale!r}: at 0 "
            "the condition would not count"
        )


def guided(
    predict: Callable[[Tensor, Tensor, Tensor], Tensor], condition: Tensor, null: Tensor, scale: float
) -> Predict:
    """The answer under classifier-free guidance: one pass over both halves, or over the condition alone at scale 1.

    Args:
        predict: answers x_t, timesteps and conditions, row by row.
        condition: (n, ...).
        null: the condition of p(x), (n, ...).
        scale: see `Sampling.guidance_scale`.
    """
    if scale == 1.0:
        return lambda x, steps: predict(x, steps, condition)
    both = torch.cat([null, condition])

    def answer(x: Tensor, steps: Tensor) -> Tensor:
        plain, told = predict(torch.cat([x, x]), torch.cat([steps, steps]), both).chunk(2)
        return plain + scale * (told - plain)

    return answer


def _check(values: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    for name, choices in (
        ("prediction_type", PREDICTIONS), ("beta_schedule", SCHEDULES), ("timestep_spacing", SPACINGS)
    ):  # fmt: skip
        if values[name] not in choices:
            raise ArchitectureError(f"the scheduler's {name} is one of {', '.join(choices)}, not {values[name]!r}")
    if config.get("trained_betas") is not None:
        raise ArchitectureError(
            "the scheduler lists its betas (trained_betas), which is not supported; name a schedule"
        )
    check_ranges({"num_train_timesteps": (values["num_train_timesteps"], 1, MAX_TERMS)})
    check_ranges({"steps_offset": (values["steps_offset"], 0, 1)})
    for name in ("beta_start", "beta_end"):
        if not isinstance(values[name], float) or not 0 < values[name] < 1:
            raise ArchitectureError(f"the scheduler's {name} lies between 0 and 1, not at {values[name]!r}")
    for name in ("clip_sample", "set_alpha_to_one", "rescale_betas_zero_snr"):
        if not isinstance(values[name], bool):
            raise ArchitectureError(f"the scheduler's {name} is true or false, not {values[name]!r}")
    if not isinstance(values["clip_sample_range"], float | int) or not values["clip_sample_range"] > 0:
        raise ArchitectureError(f"the scheduler's clip_sample_range is above 0, not {values['clip_sample_range']!r}")
