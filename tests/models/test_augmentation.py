"""Images made from images: same kind, same seed same pixels, and nothing that was not there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models.augmentation import augment, distort, warp
from tests.models.flow_table import generator


def moved(images: Tensor, draws: torch.Generator) -> Tensor:
    """As the fast engine moves them."""
    return augment(images, draws, flip=True, shift=2)


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


def test_distortion_leaves_alone_what_it_is_not_asked_for() -> None:
    images = torch.randint(256, (6, 1, 8, 8), generator=generator()).to(torch.uint8)
    amounts = {"turn": 10.0, "zoom": 0.1, "shear": 0.1, "move": 1.0}

    none = distort(images, generator(), **dict.fromkeys(amounts, 0.0), share=1.0)
    nobody = distort(images, generator(), **amounts, share=0.0)
    everybody = distort(images, generator(), **amounts, share=1.0)

    assert torch.equal(none, images)
    assert torch.equal(nobody, images)
    assert not bool((everybody == images).flatten(1).all(dim=1).any())


def test_distortion_moves_no_further_than_asked() -> None:
    images = torch.zeros(200, 1, 21, 21, dtype=torch.uint8)
    images[:, :, 10, 10] = 255

    moved = distort(images, generator(), turn=0, zoom=0, shear=0, move=2.0, share=1.0).float()

    across = (moved.sum(2) * torch.arange(21)).sum(2) / moved.sum((2, 3))
    assert float((across - 10).abs().max()) <= 2.05  # pixels are rounded to levels
    assert float((across - 10).abs().max()) > 1.5


def test_equal_generators_distort_alike() -> None:
    images = torch.randint(256, (6, 3, 8, 10), generator=generator()).to(torch.uint8)

    first, second, other = (
        distort(images, generator(seed), turn=20, zoom=0.2, shear=0.2, move=1.5, share=0.8) for seed in (1, 1, 2)
    )

    assert first.shape == images.shape
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
