"""What a conditional model p(x | c) must offer to forget a condition: the protocols of Selective Amnesia.

A flow has an exact likelihood and is tamed by it (`models.protocol`). What stands here has a bound of it, the ELBO,
whose estimate takes random draws: the latent of a VAE, the timestep and the noise of a diffusion model. They are drawn
apart from the loss, so that the same draws can be evaluated in any batches.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from models.protocol import Checkpointed

NO_CONDITION = -1
"""The label of an image whose condition a model is not told."""

Draws = tuple[Tensor, ...]
"""What an estimate of the loss is random by: tensors of n rows each, such as (timesteps, noise)."""


@runtime_checkable
class ConditionalModel(Protocol):
    """p(x | c), by a bound of its likelihood. `x` is what the model was trained on: pixels, or latents of them."""

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """What the loss takes of images.

        Args:
            images: uint8 (n, c, h, w).
            generator: draws where the encoding is random, as a latent diffusion model's is.

        Returns:
            x, (n, ...), float32.
        """
        ...

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """Draw what n estimates of the loss are random by, on the CPU."""
        ...

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The negative ELBO of each row, or the training loss that stands for it.

        Args:
            x: (n, ...), see `encode`.
            condition: (n, ...), a row of each: class labels int64 (n,), or embeddings of prompts.
            draws: of n rows, see `draw`.

        Returns:
            (n,) float32, each independent of its batch mates; differentiable in the weights.
        """
        ...

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw an image of each condition, uint8 (n, c, h, w)."""
        ...

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """The parameters that can be trained, by scope: "all" at least; names as in `named_parameters`."""
        ...


@dataclass(frozen=True)
class Sampling:
    """How a diffusion model draws."""

    steps: int
    """Of the sampler, evenly spread over the timesteps."""
    guidance_scale: float
    """w in eps(null) + w (eps(c) - eps(null)), above 0: at 1 the condition alone counts; at 0 it would not count."""


@runtime_checkable
class StratifiedConditional(ConditionalModel, Protocol):
    """A conditional model that can spread the draws of one example over what it sums over, as over timesteps."""

    @property
    def terms(self) -> int:
        """How many terms the loss is a sum over, of which a draw is one: the number of timesteps."""
        ...

    def draw_stratified(self, n: int, *, generator: torch.Generator) -> Draws:
        """n draws of one example, one in each of n equal parts of the range: its timesteps, each once where n is their
        number. Each has the same weight as those of `draw`; on the CPU.
        """
        ...


@runtime_checkable
class GuidedConditional(StratifiedConditional, Protocol):
    """A diffusion model with classifier-free guidance: it knows p(x) beside p(x | c), and draws with the two."""

    sampling: Sampling
    """May be set; `sample` and `generate` read it."""

    @property
    def null_condition(self) -> Tensor:
        """The condition of p(x): one row, as `losses` takes rows."""
        ...

    def imitation(self, teacher: Self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """As `losses`, with what another model of this kind answers in the place of the truth: (n,) float32."""
        ...

    def generate(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw an x of each condition, (n, ...) float32 on the model's device, as `losses` takes it."""
        ...

    def images(self, x: Tensor) -> Tensor:
        """x as images, uint8 (n, c, h, w): what `sample` makes of what `generate` draws."""
        ...


@runtime_checkable
class PromptConditional(GuidedConditional, Protocol):
    """A model whose conditions are prompts: rows of token ids, int64 (n, tokens), each of which it encodes once."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of prompts, int64 (n, tokens), on the CPU.

        Raises:
            PromptError: a prompt is empty of tokens, or longer than the model reads: its end would be cut off.
        """
        ...


class LabelledSampler(Protocol):
    """What draws images by label: the least that a judge of samples needs."""

    @property
    def n_classes(self) -> int:
        """Labels run from 0 to this, exclusive."""
        ...

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """An image of each label (n,) from 0, uint8 (n, c, h, w)."""
        ...


@runtime_checkable
class ClassConditional(ConditionalModel, Protocol):
    """A conditional model whose conditions are classes: labels int64 (n,) from 0, `NO_CONDITION` where it allows it."""

    n_classes: int


@runtime_checkable
class CheckpointedConditional(ConditionalModel, Checkpointed, Protocol):
    """A conditional model that a manifest can rebuild: see `models.checkpoints`."""
