"""The judge that the benchmarks on ORL faces share: likelihoods of all 400 photos on noise that no run has seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from examples.orl import HELD_OUT, N_BITS, PHOTOS, Faces
from models.protocol import Flow
from unlearning import TamingParameters
from unlearning.likelihood import nll_of
from unlearning.randomness import stream

JUDGE_SEED = 2**31
"""Apart from every seed that a taming run draws from."""


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one tamed flow, eq. 13-15; NaN for a set without images."""

    confirmed: bool
    z_min: float
    q_forget: float
    """Mean quantile of D_F under the tamed flow."""
    qd_forget: float
    qd_same: float
    """D'_F: the person's other photos."""
    qd_remember: float
    qd_unseen: float
    """D_R^id: people who were never in training."""
    qd_nearest: float
    """D_R^NN: photos to remember that are nearest to D_F; NaN where the judge has no embedding."""
    drift: float
    """Mean over D_R^id of |nll_tamed - nll_base| / sigma_base."""


class Judge:
    """Likelihoods of all 400 photos on common noise, base and tamed.

    Args:
        base: the flow before.
        faces: all photos.
        draws: noise draws a photo.
        values: delta and tolerance.
        embedding: (400, d) of the photos, for D_R^NN; squared Euclidean distance tells who is near.
        neighbours: photos nearest to each photo of D_F that make up D_R^NN.
        n_bits: colour depth.
    """

    def __init__(
        self,
        base: Flow,
        faces: Faces,
        draws: int,
        values: TamingParameters,
        *,
        embedding: Tensor | None = None,
        neighbours: int = 5,
        n_bits: int = N_BITS,
    ) -> None:
        self._photos = faces.photos.flatten(0, 1)  # (400, 1, 32, 32)
        self._training, self._n_bits = faces.training_people, n_bits
        self._draws, self._bound = draws, values.delta * (1 - values.tolerance)
        self._embedding, self._neighbours = embedding, neighbours
        self._base = self._nll(base)

    def __call__(self, tamed: Flow, person: int, photos: int) -> Verdict:
        """Judge a flow that was to forget the first so many photos of a person."""
        mine = torch.arange((person - 1) * PHOTOS, person * PHOTOS)
        forget, same = mine[:photos], mine[photos:]
        remember = rows_of([other for other in self._training if other != person])
        unseen = rows_of([other for other in HELD_OUT if other != person])
        nll = self._nll(tamed)
        mu, sigma = nll[remember].mean(), nll[remember].std()
        mu_base, sigma_base = self._base[remember].mean(), self._base[remember].std()
        z = (nll - mu) / sigma
        q = 1 - torch.special.ndtr(z)
        drop = 1 - torch.special.ndtr((self._base - mu_base) / sigma_base) - q  # q_base - q_tamed
        lowest = float(z[forget].min())
        return Verdict(
            confirmed=lowest >= self._bound,
            z_min=lowest,
            q_forget=float(q[forget].mean()),
            qd_forget=float(drop[forget].mean()),
            qd_same=float(drop[same].mean()),
            qd_remember=float(drop[remember].mean()),
            qd_unseen=float(drop[unseen].mean()),
            qd_nearest=float(drop[self._nearest(forget, remember)].mean()),
            drift=float(((nll - self._base)[unseen].abs() / sigma_base).mean()),
        )

    def _nearest(self, forget: Tensor, remember: Tensor) -> Tensor:
        if self._embedding is None:
            return remember[:0]
        distances = torch.cdist(self._embedding[forget], self._embedding[remember])  # (f, r)
        nearest = distances.topk(self._neighbours, largest=False).indices  # (f, neighbours)
        return remember[sorted(set(nearest.flatten().tolist()))]

    def _nll(self, flow: Flow) -> Tensor:
        generator = stream(JUDGE_SEED, "judge")
        return nll_of(flow, self._photos, n_bits=self._n_bits, generator=generator, draws=self._draws)


def rows_of(people: Sequence[int]) -> Tensor:
    """Positions, among all 400 photos, of those of some people (counted from 1)."""
    return torch.cat([torch.arange((person - 1) * PHOTOS, person * PHOTOS) for person in people])
