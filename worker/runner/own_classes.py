"""The classes that a flow itself has: their names, who tells them apart, and how often that judge misreads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from evidence.classifier import FlowClassifier
from evidence.likelihood import derive_seed
from models.class_prior import ClassPriorFlow
from models.images import denoised, to_uint8
from models.tarflow import TarFlow
from worker.runner.base import Base
from worker.runner.problems import UserError

__all__ = ["OwnClasses"]

MISREAD_SAMPLES = 200
"""Labelled samples of each class that the judge's misreadings are counted on."""


@dataclass(frozen=True)
class OwnClasses:
    """The classes of one base, told apart by its own likelihoods.

    What the base takes a class to be does not change with a job, so it judges samples of both flows.
    """

    base: Base
    flow: TarFlow
    judge: FlowClassifier
    seed: int

    @classmethod
    def of(cls, base: Base, seed: int, *, pointer: str) -> OwnClasses:
        """The classes of a base; `seed` is of all that is drawn from it.

        Raises:
            UserError: it has none.
        """
        flow = base.module
        count = int(getattr(flow, "n_classes", 0))
        if not isinstance(flow, TarFlow) or not count:
            raise UserError(
                "invalid-request",
                "The checkpoint has no classes",
                f"A {base.checkpointed.family} flow has no classes of its own. Name images or an attribute instead, or "
                "train a class-prior flow.",
                pointer=pointer,
            )
        judge: nn.Module = flow if callable(getattr(flow, "classify", None)) else _ByLikelihood(flow)
        names = [str(label) for label in range(count)]
        told = FlowClassifier(judge, names, n_bits=base.n_bits, seed=derive_seed(seed, "own classes"), name="class")
        return cls(base, flow, told, seed)

    @property
    def shares(self) -> dict[int, float]:
        """How often the base draws each class that it has."""
        if isinstance(self.flow, ClassPriorFlow):
            weights = self.flow.class_weights.tolist()
            return {label: float(weights[label]) for label in self.flow.classes()}
        count = self.flow.n_classes
        return dict.fromkeys(range(count), 1 / count)

    def drawn(self, label: int, n: int, purpose: str) -> Tensor:
        """n samples of a class, uint8 (n, c, h, w), clean."""
        parts = []
        for start in range(0, n, self.base.micro_batch):
            count = min(self.base.micro_batch, n - start)
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "drawn", purpose, label, start))
            x = self.flow.sample(count, generator=generator, label=label)
            with torch.no_grad():
                parts.append(to_uint8(denoised(self.flow, x).cpu(), self.base.n_bits))
        return torch.cat(parts)

    def read_as(self, shares: Mapping[int, float]) -> dict[str, float]:
        """What the judge says, in the mean, of samples whose classes have these shares: its misreadings are in it.

        Counted on labelled samples of the base; a job that changes how often a class is drawn, and not what it looks
        like, leaves them as they are.
        """
        names = self.judge.classes
        found = torch.zeros(len(names), dtype=torch.float64)
        total = sum(shares.values())
        for label, share in shares.items():
            if share > 0:
                labels = self.judge(self.drawn(label, MISREAD_SAMPLES, "misread"))
                found += share / total * torch.bincount(labels, minlength=len(names)).double() / len(labels)
        return dict(zip(names, found.tolist(), strict=True))


class _ByLikelihood(nn.Module):
    """Tells the classes of a flow that has no priors of them by p(x | c): one evaluation for each class."""

    def __init__(self, flow: TarFlow) -> None:
        super().__init__()
        self.flow, self.noise_std = flow, flow.noise_std

    def classify(self, x: Tensor) -> Tensor:
        """The class under which each image is likeliest, (b,)."""
        each = [self.flow.log_prob(x, label) for label in range(self.flow.n_classes)]
        return torch.stack(each, dim=1).argmax(1)
