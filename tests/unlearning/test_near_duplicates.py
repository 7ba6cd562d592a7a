"""Near-duplicates: copies are found, other images are not."""

from __future__ import annotations

import torch

from tests.unlearning.tiny import blobs
from unlearning import near_duplicates


def test_exact_mirrored_and_brightened_copies_are_found() -> None:
    forget, others = blobs(2, 1, size=32), blobs(3, 2, size=32)
    brighter = (forget[0:1].int() + 20).clamp(0, 255).to(torch.uint8)
    remember = torch.cat([others[:1], forget[1:2], others[1:2], forget[0:1].flip(-1), brighter, others[2:]])

    assert near_duplicates(forget, remember) == [1, 3, 4]


def test_a_noisy_copy_is_found() -> None:
    forget = blobs(1, 1, size=32)
    noise = torch.randint(-8, 9, forget.shape, generator=torch.Generator().manual_seed(0))
    copy = (forget.int() + noise).clamp(0, 255).to(torch.uint8)

    assert near_duplicates(forget, copy) == [0]


def test_other_images_are_kept() -> None:
    assert near_duplicates(blobs(4, 1, size=32), blobs(40, 2, size=32)) == []


def test_empty_sets_have_none() -> None:
    assert near_duplicates(blobs(0, 1), blobs(4, 2)) == []
    assert near_duplicates(blobs(4, 2), blobs(0, 1)) == []
