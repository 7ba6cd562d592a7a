"""The classes that a flow itself has: their names, who tells them apart, and how that judge reads samples of each."""

from __future__ import annotations

import time
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
from worker.runner.contract import Reporter
from worker.runner.problems import UserError
from worker.runner.steps import batches_reported

__all__ = ["OwnClasses", "spread"]

QUIET_SECONDS = 5.0
"""A reading that is over within this says nothing of its progress: it is part of a phase that counts other steps."""


@dataclass(frozen=True)
class OwnClasses:
    """The classes of one base, told apart by its own likelihoods.

    What the base takes a class to be does not change with a job, so it judges samples of both flows.
    """

    base: Base
    flow: TarFlow
    judge: _Judge
    seed: int
    reporter: Reporter
    """Told of every batch."""

    @classmethod
    def of(
        cls, base: Base, seed: int, reporter: Reporter, *, pointer: str, quiet_seconds: float = QUIET_SECONDS
    ) -> OwnClasses:
        """The classes of a base.

        Args:
            base: the flow.
            seed: of all that is drawn from it.
            reporter: told of the progress of what is drawn, and of readings.
            pointer: the place in the request that asks for its classes.
            quiet_seconds: of a reading's progress nothing is said before.

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
        told = _Told(flow, base.micro_batch, reporter, quiet_seconds)
        judge = _Judge(told, n_bits=base.n_bits, seed=derive_seed(seed, "own classes"))
        return cls(base, flow, judge, seed, reporter)

    @property
    def evaluations(self) -> int:
        """How often the flow is evaluated to tell the class of one image."""
        return self.judge.evaluations

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
        return self._drawn(torch.full((n,), label), f"{purpose}/{label}")

    def read_as(self, label: int, shares: Mapping[int, float], n: int, purpose: str) -> int:
        """How many of n samples, of classes in these proportions, the judge takes for one of class `label`.

        Misreadings are of the base; a job that changes how often a class is drawn, and not what it looks like, leaves
        them as they are.
        """
        images = self._drawn(spread(shares, n, seed=derive_seed(self.seed, "spread", purpose)), purpose)
        return int((self.judge(images) == label).sum())

    def _drawn(self, labels: Tensor, purpose: str) -> Tensor:
        """A clean sample of each of these classes, uint8 (n, c, h, w)."""
        reported, parts = batches_reported(self.reporter), []
        for start in range(0, len(labels), self.base.micro_batch):
            some = labels[start : start + self.base.micro_batch]
            generator = torch.Generator().manual_seed(derive_seed(self.seed, "drawn", purpose, start))
            x = self.flow.sample(len(some), generator=generator, label=some)
            with torch.no_grad():
                parts.append(to_uint8(denoised(self.flow, x).cpu(), self.base.n_bits))
            reported(start + len(some), len(labels))
        return torch.cat(parts)


def spread(shares: Mapping[int, float], n: int, *, seed: int) -> Tensor:
    """Classes of n samples by their shares, int64 (n,), sorted: every class as often as its share of n, give or take 1.

    Systematic sampling: equally spaced places, from a random first one, on the line of the shares end to end. So each
    class is expected as often as its share says, also where there are more classes than samples.
    """
    first = torch.rand((), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ends = torch.tensor(list(shares.values()), dtype=torch.float64).cumsum(0)
    places = (torch.arange(n, dtype=torch.float64) + first) / n * ends[-1]
    rows = torch.searchsorted(ends, places, right=True).clamp(max=len(ends) - 1)
    return torch.tensor(list(shares))[rows]


class _Judge:
    """The flow's own classification as a judge of images, which says how far a long reading is."""

    name = "class"

    def __init__(self, told: _Told, *, n_bits: int, seed: int) -> None:
        self.classes = tuple(str(label) for label in range(told.flow.n_classes))
        self._told = told
        self._reads = FlowClassifier(told, self.classes, n_bits=n_bits, seed=seed, name=self.name)

    @property
    def evaluations(self) -> int:
        """Of the flow, for one image."""
        return self._told.evaluations

    def __call__(self, images: Tensor) -> Tensor:
        """Labels (n,) int64 of images (n, c, h, w) uint8."""
        self._told.expect(len(images))
        return self._reads(images)


class _Told(nn.Module):
    """Tells the classes of a flow by p(c | x), or, where it has no priors of them, by p(x | c) one after the other."""

    def __init__(self, flow: TarFlow, micro_batch: int, reporter: Reporter, quiet_seconds: float) -> None:
        super().__init__()
        self.flow, self.noise_std = flow, flow.noise_std
        self.evaluations = 1 if isinstance(flow, ClassPriorFlow) else len(flow.classes())
        self._micro_batch, self._reporter, self._quiet = micro_batch, reporter, quiet_seconds
        self.expect(0)

    def expect(self, images: int) -> None:
        """A reading of so many images begins."""
        self._done, self._total = 0, images * self.evaluations
        self._began, self._reported = time.monotonic(), batches_reported(self._reporter)

    def classify(self, x: Tensor) -> Tensor:
        """The class, of those that the flow has, that each image is likeliest of, (b,)."""
        return torch.cat([self._classify(part) for part in torch.split(x, self._micro_batch)])

    def _classify(self, x: Tensor) -> Tensor:
        if isinstance(self.flow, ClassPriorFlow):
            found = self.flow.classify(x)
            self._advance(len(x))
            return found
        classes, each = self.flow.classes(), []
        for label in classes:
            each.append(self.flow.log_prob(x, label))
            self._advance(len(x))
        return torch.tensor(classes, device=x.device)[torch.stack(each, dim=1).argmax(1)]

    def _advance(self, evaluations: int) -> None:
        self._done += evaluations
        if time.monotonic() >= self._began + self._quiet:
            self._reported(self._done, self._total)
