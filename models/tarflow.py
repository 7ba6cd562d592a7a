"""TarFlow: a stack of autoregressive blocks, each a causal transformer over patches (Zhai et al., ICML 2025).

The density is over images with Gaussian noise, and `denoise` takes that noise off what is sampled. Parts stand in
`models.tarflow_blocks`, samplers with guidance in `models.tarflow_sampling`.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.architecture import check_image, check_ranges
from models.errors import ArchitectureError
from models.tarflow_blocks import NO_LABEL, Block
from models.tarflow_sampling import Guidance, fastest, sequential

MAX_BLOCKS = 64
MAX_LAYERS = 256
MAX_WIDTH = 8192
MAX_TOKENS = 65_536
MAX_CLASSES = 100_000
MAX_NOISE = 0.5
"""Half of the range of images; there is no picture left."""
HEAD_WIDTH = 64
"""Width of an attention head in all published models."""
INPUT_SCALE = 2.0
"""Published models read images in [-1, 1], ours lie in [-0.5, 0.5)."""
SAMPLE_BATCH = 64
"""Images that are sampled or denoised at once, which bounds memory."""

Label = Tensor | int | None
"""One class for all images, one for each (n,), -1 where there is none; null: no label at all."""


class TarFlow(nn.Module):
    """The flow x -> z ~ N(0, I) over images in [-0.5, 0.5)^(c, h, w) with noise N(0, noise_std^2).

    z = v^(-1/2) (f_K ... f_1)(patches of 2 x), where f_k is z_i = (x_i - b_k(x_<i)) exp(-a_k(x_<i)) over tokens i, read
    forwards for odd k and backwards for even k, and v a variance a latent, which is 1 in all models that learn a.
    log p(x) = log N(z; 0, I) - sum a - 1/2 sum log v + d log 2, in nats, one value an image. Zhai et al., "Normalizing
    Flows are Capable Generative Models", sec. 2-3. A flow of classes adds an embedding of the class to every token;
    without a label it adds the mean of them all.

    Args:
        image_shape: (channels, height, width).
        n_bits: colour depth of the images it is trained on, which are shown and stored so.
        patch_size: side p of a patch, in pixels; a token has channels p^2 values.
        width: of the transformers.
        n_block: how many autoregressive maps K.
        n_layer: layers of each transformer.
        head_width: of attention; null: 64, or the width where 64 does not divide it.
        noise_std: of the noise on images, in units of x (half of the number in a published file's name); 0 for a flow
            over dequantised images.
        n_classes: classes it knows; 0 for none.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.
    """

    family: ClassVar[str] = "tarflow"
    var: Tensor
    removed_classes: Tensor | None
    """Whether each class was taken away, bool (k,); null where the blocks know no classes."""

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = 8,
        *,
        patch_size: int = 2,
        width: int = 64,
        n_block: int = 4,
        n_layer: int = 2,
        head_width: int | None = None,
        noise_std: float = 0.025,
        n_classes: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.image_shape = check_image(image_shape, n_bits)
        check_ranges(
            {
                "patch_size": (patch_size, 1, min(self.image_shape[1:])), "width": (width, 1, MAX_WIDTH),
                "n_block": (n_block, 1, MAX_BLOCKS), "n_layer": (n_layer, 1, MAX_LAYERS),
                "n_classes": (n_classes, 0, MAX_CLASSES),
            }
        )  # fmt: skip
        head_width = head_width if head_width is not None else (width if width % HEAD_WIDTH else HEAD_WIDTH)
        channels, height, across = self.image_shape
        _check_architecture(height, across, patch_size, width, head_width, noise_std)
        self.n_bits, self.noise_std, self.n_classes = n_bits, float(noise_std), n_classes
        self.architecture: dict[str, Any] = {
            "patch_size": patch_size, "width": width, "n_block": n_block, "n_layer": n_layer, "head_width": head_width,
            "noise_std": self.noise_std, "n_classes": n_classes,
        }  # fmt: skip
        self._patch = patch_size
        self.latent_shape: tuple[int, int] = (height * across // patch_size**2, channels * patch_size**2)
        tokens, size = self.latent_shape
        self.register_buffer("var", torch.ones(tokens, size))
        self.register_buffer("removed_classes", torch.zeros(n_classes, dtype=torch.bool) if n_classes else None)
        self.blocks = nn.ModuleList(
            Block(
                tokens, size, width=width, head_width=head_width, n_layer=n_layer, n_classes=n_classes,
                reverse=k % 2 == 1,
            )
            for k in range(n_block)
        )  # fmt: skip
        if generator is not None:
            for block in self.chain():
                block.reset(generator)

    def forward(self, x: Tensor, label: Label = None) -> tuple[Tensor, Tensor]:
        """Images (b, c, h, w) to latents (b, tokens, values), standard normal, and log|det| (b,) in nats."""
        h, log_det = self._through(x, label, self.chain())
        return self._standardised(h, log_det)

    def inverse(self, latents: Tensor, label: Label = None) -> Tensor:
        """Latents (b, tokens, values) back to images (b, c, h, w), token by token and exact.

        `models.tarflow_sampling.fastest` is sooner, and exact to a tolerance.
        """
        return sequential(self, latents, label=label).images

    def log_prob(self, x: Tensor, label: Label = None) -> Tensor:
        """log p(x), (b,) nats; noisy images (b, c, h, w), about [-0.5, 0.5)."""
        h, share = self.prefix(x, label)
        return share + self.suffix_log_prob(h, label)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        generator: torch.Generator,
        temperature: float = 1.0,
        label: Label = None,
        guidance: Guidance | None = None,
    ) -> Tensor:
        """Draw n noisy images, (n, c, h, w), from latents of standard deviation `temperature`; not clipped.

        Without guidance they follow the flow's own law. The sampler is `models.tarflow_sampling.fastest`.
        """
        drawn = torch.randn((n, *self.latent_shape), generator=generator, device=generator.device) * temperature
        labels = self.labels(label, n)
        parts = [
            fastest(
                self, drawn[rows].to(self.var), label=None if labels is None else labels[rows], guidance=guidance
            ).images
            for rows in _batches(n)
        ]
        return torch.cat(parts)

    def denoise(self, y: Tensor, label: Label = None) -> Tensor:
        """The expected image given a noisy one, (b, c, h, w): y + noise_std^2 grad log p(y), Tweedie's formula."""
        labels = self.labels(label, len(y))
        return torch.cat(
            [y[rows] + self.noise_std**2 * self._score(y[rows], labels, rows) for rows in _batches(len(y))]
        )

    def prefix(self, x: Tensor, label: Label = None) -> tuple[Tensor, Tensor]:
        """All blocks but the last: images to what enters that, (b, tokens, values), and their share of log p (b,)."""
        return self._through(x, label, self.chain()[:-1])

    def suffix_log_prob(self, h: Tensor, label: Label = None) -> Tensor:
        """The last block's share of log p, from what enters it: (b,) nats."""
        h, log_det = self.chain()[-1](h, self.labels(label, len(h)))
        z, log_det = self._standardised(h, log_det)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=(1, 2))

    def suffix_parameters(self) -> list[nn.Parameter]:
        """The block nearest the prior, whose every input has seen the whole image; empty for a flow of one block."""
        return list(self.blocks[-1].parameters()) if len(self.blocks) > 1 else []

    def classes(self) -> list[int]:
        """The classes that the flow still has: a removed one's label is read as the mean of these, like no label."""
        if self.removed_classes is None:
            return []
        return [label for label, removed in enumerate(self.removed_classes.tolist()) if not removed]

    def later_state(self) -> dict[str, Tensor]:
        """What tensors hold that files do not have which are older than these, or published: see `models.checkpoints`.

        No class of such a file was taken away.
        """
        known = self.removed_classes is not None
        return {"removed_classes": torch.zeros(self.n_classes, dtype=torch.bool)} if known else {}

    def chain(self) -> list[Block]:
        """The blocks, from the image to the prior."""
        return [block for block in self.blocks if isinstance(block, Block)]

    def labels(self, label: Label, n: int) -> Tensor | None:
        """A label for each of n images on the flow's device, (n,), or null for none.

        Raises:
            ArchitectureError: the flow has no such class, or the number of labels is another.
        """
        if label is None:
            return None
        if isinstance(label, int):
            label = torch.full((n,), label)
        if label.shape != (n,) or label.is_floating_point():
            raise ArchitectureError(f"{n} images take {n} whole labels, not {tuple(label.shape)} of {label.dtype}")
        low, high = (int(label.min()), int(label.max())) if n else (NO_LABEL, NO_LABEL)
        if low < NO_LABEL or high >= self.n_classes:
            known = f"classes 0 to {self.n_classes - 1}" if self.n_classes else "no classes"
            raise ArchitectureError(f"labels go from {low} to {high}; this flow has {known}")
        return label.to(self.var.device)

    def patches(self, x: Tensor) -> Tensor:
        """Images (b, c, h, w) to tokens (b, tokens, values) row by row, each in the order (channel, row, column)."""
        return F.pixel_unshuffle(x, self._patch).flatten(2).transpose(1, 2)

    def images(self, tokens: Tensor) -> Tensor:
        """The inverse of `patches`."""
        rows, columns = (side // self._patch for side in self.image_shape[1:])
        grid = tokens.transpose(1, 2).reshape(len(tokens), self.latent_shape[1], rows, columns)
        return F.pixel_shuffle(grid, self._patch)

    def unscaled(self, tokens: Tensor) -> Tensor:
        """Tokens in the published scale, (b, tokens, values), to images (b, c, h, w) in ours."""
        return self.images(tokens) / INPUT_SCALE

    def _through(self, x: Tensor, label: Label, blocks: Sequence[Block]) -> tuple[Tensor, Tensor]:
        """Scale, patch and send images through some blocks: tokens (b, tokens, values) and log|det| so far (b,)."""
        if tuple(x.shape[1:]) != self.image_shape:
            raise ArchitectureError(f"this flow takes images of shape {self.image_shape}, not {tuple(x.shape[1:])}")
        labels = self.labels(label, len(x))
        h = self.patches(x * INPUT_SCALE)  # (b, tokens, values)
        log_det = h.new_full((len(x),), h[0].numel() * math.log(INPUT_SCALE)) if len(x) else h.new_zeros(0)
        for block in blocks:
            h, term = block(h, labels)
            log_det = log_det + term
        return h, log_det

    def _standardised(self, h: Tensor, log_det: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of variance v to those of variance 1, and what that adds to log|det|."""
        return h * self.var.rsqrt(), log_det - 0.5 * self.var.log().sum()

    def _score(self, y: Tensor, labels: Tensor | None, rows: slice) -> Tensor:
        """grad log p(y), whatever mode the caller is in."""
        with torch.inference_mode(False), torch.enable_grad():
            leaf = y.detach().clone().requires_grad_(True)
            total = self.log_prob(leaf, None if labels is None else labels[rows].clone()).sum()
            return torch.autograd.grad(total, leaf)[0]


def _batches(n: int) -> list[slice]:
    return [slice(start, min(start + SAMPLE_BATCH, n)) for start in range(0, max(n, 1), SAMPLE_BATCH)]


def _check_architecture(
    height: int, across: int, patch_size: int, width: int, head_width: int, noise_std: float
) -> None:
    """Refuse what cannot be built, with the value, before anything is allocated."""
    if height % patch_size or across % patch_size:
        raise ArchitectureError(f"an image of {height} x {across} pixels has no whole patches of side {patch_size}")
    tokens = height * across // patch_size**2
    check_ranges({"head_width": (head_width, 1, width), "tokens": (tokens, 1, MAX_TOKENS)})
    if width % head_width:
        raise ArchitectureError(f"a width of {width} is no multiple of the head's, {head_width}")
    valid = isinstance(noise_std, int | float) and not isinstance(noise_std, bool)
    if not valid or not 0 <= noise_std <= MAX_NOISE:
        raise ArchitectureError(f"noise_std must be a number from 0 to {MAX_NOISE}, not {noise_std!r}")
