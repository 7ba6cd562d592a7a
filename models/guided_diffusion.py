"""What diffusion models with guidance have in common: draws, the loss, the imitation of a teacher, and their checks.

A new architecture derives from `GuidedDiffusion` and says what its network answers under a condition.
"""

from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor, nn

from models.conditional import Draws, Sampling
from models.diffusion import Diffusion, Predict, check_sampling
from models.vae import InputError

__all__ = ["GuidedDiffusion"]


class GuidedDiffusion(nn.Module, ABC):
    """The part of `models.conditional.GuidedConditional` that no network changes; a model sets `diffusion` first."""

    diffusion: Diffusion

    @property
    def terms(self) -> int:
        """The number of timesteps."""
        return self.diffusion.terms

    @property
    def sampling(self) -> Sampling:
        """How it draws; may be set, to what this number of timesteps allows."""
        return self._sampling

    @sampling.setter
    def sampling(self, value: Sampling) -> None:
        check_sampling(value, self.terms)
        self._sampling = value

    @property
    @abstractmethod
    def x_shape(self) -> tuple[int, ...]:
        """Of one x: an image, or a latent."""

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """What n estimates are random by, on the CPU: timesteps int64 (n,) and noise float32 (n, *x_shape)."""
        return self.diffusion.draw(n, self.x_shape, generator=generator)

    def draw_stratified(self, n: int, *, generator: torch.Generator) -> Draws:
        """As `draw`, with a timestep in each of n equal parts of the range: all, once each, where n is `terms`."""
        return self.diffusion.draw_stratified(n, self.x_shape, generator=generator)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The squared error of each row, at the timesteps and the noise that are passed.

        Args:
            x: (n, *x_shape), see `encode`; surrogates such as uniform noise are welcome.
            condition: (n, ...), rows of conditions.
            draws: (timesteps, noise) of n rows, see `draw`.

        Returns:
            (n,) float32; differentiable in the weights and in x.

        Raises:
            InputError: a shape does not fit, or a timestep is none.
            ConditionError: a condition is none of the model's.
        """
        steps, noise = self._checked_draws(x, draws)
        return self._joined((self._answered(x, condition, draws) - self.diffusion.target(x, steps, noise)).square())

    def imitation(self, teacher: Self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The squared error of each row against what another model of this kind answers there; else as `losses`."""
        with torch.no_grad():
            wanted = teacher._answered(x, condition, draws)
        return self._joined((self._answered(x, condition, draws) - wanted).square())

    @abstractmethod
    def _told(self, condition: Tensor, x: Tensor) -> Predict:
        """What the network answers for rows of x_t under these conditions."""

    @abstractmethod
    def _joined(self, errors: Tensor) -> Tensor:
        """The loss of each row, (n,), of its squared errors (n, *x_shape)."""

    def _answered(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The network's answers at these timesteps and noises, (n, *x_shape) float32."""
        steps, noise = self._checked_draws(x, draws)
        return self._told(condition, x)(self.diffusion.noised(x, steps, noise), steps).float()

    def _checked_draws(self, x: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        if tuple(x.shape[1:]) != tuple(self.x_shape) or not x.is_floating_point():
            raise InputError(
                f"x is a float tensor (n, {', '.join(map(str, self.x_shape))}), not {x.dtype} {tuple(x.shape)}"
            )
        if len(draws) != 2 or draws[0].shape != x.shape[:1] or draws[1].shape != x.shape:
            shapes = [tuple(part.shape) for part in draws]
            raise InputError(f"draws are timesteps ({len(x)},) and noise {tuple(x.shape)}, see `draw`, not {shapes}")
        steps, noise = draws[0].to(x.device), draws[1].to(x.device)
        if steps.dtype != torch.int64 or bool(((steps < 0) | (steps >= self.terms)).any()):
            raise InputError(f"timesteps are whole numbers (int64) from 0 to {self.terms - 1}; `draw` draws them")
        return steps, noise
