"""A plain image embedding, to find the remembered images that look most like the forgotten ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from evidence.likelihood import check_images

__all__ = ["COMPONENTS", "PcaEmbedding", "nearest_neighbours"]

COMPONENTS = 64
"""Principal components kept, where there are as many."""

SIDE = 32
"""Pixels; larger images are averaged down to this side first."""

FIT_ON = 2048
"""Images that the components are computed from; of more, evenly spaced ones."""


@dataclass(frozen=True, eq=False)
class PcaEmbedding:
    """Projection on the principal components of the images to remember ("eigenfaces", Turk & Pentland 1991).

    A stand-in for the face embedding of the taming paper (Sec. 4.1). It sees light, pose and framing at least as much
    as who is in the picture: its neighbours are similar pictures, not similar people.

    Attributes:
        mean: (d,) float32, the mean picture.
        components: (k, d) float32, orthonormal rows, by falling variance.
    """

    mean: Tensor
    components: Tensor

    @classmethod
    def fit(cls, images: Tensor, components: int = COMPONENTS) -> PcaEmbedding:
        """Fit to images (n, c, h, w) uint8; fewer components where n or the picture has fewer."""
        check_images(images)
        step = max(1, -(-len(images) // FIT_ON))
        x = _flat(images[::step])  # (m, d)
        if not len(x):
            return cls(torch.zeros(x.shape[1]), torch.zeros(0, x.shape[1]))
        mean = x.mean(0)
        _, _, rows = torch.linalg.svd(x - mean, full_matrices=False)  # (min(m, d), d)
        return cls(mean, rows[:components])

    @property
    def method(self) -> str:
        """What a report calls it."""
        return f"PCA of pixels at up to {SIDE} x {SIDE}, {len(self.components)} components, Euclidean distance"

    def embed(self, images: Tensor) -> Tensor:
        """Images (n, c, h, w) uint8 to (n, k) float32."""
        check_images(images)
        return (_flat(images) - self.mean) @ self.components.T


def nearest_neighbours(queries: Tensor, pool: Tensor, k: int) -> Tensor:
    """Indices into the pool of every vector that is among the k nearest of some query, rising, each once.

    Args:
        queries: (m, d) embeddings.
        pool: (n, d) embeddings.
        k: neighbours of each query; cut to n.

    Returns:
        Between min(k, n) and min(m k, n) indices, int64; none where either side is empty.
    """
    k = min(k, len(pool))
    if not len(queries) or k < 1:
        return torch.zeros(0, dtype=torch.int64)
    distances = torch.cdist(queries, pool, compute_mode="donot_use_mm_for_euclid_dist")  # (m, n)
    nearest = distances.topk(k, largest=False).indices  # (m, k)
    return torch.tensor(sorted(set(nearest.flatten().tolist())), dtype=torch.int64)


def _flat(images: Tensor) -> Tensor:
    x = images.cpu().float() / 255  # (n, c, h, w)
    height, width = min(SIDE, images.shape[2]), min(SIDE, images.shape[3])
    if (height, width) != images.shape[2:] and len(images):
        x = F.adaptive_avg_pool2d(x, (height, width))
    return x.reshape(len(images), images.shape[1] * height * width)
