"""How much of one set of pictures another covers: precision and recall of their features, and the Frechet distance.

KID (`evidence.kid`) says whether two sets differ; these say how. Precision falls where pictures lie outside of what the
first set shows, recall where something that it shows is no longer drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from evidence.amnesia_records import Spread
from evidence.errors import InsufficientEvidenceError
from evidence.fractions import CONFIDENCE, fraction_of

__all__ = ["frechet", "spread"]

NEIGHBOURS = 3
"""k of the k-th nearest neighbour that a picture's ball reaches to, as in the source."""
FEWEST = 1000
"""Pictures of each set below which no Frechet distance is told, and a multiple of the features' number:"""
A_FEATURE = 10
"""its bias falls with the number of pictures a feature, and of few it is the larger part."""


def spread(x: Tensor, y: Tensor, extractor: str, *, confidence: float = CONFIDENCE) -> Spread:
    """Compare features x (n, d) of the first set with y (m, d) of the second.

    Precision is the share of y inside of a ball around any of x that reaches to that one's third nearest neighbour in
    x; recall is the same the other way round (Kynkaanniemi et al. 2019, arXiv 1904.06991). Equal distributions do not
    reach 1: hold them against two sets of one model. The intervals take the balls as given.

    Args:
        x: features of the first set, such as the base's samples.
        y: of the second.
        extractor: the features' name.
        confidence: of each interval by itself.

    Raises:
        InsufficientEvidenceError: a set has too few pictures to have neighbours.
    """
    if min(len(x), len(y)) <= NEIGHBOURS:
        raise InsufficientEvidenceError(
            f"precision and recall take more than {NEIGHBOURS} pictures of each set, not {len(x)} and {len(y)}",
            given=min(len(x), len(y)), needed=NEIGHBOURS + 1,
        )  # fmt: skip
    x, y = x.double(), y.double()
    between = torch.cdist(x, y)  # (n, m)
    inside = (between <= _reach(x)[:, None]).any(0)
    covered = (between <= _reach(y)[None]).any(1)
    enough = min(len(x), len(y)) >= max(FEWEST, A_FEATURE * x.shape[1])
    return Spread(
        precision=fraction_of(int(inside.sum()), len(y), confidence=confidence),
        recall=fraction_of(int(covered.sum()), len(x), confidence=confidence),
        fid=frechet(x, y) if enough else None,
        extractor=extractor,
    )


def frechet(x: Tensor, y: Tensor) -> float:
    """Frechet distance of normal distributions fitted to features (n, d) and (m, d) (Heusel et al. 2017, 1706.08500).

    Of Inception's features it is FID. It is biased upwards, the more the fewer pictures there are a feature.
    """
    x, y = x.double(), y.double()
    gap = (x.mean(0) - y.mean(0)).square().sum()
    a, b = _covariance(x), _covariance(y)
    values, vectors = torch.linalg.eigh(a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()  # tr (a b)^(1/2)
    return float((gap + a.trace() + b.trace() - 2 * cross).clamp(min=0))


def _reach(points: Tensor) -> Tensor:
    """Distance of each point (n, d) to its k-th nearest other, (n,)."""
    return torch.cdist(points, points).kthvalue(NEIGHBOURS + 1, dim=1).values


def _covariance(points: Tensor) -> Tensor:
    centred = points - points.mean(0)
    return centred.T @ centred / (len(points) - 1)
