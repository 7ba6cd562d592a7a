"""The probe of a VAE: sound ones pass, and each way of being useless is refused with its own words."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from models.errors import UnusableModelError, WrongKindError
from models.probe import probe
from models.training import fit_flow
from models.training_recipes import TrainingRecipe
from models.vae import ConditionalVAE
from tests.models.flow_table import generator


@pytest.fixture
def trained() -> ConditionalVAE:
    """One that has seen dark images of class 0 and bright ones of class 1, for a second."""
    draws = generator(1)
    labels = torch.arange(80) % 2
    level = 20 + 200 * labels.view(-1, 1, 1, 1)
    images = (level + 10 * torch.randn(80, 1, 6, 6, generator=draws)).clamp(0, 255).to(torch.uint8)
    model = fresh()
    recipe = TrainingRecipe(steps=120, learning_rate=1e-2, flip=False)
    fit_flow(model, images, recipe, n_bits=8, generator=draws, labels=labels)
    return model


def fresh() -> ConditionalVAE:
    return ConditionalVAE((1, 6, 6), n_classes=2, hidden=(16, 8), latent=2, generator=generator())


def test_a_trained_one_passes_without_a_warning(trained: ConditionalVAE) -> None:
    assert probe(trained) == []


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 28, 28), (3, 16, 16)])
def test_a_fresh_one_passes_with_a_word(shape: tuple[int, int, int]) -> None:
    (warning,) = probe(ConditionalVAE(shape, n_classes=10, generator=generator()))

    assert "hardly trained" in warning


def test_classes_that_make_no_difference_are_told(trained: ConditionalVAE) -> None:
    with torch.no_grad():
        trained.decoder[0].weight[:, trained.latent :] = 0

    assert any("classes make no difference" in warning for warning in probe(trained))


def constant(model: ConditionalVAE) -> None:
    model.decoder[-1].weight.zero_()


def overflowing(model: ConditionalVAE) -> None:
    model.encoder[-1].weight.mul_(1e30)


def not_a_number(model: ConditionalVAE) -> None:
    model.decoder[-1].weight.mul_(1e30)
    model.decoder[-2].weight.mul_(1e30)


def strangers(model: ConditionalVAE) -> None:
    """The encoder of a model whose latents are thirty times as wide."""
    model.encoder[-1].weight[: model.latent] *= 30
    model.encoder[-1].bias[: model.latent] *= 30


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (constant, "same image"),
        (overflowing, "not finite|NaN"),
        (not_a_number, "not finite|NaN"),
        (strangers, "do not belong together"),
    ],
)
def test_what_no_job_could_use_is_refused(
    damage: Callable[[ConditionalVAE], None], message: str, trained: ConditionalVAE
) -> None:
    with torch.no_grad():
        damage(trained)

    with pytest.raises(UnusableModelError, match=message):
        probe(trained)


def test_weights_of_zero_are_refused() -> None:
    with pytest.raises(UnusableModelError, match="same image"):
        probe(ConditionalVAE((1, 6, 6), n_classes=2))


def test_what_is_neither_is_refused() -> None:
    with pytest.raises(WrongKindError, match="Linear is neither a flow nor a VAE"):
        probe(nn.Linear(2, 2))  # type: ignore[arg-type]  # what a caller could hand over
