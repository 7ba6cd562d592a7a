"""Images made from images: same kind, same seed same pixels, and nothing that was not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.augmentation import augment, warp


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """As the fast engine moves them."""
    return augment(images, generator, flip=True, shift=2)


@pytest.mark.parametrize("change", [moved, warp])
@pytest.mark.parametrize("shape", [(5, 1, 8, 8), (3, 3, 16, 16), (1, 1, 32, 64)])
def test_an_augmented_image_is_an_image_of_the_same_kind(
    change: Callable[[Tensor, torch.Generator], Tensor], shape: tuple[int, ...]
) -> None:
    images = torch.randint(60, 200, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    first, second = (change(images, torch.Generator().manual_seed(3)) for _ in range(2))

    assert (first.shape, first.dtype) == (images.shape, torch.uint8)
    assert torch.equal(first, second)
    assert not torch.equal(first, images)
    # Repeated borders and interpolation make no level that lies outside of those that were there.
    assert int(first.min()) >= int(images.min())
    assert int(first.max()) <= int(images.max())


def test_a_flat_image_stays_as_it_is_however_it_is_warped() -> None:
    flat = torch.full((4, 3, 16, 16), 77, dtype=torch.uint8)

    assert torch.equal(warp(flat, torch.Generator().manual_seed(1)), flat)


def test_each_image_is_warped_in_its_own_way_and_by_no_other() -> None:
    images = torch.randint(0, 255, (1, 1, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    warped = warp(images.repeat(6, 1, 1, 1), torch.Generator().manual_seed(1))

    assert len(torch.unique(warped, dim=0)) == 6
