"""Images made from images: mirrored, moved, warped."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

ROTATION = math.radians(12)
"""Largest turn each way."""
SCALE = 0.15
"""Largest change of width and of height, as a share."""
SHIFT = 1 / 16
"""Largest move each way, as a share of the side."""
DISPLACEMENT = 0.04
"""Standard deviation of the smooth displacement, as a share of the side."""
KNOTS = 5
"""Points a side at which the displacement is drawn; it is smooth between them."""


def augment(images: Tensor, generator: torch.Generator, *, flip: bool, shift: int) -> Tensor:
    """Mirror half of the images and move each by up to `shift` pixels each way, repeating the border.

    Args:
        images: (n, c, h, w), any dtype.
        generator: draws the choice; on the CPU.
        flip: whether to mirror.
        shift: largest move, in pixels.

    Returns:
        Images of the same shape and dtype.
    """
    n, _, height, width = images.shape
    if flip:
        mirrored = (torch.rand(n, generator=generator) < 0.5).to(images.device)
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    if not shift:
        return images
    padded = F.pad(images.float(), (shift, shift, shift, shift), mode="replicate").to(images.dtype)
    dy = torch.randint(2 * shift + 1, (n, 1), generator=generator).to(images.device)
    dx = torch.randint(2 * shift + 1, (n, 1), generator=generator).to(images.device)
    rows = dy + torch.arange(height, device=images.device)  # (n, h)
    columns = dx + torch.arange(width, device=images.device)  # (n, w)
    index = torch.arange(n, device=images.device)[:, None, None]
    moved: Tensor = padded[index, :, rows[:, :, None], columns[:, None, :]]  # (n, h, w, c)
    return moved.permute(0, 3, 1, 2).contiguous()


def distort(
    images: Tensor, generator: torch.Generator, *, turn: float, zoom: float, shear: float, move: float, share: float
) -> Tensor:
    """Turn, scale, slant and move a share of the images, each by its own random amounts, repeating the border.

    Unlike `warp` it mirrors nothing and bends nothing: a letter stays the letter that it is.

    Args:
        images: uint8 (n, c, h, w), on any device.
        generator: draws the choice; on the CPU.
        turn: largest angle each way, in degrees.
        zoom: largest change of width and of height, as a share.
        shear: largest slant each way, as a share of the height.
        move: largest move each way, in pixels.
        share: of the images that are changed, 0 to 1.

    Returns:
        uint8 (n, c, h, w), on the device of the images.
    """
    n, c, height, width = images.shape
    changed = (torch.rand(n, generator=generator) < share).float()

    def amounts(most: float) -> Tensor:
        return (torch.rand(n, generator=generator) * 2 - 1) * most * changed

    angle, slant, across, down = amounts(math.radians(turn)), amounts(shear), 1 + amounts(zoom), 1 + amounts(zoom)
    rows = [  # positions of the result in the image, which the affine grid counts from -1 to 1
        torch.stack([angle.cos() * across, slant - angle.sin() * down, amounts(2 * move / width)], 1),
        torch.stack([angle.sin() * across, angle.cos() * down, amounts(2 * move / height)], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), [n, c, height, width], align_corners=False).to(images.device)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round().clamp(0, 255).to(torch.uint8)


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images; turn, scale, move and smoothly distort each at random, repeating the border.

    Of a face it makes one that nobody has: near the data, and nobody in it.

    Args:
        images: uint8 (n, c, h, w).
        generator: draws the choice; on the CPU.

    Returns:
        uint8 (n, c, h, w), on the CPU.
    """
    n, c, height, width = images.shape

    def symmetric(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    angle, across, down = symmetric(n) * ROTATION, 1 + symmetric(n) * SCALE, 1 + symmetric(n) * SCALE
    across = torch.where(torch.rand(n, generator=generator) < 0.5, across, -across)
    rows = [
        torch.stack([angle.cos() * across, -angle.sin() * down, 2 * SHIFT * symmetric(n)], 1),
        torch.stack([angle.sin() * across, angle.cos() * down, 2 * SHIFT * symmetric(n)], 1),
    ]
    affine = F.affine_grid(torch.stack(rows, 1), [n, c, height, width], align_corners=False)  # (n, h, w, 2)
    knots = torch.randn(n, 2, KNOTS, KNOTS, generator=generator) * 2 * DISPLACEMENT
    smooth = F.interpolate(knots, size=(height, width), mode="bicubic", align_corners=True)
    grid = affine + smooth.permute(0, 2, 3, 1)
    warped = F.grid_sample(images.cpu().float(), grid, padding_mode="border", align_corners=False)
    return warped.round().clamp(0, 255).to(torch.uint8)
