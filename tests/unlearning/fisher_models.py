"""Small conditional models whose Fisher information tests compute, and the naive loop to hold it against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.conditional import ConditionalModel, Draws
from unlearning.fisher import Plan, draws_of

CLASSES = 3


class Small(nn.Module):
    """What these models share of `models.conditional`."""

    def encode(self, images: Tensor, *, generator: torch.Generator) -> Tensor:
        """Images as they are."""
        return images.float()

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """No test draws samples."""
        raise NotImplementedError

    def scopes(self) -> Mapping[str, Sequence[str]]:
        """All of it."""
        return {"all": [name for name, _ in self.named_parameters()]}


class MlpVae(Small):
    """Linear layers, each applied once a pass to (n, features), with dropout that eval mode must switch off."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(12 + CLASSES, 10), nn.Linear(10, 2 * 4)
        self.third, self.fourth = nn.Linear(4 + CLASSES, 10), nn.Linear(10, 12)
        self.dropout = nn.Dropout(0.5)

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """(eps,)."""
        return (torch.randn(n, 4, generator=generator),)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """The negative ELBO, (n,)."""
        label = F.one_hot(condition, CLASSES).to(x.dtype)
        hidden = self.dropout(torch.tanh(self.first(torch.cat([x, label], 1))))
        mean, log_variance = self.second(hidden).chunk(2, 1)
        z = mean + torch.exp(0.5 * log_variance) * draws[0]
        logits = self.fourth(torch.relu_(self.third(torch.cat([z, label], 1))))
        divergence = 0.5 * (mean.square() + log_variance.exp() - log_variance - 1).sum(1)
        return F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1) + divergence


class TiedVae(MlpVae):
    """One layer's weights used a second time, out of its own call, where no hook on a layer sees them."""

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        again = F.linear(x[:, :10], self.fourth.weight[:10])
        return super().losses(x, condition, draws) + again.square().sum(1)


class SharedVae(MlpVae):
    """Two layers that hold one and the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(10, 12)
        self.extra.weight = self.fourth.weight

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        return super().losses(x, condition, draws) + self.extra(x[:, :10]).square().sum(1)


class TwiceVae(MlpVae):
    """A layer that is applied twice a pass."""

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        return super().losses(x, condition, draws) + self.fourth(x[:, :10]).square().sum(1)


class AddingVae(MlpVae):
    """Two layers whose outputs are added up, so that one tensor is the slope of both."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(4, 12)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        label = F.one_hot(condition, CLASSES).to(x.dtype)
        hidden = self.third(torch.cat([draws[0], label], 1)).sigmoid()
        found: Tensor = (self.fourth(hidden) + self.extra(draws[0]) - x).square().sum(1)
        return found


class MoodyVae(MlpVae):
    """A layer that is applied a second time where an input is all but white."""

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        losses = super().losses(x, condition, draws)
        return losses + self.fourth(x[:, :10]).sum(1) if bool((x[:, 0] == 0.999).any()) else losses


class SequenceVae(MlpVae):
    """A layer over rows that are not examples: (2 n, features)."""

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        rows = torch.stack([x, x.flip(1)], 1).flatten(0, 1)
        extra = self.third(rows[:, : 4 + CLASSES]).square().sum(1).unflatten(0, (-1, 2)).sum(1)
        return F.binary_cross_entropy(torch.sigmoid(self.fourth(draws[0].repeat(1, 3)[:, :10])), x) + extra


class TinyDiffusion(Small):
    """Convolution, norms, attention with biases, an embedding: timesteps and noise as draws."""

    steps = terms = 20

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.time, self.label = nn.Embedding(self.steps, width), nn.Embedding(CLASSES, width)
        self.first, self.last = nn.Conv2d(2, width, 3, padding=1), nn.Conv2d(width, 2, 3, padding=1)
        self.norm, self.rows = nn.GroupNorm(2, width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def draw(self, n: int, *, generator: torch.Generator) -> Draws:
        """(timesteps, noise)."""
        return torch.randint(self.steps, (n,), generator=generator), torch.randn(n, 2, 4, 4, generator=generator)

    def draw_stratified(self, n: int, *, generator: torch.Generator) -> Draws:
        """(timesteps, noise), spread."""
        t = (torch.arange(n) + torch.rand(n, generator=generator)) / n * self.steps
        return t.long().clamp(max=self.steps - 1), torch.randn(n, 2, 4, 4, generator=generator)

    def losses(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """(n,)."""
        t, noise = draws
        kept = (1 - (t.to(x.dtype) + 0.5) / self.steps)[:, None, None, None]
        e = (self.time(t) + self.label(condition))[:, :, None, None]
        h = F.silu(self.norm(self.first(kept.sqrt() * x + (1 - kept).sqrt() * noise) + e))
        rows = self.rows(h.flatten(2).transpose(1, 2))
        mixed = F.scaled_dot_product_attention(self.query(rows), self.key(rows), self.value(rows))
        return (self.last(h + mixed.transpose(1, 2).reshape(h.shape)) - noise).square().flatten(1).sum(1)


def made(kind: type[Small], seed: int = 0) -> ConditionalModel:
    """A model with weights of its own seed, nothing global."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind()
    return cast(ConditionalModel, model)


def examples(model: ConditionalModel, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """x and conditions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (n, 2, 4, 4) if isinstance(model, TinyDiffusion) else (n, 12)
    return torch.rand(shape, generator=generator), torch.randint(CLASSES, (n,), generator=generator)


def naive(
    model: ConditionalModel,
    x: Tensor,
    condition: Tensor,
    *,
    draws: int,
    plan: Plan,
    seed: int,
    rows: range | None = None,
) -> dict[str, Tensor]:
    """The loop that nobody doubts: batch 1, autograd, square, average."""
    module = cast(nn.Module, model).eval()
    totals = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in module.named_parameters()}
    rows = range(len(x)) if rows is None else rows
    for row in rows:
        drawn = draws_of(model, row, row + 1, draws, plan, seed)
        loss = torch.zeros(())
        for k in range(draws):
            one = tuple(value[k : k + 1] for value in drawn)
            loss = loss + model.losses(x[row : row + 1], condition[row : row + 1], one).sum()
        gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        for name, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                totals[name] += gradient.double().square()
    return {name: value / len(rows) for name, value in totals.items()}
