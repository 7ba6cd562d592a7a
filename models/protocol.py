"""What a flow must offer to be tamed, stored and judged: the protocols every other room codes against."""

from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@runtime_checkable
class Density(Protocol):
    """A density over images in [-0.5, 0.5) with exact likelihoods; the least that flow taming needs."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of each image.

        Args:
            x: dequantised images, (b, c, h, w), in [-0.5, 0.5).

        Returns:
            (b,) in nats, float32, each value independent of its batch mates.
        """
        ...


class Sampler(Protocol):
    """What a foreign flow offers to draw with; its randomness is torch's global one."""

    def sample(self, n: int) -> Tensor:
        """Draw n images, (n, c, h, w)."""
        ...


@runtime_checkable
class Flow(Density, Protocol):
    """A density that can be drawn from with passed randomness: what the flows of this room are at least."""

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        """Draw n images, (n, c, h, w); the standard deviation of every latent is scaled by `temperature`."""
        ...


@runtime_checkable
class LabelledFlow(Flow, Protocol):
    """A flow that draws a class first, and then an image of it, so that the class of each sample is known."""

    def sample_with_labels(
        self, n: int, *, generator: torch.Generator, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """What `sample` draws, (n, c, h, w), and the class that each image was drawn of, int64 (n,)."""
        ...


@runtime_checkable
class SplitFlow(Flow, Protocol):
    """A flow that can be cut into a frozen prefix and a tuned suffix, so that the prefix is evaluated once.

    The cut obeys `log_prob(x) = share + suffix_log_prob(h)` with `(h, share) = prefix(x)`.
    """

    def prefix(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (b, c, h, w) to the cut: (h of any shape (b, ...), the prefix's share of log p, (b,) nats)."""
        ...

    def suffix_log_prob(self, h: Tensor) -> Tensor:
        """The rest of log p from the prefix's output, (b,) nats."""
        ...

    def suffix_parameters(self) -> list[nn.Parameter]:
        """Every parameter that `prefix` does not read; empty where the flow is too shallow to be cut."""
        ...


@runtime_checkable
class NoisyFlow(Flow, Protocol):
    """A density over images with Gaussian noise of a fixed deviation, instead of dequantised ones (a TarFlow).

    `models.images.flow_input` makes its inputs. What it samples carries that noise, and `denoise` takes it off.
    """

    noise_std: float
    """In units of x, whose images lie in [-0.5, 0.5); 0 where the flow is over dequantised images after all."""

    def denoise(self, y: Tensor) -> Tensor:
        """The expected image given a noisy one, (b, c, h, w): Tweedie's y + noise_std^2 grad log p(y)."""
        ...


@runtime_checkable
class Checkpointed(Protocol):
    """A model that a manifest can rebuild: see `models.checkpoints`."""

    family: ClassVar[str]
    image_shape: tuple[int, int, int]
    n_bits: int

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments beyond image shape and n_bits, as JSON values."""
        ...


@runtime_checkable
class CheckpointedFlow(Flow, Checkpointed, Protocol):
    """A flow that a manifest can rebuild."""
