"""Images as tensors: reading files, fitting them to a model's size, and the two colour depths of a flow."""

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from models.errors import ImageError

FORMATS = ("JPEG", "PNG", "WEBP")
MAX_PIXELS = 40_000_000
"""Images with more pixels than this are refused before they are decoded."""
MIN_SIDE = 2
"""Pixels; a smaller image holds nothing to forget."""
CPU_VALUES = 2**15
"""Values of the images that pass through a flow at once without gradients on a CPU: the activations of more leave its
caches (32 x 32 images in batches of 32 against 128, measured: Glow 1.6 times as fast, TarFlow 1.5 times)."""
FITS = ("crop", "squash", "exact")
FitMode = Literal["crop", "squash", "exact"]


@dataclass(frozen=True)
class Fit:
    """What was done to one image so that the model can read it."""

    name: str
    original_size: tuple[int, int]
    """(width, height) in pixels, as in the file."""
    original_mode: str
    """Pillow's mode of the file: L, RGB, RGBA, P, ..."""
    cropped: tuple[int, int, int, int] | None
    """Box (left, upper, right, lower) that was kept; null: the whole image."""
    resized: tuple[int, int] | None
    """(width, height) before the resize, where there was one."""
    colour: str | None
    """Such as "RGB to grey", where the channels were converted."""

    @property
    def changed(self) -> bool:
        """Whether the image differs from its file."""
        return self.cropped is not None or self.resized is not None or self.colour is not None


def load_images(
    paths: Sequence[Path | str], *, image_size: int, channels: int, fit: FitMode = "crop"
) -> tuple[Tensor, list[Fit]]:
    """Read image files and fit them to one shape.

    Args:
        paths: JPEG, PNG or WEBP files, one still image each.
        image_size: side of the square that the model takes, in pixels.
        channels: 1 (grey) or 3 (RGB).
        fit: "crop" keeps the central square and resizes it (Lanczos); "squash" resizes without regard to the aspect;
            "exact" refuses any other size.

    Returns:
        uint8 images (n, channels, image_size, image_size), and what was done to each.

    Raises:
        ImageError: a file is empty, no image, truncated, animated, too large or too small, or does not fit.
    """
    if channels not in (1, 3):
        raise ImageError(f"images can be read with 1 or 3 channels, not {channels}")
    if fit not in FITS:
        raise ImageError(f"fit is one of {', '.join(FITS)}, not {fit!r}")
    if not paths:
        raise ImageError("no images were given")
    loaded = [_load_one(Path(path), image_size, channels, fit) for path in paths]
    return torch.stack([pixels for pixels, _ in loaded]), [record for _, record in loaded]


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode one still image, refusing everything else, with no more than its header read before the size is known."""
    if not data:
        raise ImageError(f"{name} is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise ImageError(f"{name} has {width} x {height} pixels; the most is {MAX_PIXELS:,} in all")
            if min(width, height) < MIN_SIDE:
                raise ImageError(f"{name} has {width} x {height} pixels; each side must have {MIN_SIDE} or more")
            if getattr(image, "n_frames", 1) != 1:
                raise ImageError(f"{name} is animated; send one still image a file")
            image.load()
    except ImageError:
        raise
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is no JPEG, PNG or WEBP image") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has more than {MAX_PIXELS:,} pixels") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error and more on bad data
        raise ImageError(f"{name} is damaged or cut short: {type(error).__name__}") from error
    return image


def quantize(images: Tensor, n_bits: int) -> Tensor:
    """Reduce uint8 images to n_bits a channel: floor(v / 2^(8 - n)) / 2^n - 0.5, float32 in [-0.5, 0.5)."""
    _check_bits(n_bits)
    if images.dtype != torch.uint8:
        raise ImageError(f"quantize takes uint8 images, not {images.dtype}")
    levels = torch.div(images, 2 ** (8 - n_bits), rounding_mode="floor")
    x: Tensor = levels.to(torch.float32) / 2**n_bits - 0.5
    return x


def dequantize(x: Tensor, n_bits: int, generator: torch.Generator) -> Tensor:
    """Add U(0, 1) / 2^n_bits noise to quantised images, so that a density over real numbers fits them."""
    _check_bits(n_bits)
    noise = torch.rand(x.shape, generator=generator, device=generator.device, dtype=torch.float32)
    noisy: Tensor = x + noise.to(device=x.device, dtype=x.dtype) / 2**n_bits
    return noisy


def evaluation_batch(flow: object, x: Tensor, device: torch.device, most: int) -> int:
    """Images of a batch x (n, ...) that pass through a flow at once, without gradients: no more than `most`.

    A flow with a true `sequential_log_prob` makes as many small passes for one image as for all: it gets `most`.
    """
    if device.type != "cpu" or getattr(flow, "sequential_log_prob", False):
        return most
    return max(1, min(most, CPU_VALUES // max(1, x[:1].numel())))


def flow_input(flow: object, images: Tensor, n_bits: int, generator: torch.Generator) -> Tensor:
    """What a flow has its density over: images with noise, float32, in host memory.

    A flow with a positive `noise_std` (see `models.protocol.NoisyFlow`) reads v / 255 - 0.5 + noise_std N(0, 1), all
    others quantised and dequantised images.

    Args:
        flow: any flow.
        images: uint8 (n, c, h, w), on the CPU.
        n_bits: colour depth of a flow over dequantised images.
        generator: draws the noise; on the CPU.
    """
    noise_std = float(getattr(flow, "noise_std", 0.0))
    if not noise_std > 0:
        return dequantize(quantize(images, n_bits), n_bits, generator)
    if images.dtype != torch.uint8:
        raise ImageError(f"flow_input takes uint8 images, not {images.dtype}")
    noisy: Tensor = images.float() / 255 - 0.5 + noise_std * torch.randn(images.shape, generator=generator)
    return noisy


def denoised(flow: object, x: Tensor) -> Tensor:
    """Samples of a flow as images: without the Gaussian noise that a `models.protocol.NoisyFlow` is trained with."""
    if float(getattr(flow, "noise_std", 0.0)) > 0 and callable(getattr(flow, "denoise", None)):
        clean: Tensor = flow.denoise(x)  # type: ignore[attr-defined]  # any flow; asked for just above
        return clean
    return x


def to_uint8(x: Tensor, n_bits: int) -> Tensor:
    """The uint8 images whose `quantize` is the level that x, in [-0.5, 0.5), falls in; values outside are clipped."""
    _check_bits(n_bits)
    levels = torch.floor((x + 0.5) * 2**n_bits).nan_to_num(0).clamp(0, 2**n_bits - 1)
    step = 2 ** (8 - n_bits)
    images: Tensor = (levels * step + step // 2).to(torch.uint8)
    return images


def save_png(image: Tensor, path: Path | str) -> None:
    """Write one uint8 image, (1 or 3, h, w), as a PNG file."""
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ImageError(f"a PNG takes a uint8 image of 1 or 3 channels, not {image.dtype} {tuple(image.shape)}")
    pixels = image.cpu().numpy()
    picture = Image.fromarray(pixels[0] if image.shape[0] == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    picture.save(path, format="PNG")


def _load_one(path: Path, image_size: int, channels: int, fit: FitMode) -> tuple[Tensor, Fit]:
    name = path.name
    try:
        image = decode_image(path.read_bytes(), name)
    except OSError as error:
        raise ImageError(f"{name} cannot be read: {error.strerror}") from error
    size, mode = image.size, image.mode
    wanted = "L" if channels == 1 else "RGB"
    if mode.startswith("I;16"):  # 16-bit grey: keep the high byte, which Pillow's own conversion would clip
        grey = np.asarray(image, dtype=np.uint16) >> 8
        image = Image.fromarray(grey.astype(np.uint8))
    if image.mode != wanted:
        image = image.convert(wanted)
    cropped = None
    if fit == "crop" and size[0] != size[1]:
        side = min(size)
        left, upper = (size[0] - side) // 2, (size[1] - side) // 2
        cropped = (left, upper, left + side, upper + side)
        image = image.crop(cropped)
    resized = None
    if image.size != (image_size, image_size):
        if fit == "exact":
            raise ImageError(f"{name} has {size[0]} x {size[1]} pixels; the model takes {image_size} x {image_size}")
        resized = image.size
        image = image.resize((image_size, image_size), Image.Resampling.LANCZOS)
    colour = None if mode == wanted else f"{mode} to {'grey' if channels == 1 else 'RGB'}"
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))  # (h, w) or (h, w, 3)
    pixels = pixels[None] if channels == 1 else pixels.permute(2, 0, 1)  # (c, h, w)
    return pixels.contiguous(), Fit(name, size, mode, cropped, resized, colour)


def _check_bits(n_bits: int) -> None:
    if isinstance(n_bits, bool) or not isinstance(n_bits, int) or not 1 <= n_bits <= 8:
        raise ImageError(f"n_bits is a whole number from 1 to 8, not {n_bits!r}")
