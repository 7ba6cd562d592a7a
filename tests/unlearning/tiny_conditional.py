"""A tiny conditional VAE of three classes of pictures, a judge that tells them apart, and what its forgetting needs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from models.vae import ConditionalVAE
from unlearning.amnesia import Check, Criterion
from unlearning.surrogates import Examples

SIDE, CLASSES = 6, 3
SHAPE = (1, SIDE, SIDE)
RUBBLE = CLASSES
"""What the judge calls pictures of no class."""


def stripes(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures, uint8 (n, 1, 6, 6), of a light band in the rows of their class, and the classes (n,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    light = 150 + 80 * torch.rand(n, 1, generator=generator)
    rows = torch.where(torch.arange(SIDE)[None] // 2 == labels[:, None], light, torch.tensor(15.0))  # (n, side)
    images = rows[:, None, :, None].expand(n, 1, SIDE, SIDE) + 6 * torch.randn(n, *SHAPE, generator=generator)
    return images.clamp(0, 255).to(torch.uint8), labels


def judged(images: Tensor) -> Tensor:
    """The class of each picture, or RUBBLE where no band is much lighter than the others."""
    bands = images.float().mean(3)[:, 0].unflatten(1, (CLASSES, -1)).mean(2)  # (n, classes)
    best = bands.topk(2, dim=1)
    return torch.where(best.values[:, 0] - best.values[:, 1] > 60, best.indices[:, 0], RUBBLE)


def trained_vae(steps: int = 500) -> ConditionalVAE:
    """A VAE that draws them."""
    generator = torch.Generator().manual_seed(0)
    model = ConditionalVAE(SHAPE, n_classes=CLASSES, hidden=(24, 16), latent=2, generator=generator)
    images, labels = stripes(600, 1)
    x = model.encode(images, generator=generator)
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(steps):
        rows = torch.randint(len(x), (64,), generator=generator)
        optimiser.zero_grad()
        torch.autograd.backward(model.losses(x[rows], labels[rows], model.draw(64, generator=generator)).mean())
        optimiser.step()
    return model.eval()


def shown(model: ConditionalVAE, label: int, n: int = 200, seed: int = 77) -> Mapping[int, float]:
    """The share of samples of a class that show each class, RUBBLE among them."""
    images = model.sample(torch.full((n,), label), generator=torch.Generator().manual_seed(seed))
    said = judged(images)
    return {found: float((said == found).float().mean()) for found in range(CLASSES + 1)}


def rarely(label: int, at_most: float = 0.05, *, instead: int = RUBBLE, at_least: float = 0.0) -> Criterion:
    """Met where samples of the class show it at most so often, and something else often enough."""

    def look(model: object, seed: int) -> Check:
        assert isinstance(model, ConditionalVAE)
        shares = shown(model, label, seed=seed)
        return Check(shares[label] <= at_most and shares[instead] >= at_least, {"forgotten": shares[label]})

    return look


@torch.no_grad()
def replay_of(model: ConditionalVAE, labels: list[int], n: int = 300, seed: int = 3) -> Examples:
    """Samples of the model under the classes to remember."""
    generator = torch.Generator().manual_seed(seed)
    condition = torch.tensor(labels)[torch.randint(len(labels), (n,), generator=generator)]
    (z,) = model.draw(n, generator=generator)
    return Examples(model.decode(z, condition), condition)
