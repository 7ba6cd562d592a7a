"""Near-duplicates: images of D_R that show what D_F shows, and must not be held in memory by the keep loss."""

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16
"""Side, in pixels, that images are compared at: small enough to ignore noise and compression."""
MAX_RMS = 6.0
"""Largest root mean square difference of thumbnails, in levels of 255, at which two images count as the same."""


def near_duplicates(forget: Tensor, remember: Tensor, max_rms: float = MAX_RMS) -> list[int]:
    """Positions in D_R of the images that are near-duplicates of an image of D_F.

    Compared are grey thumbnails less their mean (so that exposure does not hide a copy), as they are and mirrored.
    A re-compressed, brightened, mirrored or re-scaled copy is found; another photo of the same person is not.

    Args:
        forget: D_F, uint8 (n, c, h, w).
        remember: D_R, uint8 (m, c, h, w).
        max_rms: largest difference, in levels of 255.

    Returns:
        Sorted positions in `remember`.
    """
    if not len(forget) or not len(remember):
        return []
    targets = _thumbnails(forget)  # (n, d)
    targets = torch.cat([targets, _thumbnails(forget.flip(-1))])  # (2n, d)
    found: list[int] = []
    chunk = 4096
    for start in range(0, len(remember), chunk):
        distance = torch.cdist(_thumbnails(remember[start : start + chunk]), targets)  # (m, 2n)
        rms = distance.amin(dim=1) / targets.shape[1] ** 0.5
        found += [start + int(row) for row in torch.nonzero(rms <= max_rms).flatten()]
    return found


def _thumbnails(images: Tensor) -> Tensor:
    """uint8 (n, c, h, w) -> float32 (n, d), grey, without their mean."""
    grey = images.float().mean(dim=1, keepdim=True)  # (n, 1, h, w)
    size = (min(THUMBNAIL, grey.shape[2]), min(THUMBNAIL, grey.shape[3]))
    small = F.adaptive_avg_pool2d(grey, size).flatten(1)  # (n, d)
    result: Tensor = small - small.mean(dim=1, keepdim=True)
    return result
