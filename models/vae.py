"""The conditional VAE of Selective Amnesia's digits: small, all linear, the first model that is known by a bound alone.

Kingma and Welling, "Auto-Encoding Variational Bayes" (2014); its sizes: Heng and Soh (2023), appendix B.1.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import check_image, check_ranges
from models.conditional import NO_CONDITION, Draws
from models.errors import ArchitectureError, ImageError, ModelError

HIDDEN = (512, 256)
"""Widths of the encoder from the image inwards; the decoder has them outwards (appendix B.1)."""
MAX_LAYERS = 8
MAX_WIDTH = 8192
MAX_LATENT = 1024
MAX_CLASSES = 10_000
BATCH = 1000
"""Images that are drawn at once, which bounds memory."""


class ConditionError(ModelError):
    """The conditions are no labels of this model's classes, one an image."""


class InputError(ModelError):
    """A tensor is not of the shape that the model takes, or holds NaN."""


class ConditionalVAE(nn.Module):
    """p(x | c) = E over z ~ N(0, I) of prod_i Bernoulli(x_i; p_i), p = sigmoid(decoder(z, c)), x in [0, 1]^d.

    The negative ELBO, in nats and one value an image, is

        -sum_i (x_i log p_i + (1 - x_i) log(1 - p_i)) + 1/2 sum_j (m_j^2 + v_j - log v_j - 1),
        (m, log v) = encoder(x, c),  z = m + sqrt(v) eps,  eps ~ N(0, I).

    An intensity between 0 and 1 is read as the probability of a white pixel, as the paper does: the first sum is then
    a cross-entropy, above 0 even for a perfect decoder, and no code length of 8-bit images. Conditions are one-hot
    vectors beside the inputs of encoder and decoder. Every layer is an `nn.Linear` over rows, applied once a pass.

    Args:
        image_shape: (channels, height, width); d is their product.
        n_bits: colour depth of the images that are read and drawn.
        hidden: widths of the encoder's hidden layers; the decoder has them in reverse.
        latent: dimensions of z.
        n_classes: conditions are 0 to this, exclusive.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.

    Raises:
        ArchitectureError: a size is out of range.
    """

    family: ClassVar[str] = "vae"

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = 8,
        *,
        n_classes: int,
        hidden: Sequence[int] = HIDDEN,
        latent: int = 8,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        channels, height, width = check_image(image_shape, n_bits)
        widths = _checked_widths(hidden)
        check_ranges({"latent": (latent, 1, MAX_LATENT), "n_classes": (n_classes, 1, MAX_CLASSES)})
        self.image_shape, self.n_bits = (channels, height, width), n_bits
        self.hidden, self.latent, self.n_classes = widths, latent, n_classes
        values = channels * height * width
        self.encoder = _layers([values + n_classes, *widths, 2 * latent])  # the last gives mean and log-variance
        self.decoder = _layers([latent + n_classes, *reversed(widths), values])
        _reset(self, generator)

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments beyond image shape and n_bits, as JSON values."""
        return {"hidden": list(self.hidden), "latent": self.latent, "n_classes": self.n_classes}

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG002 the protocol's; none drawn
        """Intensities of images at the model's colour depth, on the device that the images are on.

        Args:
            images: uint8 (n, c, h, w).
            generator: not used; nothing is random here.

        Returns:
            x, float32 (n, d) in [0, 1].

        Raises:
            ImageError: they are not uint8, or of another shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ImageError(
                f"the model takes uint8 images (n, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        levels = images.flatten(1) // 2 ** (8 - self.n_bits)
        x: Tensor = levels.to(torch.float32) / (2**self.n_bits - 1)  # (n, d)
        return x

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """What n estimates are random by, on the CPU: (eps,), N(0, I), float32 (n, latent)."""
        return (torch.randn(n, self.latent, generator=generator),)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The negative ELBO of each row in nats, from one draw of z.

        Args:
            x: (n, d) in [0, 1], see `encode`; surrogates such as uniform noise are welcome.
            condition: class labels, int64 (n,) from 0.
            draws: (eps,) of n rows, see `draw`.

        Returns:
            (n,) float32; differentiable in the weights and in x.

        Raises:
            InputError: a shape does not fit, or x holds NaN or lies outside of [0, 1].
            ConditionError: a label is none of the model's.
        """
        reconstruction, divergence = self.parts(x, condition, draws)
        return reconstruction + divergence

    def parts(self, x: Tensor, condition: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """What `losses` adds up: the cross-entropy and the KL divergence of each row, (n,) and (n,) nats."""
        eps = self._checked_draws(draws, len(x))
        mean, log_variance = self.posterior(x, condition)
        z = mean + torch.exp(0.5 * log_variance) * eps.to(x.device)
        logits = self.logits(z, condition)
        reconstruction = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(dim=1)
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(dim=1)
        return reconstruction, divergence

    def posterior(self, x: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of q(z | x, c), (n, latent) each, for x (n, d) in [0, 1]."""
        self._check_rows("x", x, math.prod(self.image_shape))
        if not bool(((x >= 0) & (x <= 1)).all()):  # NaN is neither
            raise InputError("x holds NaN or values outside of [0, 1]; `encode` makes x of images")
        found = _through(self.encoder, torch.cat([x, self._one_hot(condition, x)], dim=1))  # (n, 2 latent)
        mean, log_variance = found.chunk(2, dim=1)
        return mean, log_variance

    def logits(self, z: Tensor, condition: Tensor) -> Tensor:
        """Log-odds of white, (n, d), for latents (n, latent) and labels (n,)."""
        self._check_rows("z", z, self.latent)
        if bool(z.isnan().any()):
            raise InputError("z holds NaN; the weights are damaged, or the training diverged")
        return _through(self.decoder, torch.cat([z, self._one_hot(condition, z)], dim=1))

    def decode(self, z: Tensor, condition: Tensor) -> Tensor:
        """The decoder's mean p, (n, d) in [0, 1]: an x that `losses` takes, without the rounding of an image."""
        return torch.sigmoid(self.logits(z, condition))

    @torch.no_grad()
    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """An image of each condition: the decoder's mean at z ~ N(0, I), not a draw of its pixels, as in the paper.

        Args:
            condition: class labels, int64 (n,) from 0.
            generator: draws z, on the CPU.

        Returns:
            uint8 (n, c, h, w), on the model's device.
        """
        device = next(self.parameters()).device
        (z,) = self.draw(len(condition), generator=generator)
        parts = zip(torch.split(z, BATCH), torch.split(condition, BATCH), strict=True)
        return torch.cat([self.images(self.decode(part.to(device), labels.to(device))) for part, labels in parts])

    def images(self, x: Tensor) -> Tensor:
        """The reverse of `encode`: x (n, d) in [0, 1], rounded to the nearest level, as uint8 (n, c, h, w)."""
        top = 2**self.n_bits - 1
        levels = (x.detach() * top).round()
        images: Tensor = (levels * 255 / top).round().to(torch.uint8).unflatten(1, self.image_shape)
        return images

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """Names of what can be trained: all of it, or the decoder, by which alone samples change."""
        names = [name for name, _ in self.named_parameters()]
        return {"all": names, "decoder": [name for name in names if name.startswith("decoder.")]}

    def _one_hot(self, condition: Tensor, like: Tensor) -> Tensor:
        """(n, n_classes), of the type and device of `like`."""
        if condition.shape != like.shape[:1] or condition.dtype != torch.int64:
            raise ConditionError(
                f"conditions are one label (int64) an image, ({len(like)},), not {condition.dtype} "
                f"{tuple(condition.shape)}"
            )
        if bool((condition == NO_CONDITION).any()):
            raise ConditionError(
                f"a label is {NO_CONDITION}, no condition: a conditional VAE has no unconditional branch; "
                f"give one from 0 to {self.n_classes - 1}"
            )
        if odd := condition[(condition < 0) | (condition >= self.n_classes)].tolist():
            raise ConditionError(f"there is no class {odd[0]}; labels run from 0 to {self.n_classes - 1}")
        return F.one_hot(condition.to(like.device), self.n_classes).to(like.dtype)

    def _checked_draws(self, draws: Draws, n: int) -> Tensor:
        if len(draws) != 1 or tuple(draws[0].shape) != (n, self.latent):
            shapes = [tuple(part.shape) for part in draws]
            raise InputError(f"draws are one tensor ({n}, {self.latent}), see `draw`, not {shapes}")
        return draws[0]

    def _check_rows(self, name: str, rows: Tensor, values: int) -> None:
        if rows.ndim != 2 or rows.shape[1] != values or not rows.is_floating_point():
            raise InputError(f"{name} is a float tensor (n, {values}), not {rows.dtype} {tuple(rows.shape)}")


def _checked_widths(hidden: Sequence[int]) -> tuple[int, ...]:
    if isinstance(hidden, str) or not isinstance(hidden, Sequence) or not 1 <= len(hidden) <= MAX_LAYERS:
        raise ArchitectureError(f"hidden is the widths of 1 to {MAX_LAYERS} layers, such as [512, 256], not {hidden!r}")
    check_ranges({f"hidden[{index}]": (width, 1, MAX_WIDTH) for index, width in enumerate(hidden)})
    return tuple(hidden)


def _layers(sizes: Sequence[int]) -> nn.ModuleList:
    """Linear layers from each size to the next."""
    return nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))


def _through(layers: nn.ModuleList, h: Tensor) -> Tensor:
    """One after the other, with rectifiers between."""
    for number, layer in enumerate(layers):
        h = layer(F.relu(h) if number else h)
    return h


@torch.no_grad()
def _reset(model: nn.Module, generator: torch.Generator | None) -> None:
    """Weights U(-a, a), a = sqrt(3 / inputs), so that N(0, 1) inputs keep their variance; no bias."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.bias.zero_()
            if generator is None:
                module.weight.zero_()
            else:
                reach = math.sqrt(3 / module.in_features)
                module.weight.copy_((2 * torch.rand(module.weight.shape, generator=generator) - 1) * reach)
