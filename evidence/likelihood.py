"""Negative log-likelihoods of images under a flow, averaged over dequantisation noise that two models can share."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.images import evaluation_batch, flow_input
from models.protocol import Flow

__all__ = [
    "DRAWS",
    "FloatArray",
    "ImageNll",
    "NllAccumulator",
    "bits_per_dim",
    "density_nll",
    "derive_seed",
    "image_nll",
]

FloatArray = npt.NDArray[np.float64]

DRAWS = 10
"""Noise draws an image, as in the paper's evaluation."""

BATCH = 128
"""Noisy images that pass through the model at once."""


@dataclass(frozen=True, eq=False)
class ImageNll:
    """Negative log-likelihood of each image, the mean over its noise draws.

    A density, not a probability: it may be negative, and only differences within one `n_bits` and image size mean
    anything. A low likelihood does not say that the model cannot draw the person.

    Attributes:
        nll: (n,) float64, nats an image; lower is more likely. Not finite where the model's answer was not.
        noise_std: (n,) float64, nats; spread over the draws of one image, 0 with one draw.
        draws: noise draws that each value averages.
        dims: values in an image, c * h * w.
    """

    nll: FloatArray
    noise_std: FloatArray
    draws: int
    dims: int

    @property
    def n(self) -> int:
        """Number of images."""
        return len(self.nll)


class NllAccumulator:
    """Takes images batch by batch and gives the number that one call over all of them gives.

    Each draw has a noise stream of its own, read image by image. So the noise of the i-th image depends on the seed,
    on i and on the draw, never on the batch size or the device, and two models with the same seed see the same noise.

    Args:
        flow: the model; its device is used, its state is left alone.
        n_bits: bits a channel that the model was trained on.
        draws: noise draws an image.
        seed: of the noise; pass the same for two models to be compared.
        batch_size: noisy images that pass through the model at once.
    """

    def __init__(self, flow: Flow, *, n_bits: int, draws: int = DRAWS, seed: int, batch_size: int = BATCH) -> None:
        if draws < 1:
            raise ValueError(f"at least one noise draw is needed, got {draws}")
        if batch_size < 1:
            raise ValueError(f"the batch size must be positive, got {batch_size}")
        self._flow = flow
        self._n_bits = n_bits
        self._streams = [torch.Generator().manual_seed(derive_seed(seed, "noise", draw)) for draw in range(draws)]
        self._batch_size = batch_size
        self._mean: list[Tensor] = []
        self._std: list[Tensor] = []
        self._dims = 0

    def update(self, images: Tensor, on_batch: Callable[[], None] | None = None) -> None:
        """Add images.

        Args:
            images: (n, c, h, w) uint8.
            on_batch: called after each batch.
        """
        check_images(images)
        self._dims = math.prod(images.shape[1:])
        for group in split(images, len(self._streams), self._batch_size):
            values = self._values(group)  # (b, draws)
            self._mean.append(values.mean(1))
            self._std.append(values.std(1, correction=0))
            if on_batch is not None:
                on_batch()

    def result(self) -> ImageNll:
        """The likelihoods of all images so far, in the order in which they came."""
        return ImageNll(_joined(self._mean), _joined(self._std), len(self._streams), self._dims)

    def _values(self, images: Tensor) -> Tensor:
        x, flow = images.cpu(), self._flow  # (b, c, h, w)
        noisy = [flow_input(flow, x[i : i + 1], self._n_bits, s) for i in range(len(x)) for s in self._streams]
        nll = density_nll(self._flow, torch.cat(noisy), batch_size=self._batch_size)
        return nll.view(len(images), len(self._streams))


def image_nll(
    flow: Flow,
    images: Tensor,
    *,
    n_bits: int,
    draws: int = DRAWS,
    seed: int,
    batch_size: int = BATCH,
    on_batch: Callable[[], None] | None = None,
) -> ImageNll:
    """Negative log-likelihood of each image under the flow (flow taming, arXiv 2211.16488, Sec. 4.1).

    Args:
        flow: the model.
        images: (n, c, h, w) uint8; n may be 0.
        n_bits: bits a channel that the model was trained on.
        draws: noise draws an image.
        seed: of the noise; the same seed gives two models the same noise.
        batch_size: noisy images that pass through the model at once.
        on_batch: called after each batch.

    Returns:
        One value an image, in nats, averaged in float64.
    """
    accumulator = NllAccumulator(flow, n_bits=n_bits, draws=draws, seed=seed, batch_size=batch_size)
    accumulator.update(images, on_batch)
    return accumulator.result()


def density_nll(flow: Flow, x: Tensor, *, batch_size: int = BATCH) -> Tensor:
    """Negative log-density (n,) float64 on the CPU, in nats, of real-valued images x (n, c, h, w)."""
    device = device_of(flow)
    # Verdicts are float32 whatever the caller's autocast says.
    with torch.inference_mode(), torch.autocast(device.type, enabled=False):
        batches = torch.split(x, evaluation_batch(flow, x, device, batch_size)) if len(x) else ()
        parts = [-flow.log_prob(batch.to(device)).double().cpu() for batch in batches]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def bits_per_dim(nll: float, *, dims: int, n_bits: int) -> float:
    """Bits per dimension of an image of `n_bits`: nll / (dims ln 2) + n_bits. Lower is more likely.

    The second term counts the width of a dequantisation bin, so that the uniform model scores `n_bits` exactly. For
    display; tests and criteria work in nats. Two models compare only at equal `n_bits` and size.

    Args:
        nll: nats an image, of the density on [-0.5, 0.5).
        dims: values in an image.
        n_bits: bits a channel.
    """
    return nll / (dims * math.log(2)) + n_bits


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed in [0, 2**63) for one named purpose, so that no two purposes share a random stream."""
    text = "/".join(str(part) for part in (seed, *path))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def device_of(flow: Flow) -> torch.device:
    """The device on which the flow's parameters lie; the CPU for a flow without any."""
    first = next(flow.parameters(), None) if isinstance(flow, nn.Module) else None
    return torch.device("cpu") if first is None else first.device


def check_images(images: Tensor) -> None:
    """Raise ValueError for anything but (n, c, h, w) uint8."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 of shape (n, c, h, w), got {images.dtype} of {tuple(images.shape)}")


def split(images: Tensor, draws: int, batch_size: int) -> Iterator[Tensor]:
    """Groups of images of which all draws together fill a batch."""
    size = max(1, batch_size // draws)
    for start in range(0, len(images), size):
        yield images[start : start + size]


def batch_count(n: int, draws: int, batch_size: int = BATCH) -> int:
    """How many batches `split` makes of n images."""
    return -(-n // max(1, batch_size // draws))


def _joined(parts: list[Tensor]) -> FloatArray:
    return torch.cat(parts).numpy() if parts else np.zeros(0)
