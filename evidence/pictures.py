"""The one picture a report may carry, and only when asked: samples before and after from the same latents."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evidence.drift import draw_samples
from models.images import denoised, to_uint8
from models.protocol import Flow

__all__ = ["picture_of", "sample_grid"]

GAP = 2
"""Pixels of white between pictures, before enlargement."""


def sample_grid(
    base: Flow, tamed: Flow, *, n: int = 8, seed: int, n_bits: int = 8, temperature: float = 0.7, scale: int = 3
) -> bytes:
    """Draw n samples of each model, the base model's row above the tamed model's, column by column from equal latents.

    It shows what a few samples look like, not how often the forgotten person is among them. Samples can look like
    people of the training set: the picture is for those who asked for it.

    Args:
        base: the model before.
        tamed: the model after.
        n: samples of each.
        seed: of the latents.
        n_bits: bits a channel that the models were trained on.
        temperature: of the latents; below 1, samples are cleaner and less varied.
        scale: whole-number enlargement.

    Returns:
        A PNG file: RGB for models of three channels, else grey, of the first channel.
    """
    return picture_of(
        [
            to_uint8(denoised(model, draw_samples(model, n, seed=seed, temperature=temperature)), n_bits)
            for model in (base, tamed)
        ],
        scale=scale,
    )


def picture_of(rows: Sequence[Tensor], *, scale: int = 3) -> bytes:
    """Rows of images, uint8 (n, c, h, w) each, one above the other: a PNG file, as `sample_grid` gives it."""
    pixels = torch.cat([_row(row) for row in rows], dim=1)  # (c, 2 (h + gap), n (w + gap))
    picture = pixels[:3] if len(pixels) >= 3 else pixels[:1]
    frame = torch.nn.functional.pad(picture, (GAP, 0, GAP, 0), value=255)
    array = np.ascontiguousarray(frame.permute(1, 2, 0).numpy())  # (h', w', 1 or 3)
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    large = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    large.save(buffer, format="PNG")
    return buffer.getvalue()


def _row(images: Tensor) -> Tensor:
    """Images (n, c, h, w) side by side, each with white to its right and below: (c, h + gap, n (w + gap))."""
    padded = torch.nn.functional.pad(images, (0, GAP, 0, GAP), value=255)
    return torch.cat(list(padded), dim=2)
