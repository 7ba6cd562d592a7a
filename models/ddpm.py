"""The class-conditional DDPM: a U-Net that tells noise from image, whose classes guide what it draws.

Ho et al., "Denoising Diffusion Probabilistic Models" (2020); Ho and Salimans, "Classifier-Free Diffusion Guidance"
(2022). The network is `UNet2DModel` of diffusers, under the names that it has there. Importing diffusers takes seconds:
`models.families` reaches for this module only when a model of this family is built.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from models.architecture import check_halvings, check_image, check_ranges
from models.conditional import NO_CONDITION, Sampling
from models.diffusion import KNOWN, Diffusion, Predict, guided
from models.errors import ArchitectureError, ImageError
from models.guided_diffusion import GuidedDiffusion
from models.vae import ConditionError

__all__ = ["ClassDDPM"]

SCHEDULER: dict[str, Any] = {"clip_sample": True, "timestep_spacing": "trailing"}
"""What is assumed beside the defaults of `models.diffusion`: pixels end in [-1, 1], and few steps start from noise."""
MAX_LEVELS = 8
MAX_WIDTH = 4096
MAX_LAYERS = 16
MAX_CLASSES = 10_000
DRAWN_VALUES = {"cpu": 2**18, "cuda": 2**26}
"""Values of the first layer's output of all images that are drawn at once: what is fast on a CPU, and bounds memory."""


class ClassDDPM(GuidedDiffusion):
    """p(x | c) by its reverse process: eps(x_t, t, c) is the noise in x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps.

    The loss of a row is || eps - eps(x_t, t, c) ||^2, summed over the values of the image, at the timestep and the
    noise that are passed: Ho et al.'s eq. 14, which stands for the negative ELBO with weights of 1. Where `scheduler`
    says so, the network answers x or the velocity instead, and the loss is on that. The class is an embedding that is
    added to the one of the timestep; one row more, the last, is for no class: p(x).

    Args:
        image_shape: (channels, height, width); x is of this shape, in [-1, 1].
        n_bits: colour depth of the images that are read and drawn.
        channels: width of each level from the image inwards; each halves the sides of the one before.
        layers: residual blocks of a level, on the way in; one more on the way out.
        attention: of each level, whether its pixels attend to each other; one value for all.
        middle_attention: the same for the middle, at the last level's sides.
        norm_groups: of the group norms; divides all widths.
        head_width: of an attention head; divides the width of every level with attention.
        scale_shift: whether the embedding scales and shifts features (FiLM), or is added to them.
        n_classes: conditions are 0 to this, exclusive, or `NO_CONDITION`.
        scheduler: of the forward process and the sampler, see `models.diffusion.KNOWN`.
        sampling: {"steps", "guidance_scale"}, see `models.conditional.Sampling`.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.

    Raises:
        ArchitectureError: a size is out of range, or sizes do not fit each other.
    """

    family: ClassVar[str] = "ddpm"

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = 8,
        *,
        channels: Sequence[int],
        layers: int,
        attention: Sequence[bool] | bool,
        n_classes: int,
        middle_attention: bool = True,
        norm_groups: int = 8,
        head_width: int = 8,
        scale_shift: bool = True,
        scheduler: Mapping[str, Any] | None = None,
        sampling: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        planes, height, width = check_image(image_shape, n_bits)
        self.image_shape, self.n_bits, self.n_classes = (planes, height, width), n_bits, n_classes
        check_ranges({"n_classes": (n_classes, 1, MAX_CLASSES)})
        self._sizes = _checked_sizes(
            {
                "channels": channels, "layers": layers, "attention": attention, "middle_attention": middle_attention,
                "norm_groups": norm_groups, "head_width": head_width, "scale_shift": scale_shift,
            }
        )  # fmt: skip
        check_halvings(image_shape, len(channels) - 1)
        self.diffusion = Diffusion(_checked_scheduler(scheduler))
        self.sampling = _read_sampling({"steps": min(25, self.terms), "guidance_scale": 2.0} | dict(sampling or {}))
        self.unet = _unet(self.image_shape, n_classes, self._sizes)
        if torch.empty(0).device.type != "meta":
            _reset(self.unet.to_empty(device="cpu"), generator)

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments beyond image shape and n_bits, as JSON values."""
        return {
            **{name: list(value) if isinstance(value, tuple) else value for name, value in self._sizes.items()},
            "n_classes": self.n_classes,
            "scheduler": dict(self.diffusion.config),
            "sampling": asdict(self.sampling),
        }

    @property
    def null_condition(self) -> Tensor:
        """The label of p(x), int64 ()."""
        return torch.tensor(NO_CONDITION)

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:  # noqa: ARG002 the protocol's; none drawn
        """Images at the model's colour depth, on the device that they are on.

        Args:
            images: uint8 (n, c, h, w).
            generator: not used; nothing is random here.

        Returns:
            x, float32 (n, c, h, w) in [-1, 1].

        Raises:
            ImageError: they are not uint8, or of another shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ImageError(
                f"the model takes uint8 images (n, {', '.join(map(str, self.image_shape))}), "
                f"not {images.dtype} {tuple(images.shape)}"
            )
        levels = images // 2 ** (8 - self.n_bits)
        x: Tensor = levels.to(torch.float32) * (2 / (2**self.n_bits - 1)) - 1
        return x

    def images(self, x: Tensor) -> Tensor:
        """The reverse of `encode`: x (n, c, h, w), cut to [-1, 1] and rounded to the nearest level, as uint8."""
        top = 2**self.n_bits - 1
        levels = ((x.detach().clamp(-1, 1) + 1) * (top / 2)).round()
        images: Tensor = (levels * 255 / top).round().to(torch.uint8)
        return images

    @torch.no_grad()
    def generate(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """Draw an x of each condition, by DDIM under guidance as `sampling` says.

        Args:
            condition: class labels, int64 (n,) from 0, `NO_CONDITION` for none.
            generator: draws the noise to start from, on the CPU, row by row: the first rows of many are those of few.

        Returns:
            float32 (n, c, h, w), on the model's device.
        """
        weight = next(self.parameters())
        start = torch.empty(len(condition), *self.image_shape)
        for row in start:
            row.copy_(torch.randn(self.image_shape, generator=generator))
        labels, drawn = self._rows(condition, start.to(weight.device)), []
        if not len(start):
            return start.to(weight.device)
        null = torch.full_like(labels, self.n_classes)
        for part in torch.split(torch.arange(len(start)), self._at_once()):
            answer = guided(self._answer, labels[part], null[part], self.sampling.guidance_scale)
            drawn.append(self.diffusion.reverse(answer, start[part].to(weight.device), self.sampling.steps))
        return torch.cat(drawn)

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """An image of each condition, uint8 (n, c, h, w), on the model's device; see `generate`."""
        return self.images(self.generate(condition, generator=generator))

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """Names of what can be trained: all of it."""
        return {"all": [name for name, _ in self.named_parameters()]}

    @property
    def x_shape(self) -> tuple[int, ...]:
        """(channels, height, width)."""
        return self.image_shape

    def _told(self, condition: Tensor, x: Tensor) -> Predict:
        rows = self._rows(condition, x)
        return lambda noised, steps: self._answer(noised, steps, rows)

    def _joined(self, errors: Tensor) -> Tensor:
        total: Tensor = errors.flatten(1).sum(dim=1)
        return total

    def _answer(self, x: Tensor, steps: Tensor, rows: Tensor) -> Tensor:
        """What the network says of x_t (n, c, h, w) at timesteps (n,), with rows (n,) of the class embedding."""
        answer: Tensor = self.unet(x, steps, class_labels=rows, return_dict=False)[0]
        return answer

    def _rows(self, condition: Tensor, like: Tensor) -> Tensor:
        """Rows of the class embedding, int64 (n,), on the device of `like`: the last for no condition."""
        if condition.shape != like.shape[:1] or condition.dtype != torch.int64:
            raise ConditionError(
                f"conditions are one label (int64) an image, ({len(like)},), not {condition.dtype} "
                f"{tuple(condition.shape)}"
            )
        none = condition == NO_CONDITION
        if odd := condition[~none & ((condition < 0) | (condition >= self.n_classes))].tolist():
            raise ConditionError(
                f"there is no class {odd[0]}; labels run from 0 to {self.n_classes - 1}, and {NO_CONDITION} is none"
            )
        return condition.masked_fill(none, self.n_classes).to(like.device)

    def _at_once(self) -> int:
        """How many images are drawn together."""
        _, height, width = self.image_shape
        most = DRAWN_VALUES.get(next(self.parameters()).device.type, DRAWN_VALUES["cpu"])
        return max(1, most // (height * width * int(self._sizes["channels"][0])))


def _checked_sizes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    channels, attention = sizes["channels"], sizes["attention"]
    if isinstance(channels, str) or not isinstance(channels, Sequence) or not 1 <= len(channels) <= MAX_LEVELS:
        raise ArchitectureError(
            f"channels is the widths of 1 to {MAX_LEVELS} levels, such as [32, 64], not {channels!r}"
        )
    groups, head = sizes["norm_groups"], sizes["head_width"]
    check_ranges({f"channels[{level}]": (width, 1, MAX_WIDTH) for level, width in enumerate(channels)})
    check_ranges({"layers": (sizes["layers"], 1, MAX_LAYERS), "norm_groups": (groups, 1, MAX_WIDTH)})
    check_ranges({"head_width": (head, 1, MAX_WIDTH)})
    truths = [attention] * len(channels) if isinstance(attention, bool) else attention
    counted = isinstance(truths, Sequence) and len(truths) == len(channels)
    if not counted or not all(isinstance(one, bool) for one in truths):
        raise ArchitectureError(
            f"attention is true or false for each of the {len(channels)} levels in channels, not {attention!r}"
        )
    for name in ("middle_attention", "scale_shift"):
        if not isinstance(sizes[name], bool):
            raise ArchitectureError(f"{name} is true or false, not {sizes[name]!r}")
    for width in channels:
        if width % groups:
            raise ArchitectureError(f"norm_groups = {groups} does not divide the width {width} in channels")
    attending = [width for width, here in zip(channels, truths, strict=True) if here]
    for width in attending + [channels[-1]] * sizes["middle_attention"]:
        if width % head:
            raise ArchitectureError(f"head_width = {head} does not divide the width {width} of a level with attention")
    if channels[0] % 2:
        raise ArchitectureError(f"channels[0] is even, half sines and half cosines of the timestep, not {channels[0]}")
    return {**sizes, "channels": tuple(channels), "attention": tuple(truths)}


def _checked_scheduler(scheduler: Mapping[str, Any] | None) -> dict[str, Any]:
    if odd := sorted((scheduler or {}).keys() - KNOWN.keys()):
        raise ArchitectureError(f"the scheduler has no {str(odd[0])[:80]!r}; it has {', '.join(sorted(KNOWN))}")
    return SCHEDULER | dict(scheduler or {})


def _read_sampling(values: Mapping[str, Any]) -> Sampling:
    if values.keys() != {"steps", "guidance_scale"}:
        raise ArchitectureError(f"sampling has steps and guidance_scale, not {', '.join(map(str, sorted(values)))}")
    scale = values["guidance_scale"]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise ArchitectureError(f"guidance_scale is a number, not {scale!r}")
    return Sampling(values["steps"], float(scale))


def _unet(image_shape: tuple[int, int, int], n_classes: int, sizes: Mapping[str, Any]) -> nn.Module:
    """The network on the meta device, so that building it draws nothing from torch's global generator."""
    planes, height, width = image_shape
    attention = sizes["attention"]
    with torch.device("meta"):
        network: nn.Module = UNet2DModel(
            sample_size=(height, width),
            in_channels=planes,
            out_channels=planes,
            block_out_channels=sizes["channels"],
            layers_per_block=sizes["layers"],
            down_block_types=tuple("AttnDownBlock2D" if here else "DownBlock2D" for here in attention),
            up_block_types=tuple("AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)),
            add_attention=sizes["middle_attention"],
            attention_head_dim=sizes["head_width"],
            norm_num_groups=sizes["norm_groups"],
            resnet_time_scale_shift="scale_shift" if sizes["scale_shift"] else "default",
            num_class_embeds=n_classes + 1,
        )
    return network


@torch.no_grad()
def _reset(network: nn.Module, generator: torch.Generator | None) -> None:
    """Weights U(-a, a), a = sqrt(3 / inputs), no bias, and zero where a residual branch ends, as Ho et al. have it."""
    for name, p in network.named_parameters():
        owner, _, kind = name.rpartition(".")
        last = owner.endswith(("conv2", "to_out.0", "conv_out"))
        if generator is None or kind == "bias" or last:
            p.zero_()
        elif p.ndim == 1:
            p.fill_(1.0)  # of a norm
        elif owner == "class_embedding":
            p.copy_(torch.randn(p.shape, generator=generator))
        else:
            reach = math.sqrt(3 / p[0].numel())
            p.copy_((2 * torch.rand(p.shape, generator=generator) - 1) * reach)
