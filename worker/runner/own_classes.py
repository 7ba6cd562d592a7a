"""The classes that a flow itself has: their names, who tells them apart, and how that judge reads samples of each."""

from __future__ import annotations

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

READ_SAMPLES = 200
"""Labelled samples of each class that the judge's readings are counted on."""


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
        """How often the base draws each class that it has, by label; removed ones are left out.

        The marginal of a class-prior flow is the mixture of its classes with these weights. A TarFlow that embeds its
        classes has no such mixture: without a label it is the density under the mean of their embeddings, which need
        not draw any of them as often as another. Where a mixture is asked for, those that are left count alike.
        """
        classes = self.flow.classes()
        if isinstance(self.flow, ClassPriorFlow):
            weights = self.flow.class_weights.tolist()
            return {label: float(weights[label]) for label in classes}
        return dict.fromkeys(classes, 1 / len(classes))

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

    def read_as(self, label: int) -> dict[int, float]:
        """The fraction of labelled samples of each class that the judge takes for this one, by the class they are of.

        Misreadings are of the base; a job that changes how often a class is drawn, and not what it looks like, leaves
        them as they are.
        """
        readings = {of: self.judge(self.drawn(of, READ_SAMPLES, "misread")) for of in self.shares}
        return {of: float((read == label).double().mean()) for of, read in readings.items()}


class _ByLikelihood(nn.Module):
    """Tells the classes of a flow that has no priors of them by p(x | c): one evaluation for each class."""

    def __init__(self, flow: TarFlow) -> None:
        super().__init__()
        self.flow, self.noise_std = flow, flow.noise_std

    def classify(self, x: Tensor) -> Tensor:
        """The class, of those that the flow has, under which each image is likeliest, (b,)."""
        classes = self.flow.classes()
        each = torch.stack([self.flow.log_prob(x, label) for label in classes], dim=1)  # (b, classes left)
        return torch.tensor(classes, device=each.device)[each.argmax(1)]
