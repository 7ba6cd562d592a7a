"""What a judge says of each picture: its class, and how sure it is of every class where it can tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from evidence.classifier import Classifier

__all__ = ["CLEAR", "NOTHING", "Probabilistic", "Reading", "read"]

CLEAR = 0.5
"""Probability from which on a picture shows a class and not merely some likeness of it."""
NOTHING = -1
"""In the place of a label: no class is shown clearly."""


@runtime_checkable
class Probabilistic(Classifier, Protocol):
    """A classifier that also tells how sure it is."""

    @property
    def threshold(self) -> float:
        """Of two classes, the probability of the second from which on a picture is of it; of more, the largest wins."""
        ...

    def probabilities(self, images: Tensor) -> Tensor | None:
        """(n, k) float64 on the CPU, rows that sum to 1, of images (n, c, h, w) uint8; None: it tells labels alone."""
        ...


@dataclass(frozen=True)
class Reading:
    """A judge's answers for n pictures.

    Attributes:
        labels: (n,) int64.
        probabilities: (n, k) float64; None where the judge tells labels alone.
    """

    labels: Tensor
    probabilities: Tensor | None

    @property
    def seen(self) -> Tensor:
        """The class that each picture clearly shows, (n,) int64: its label, or NOTHING where no class is likelier than
        all others together. Of two classes one always is; a judge that tells labels alone has to be believed.
        """
        if self.probabilities is None or self.probabilities.shape[1] == 2:
            return self.labels
        return torch.where(self.probabilities.max(1).values >= CLEAR, self.labels, NOTHING)


def read(judge: Classifier, images: Tensor) -> Reading:
    """Ask a judge about images (n, c, h, w) uint8, once."""
    found = judge.probabilities(images) if isinstance(judge, Probabilistic) else None
    if found is None or not isinstance(judge, Probabilistic):
        return Reading(judge(images), None)
    if found.shape[1] == 2:
        return Reading((found[:, 1] >= judge.threshold).to(torch.int64), found)
    return Reading(found.argmax(1), found)
