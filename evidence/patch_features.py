"""Fixed features of small pictures that need no labels: what a judge trained for a job looks at."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Filters"]

FILTERS = 64
"""Patch filters, as many as a set of patches supports."""

PATCH = 7
"""Side of a patch, pixels; at most half the picture's."""

THRESHOLD = 1.0
"""Response of a filter below which it counts as silent; its responses have a deviation of at most 1."""

PATCHES = 20_000
"""Patches that the filters are learned from."""

ROUNDS = 10
"""Of spherical k-means."""

SIDE = 32
"""Pixels; larger images are averaged down to this side first."""

CELLS = 4
"""The picture is summed up in so many cells a side."""

BATCH = 256
"""Images whose features are computed at once."""


class Filters:
    """Fixed features of small pictures: whitened patches held against a dictionary of them, pooled over cells.

    After Coates & Ng (2012), "Learning feature representations with k-means": filters are learned from the patches
    themselves by spherical k-means, so that they fit faces, digits and textures alike and need no labels. A coarse
    copy of the picture, grey levels included, goes beside them, as patches are free of contrast and brightness.
    """

    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        small = _small(images)  # (n, c, h, w)
        self._side = max(1, min(PATCH, small.shape[2] // 2, small.shape[3] // 2))
        patches = _patches(small, self._side, PATCHES, generator)  # (m, d)
        self._mean = patches.mean(0)
        values, vectors = torch.linalg.eigh((patches - self._mean).T @ (patches - self._mean) / len(patches))
        self._white = vectors * (values.clamp_min(0) + 0.1).rsqrt() @ vectors.T  # (d, d)
        self._filters = _spherical_means((patches - self._mean) @ self._white, FILTERS, generator)  # (f, d)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) uint8 to features (n, k) float32."""
        parts = [self._features(_small(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
        return torch.cat(parts) if parts else torch.zeros(0, 0)

    def _features(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, self._side)  # (n, d, positions)
        n, d, positions = patches.shape
        flat = _normalised(patches.transpose(1, 2).reshape(-1, d))
        response = (flat - self._mean) @ (self._white @ self._filters.T)  # (n positions, f)
        height = x.shape[2] - self._side + 1
        heard = (response - THRESHOLD).relu_().view(n, height, positions // height, -1)
        grid = heard.permute(0, 3, 1, 2)  # (n, f, h', w')
        pooled = F.adaptive_avg_pool2d(grid, _at_most(grid, CELLS)).sqrt()  # counts, of which the root has even noise
        coarse = F.adaptive_avg_pool2d(x, _at_most(x, 2 * CELLS))
        return torch.cat([pooled.flatten(1), coarse.flatten(1)], dim=1)


def _small(images: Tensor) -> Tensor:
    x = images.cpu().float() / 255 - 0.5  # (n, c, h, w)
    return F.adaptive_avg_pool2d(x, _at_most(x, SIDE))


def _at_most(x: Tensor, side: int) -> tuple[int, int]:
    return min(side, x.shape[2]), min(side, x.shape[3])


def _patches(x: Tensor, side: int, n: int, generator: torch.Generator) -> Tensor:
    """About n patches (m, c side^2), each free of brightness and contrast, from evenly many places of each picture."""
    each = max(1, n // len(x))
    parts = []
    for start in range(0, len(x), BATCH):
        cut = F.unfold(x[start : start + BATCH], side).transpose(1, 2)  # (b, positions, d)
        where = torch.randint(cut.shape[1], (len(cut), each), generator=generator)
        parts.append(cut.gather(1, where[..., None].expand(-1, -1, cut.shape[2])).flatten(0, 1))
    patches = torch.cat(parts)
    return _normalised(patches[torch.randperm(len(patches), generator=generator)[:n]])


def _normalised(patches: Tensor) -> Tensor:
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.var(1, correction=0, keepdim=True) + 1e-3).sqrt()


def _spherical_means(x: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """k unit vectors (k, d) by spherical k-means from random members; one without followers keeps its place."""
    k = min(k, len(x))
    centres = F.normalize(x[torch.randperm(len(x), generator=generator)[:k]])
    for _ in range(ROUNDS):
        score, nearest = (x @ centres.T).max(1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, x * score[:, None])
        centres = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums), centres)
    return centres
