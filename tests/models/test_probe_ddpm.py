"""The probe of a diffusion model of classes: sound ones pass, and each way of being useless has its own words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from models.conditional import Sampling
from models.ddpm import ClassDDPM
from models.errors import UnusableModelError
from models.probe import probe
from models.training import TransformerRecipe, fit_flow
from tests.models.flow_table import generator

SIZES: dict[str, Any] = {"channels": [16], "layers": 1, "attention": False, "n_classes": 2, "middle_attention": False}
RECIPE = TransformerRecipe(
    steps=150, batch=16, learning_rate=4e-3, warmup=10, flip=False, shift=0, average=0.9, label_drop=0.2
)


def fresh(**sizes: Any) -> ClassDDPM:
    return ClassDDPM((1, 6, 6), **{**SIZES, **sizes}, generator=generator())


def fitted(model: ClassDDPM, recipe: TransformerRecipe = RECIPE) -> ClassDDPM:
    """One that has seen dark images of class 0 and bright ones of class 1, for seconds."""
    draws = generator(1)
    labels = torch.arange(80) % 2
    level = 20 + 200 * labels.view(-1, 1, 1, 1)
    images = (level + 10 * torch.randn(80, 1, 6, 6, generator=draws)).clamp(0, 255).to(torch.uint8)
    fit_flow(model, images, recipe, n_bits=8, generator=draws, labels=labels)
    return model


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return fitted(fresh()).state_dict()


@pytest.fixture
def trained(weights: dict[str, torch.Tensor]) -> ClassDDPM:
    model = fresh()
    model.load_state_dict(weights)
    return model.eval()


def test_a_trained_one_passes_without_a_warning_and_is_left_as_it_was(trained: ClassDDPM) -> None:
    trained.sampling = Sampling(17, 4.0)

    assert probe(trained) == []
    assert trained.sampling == Sampling(17, 4.0)


def test_what_was_trained_draws_its_classes(trained: ClassDDPM) -> None:
    dark, light = trained.sample(torch.tensor([0, 1]), generator=generator()).float().mean((1, 2, 3))

    assert dark < 80 < 160 < light


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_fresh_one_passes_with_a_word(kind: str) -> None:
    (warning,) = probe(fresh(scheduler={"prediction_type": kind}, n_classes=10))

    assert "hardly trained" in warning


def test_classes_that_make_no_difference_are_told(trained: ClassDDPM) -> None:
    with torch.no_grad():
        trained.unet.class_embedding.weight.zero_()

    assert any("classes make no difference" in warning for warning in probe(trained))


def test_a_null_class_that_was_never_trained_is_told(trained: ClassDDPM) -> None:
    with torch.no_grad():
        trained.unet.class_embedding.weight[-1] = 100 * torch.randn(64, generator=generator(4))

    assert any("hardly trained without classes" in warning for warning in probe(trained))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_labels_are_dropped_in_training_as_the_recipe_says(share: float) -> None:
    before = fresh().unet.class_embedding.weight

    after = fitted(fresh(), replace(RECIPE, label_drop=share, steps=3, weight_decay=0.0)).unet.class_embedding.weight

    moved = (after != before).any(dim=1).tolist()
    assert moved == ([True, True, False] if share == 0 else [False, False, True])


def overflowing(model: ClassDDPM) -> None:
    model.unet.conv_out.weight.mul_(1e38)


def not_a_number(model: ClassDDPM) -> None:
    model.unet.conv_in.weight.mul_(1e38)
    model.unet.conv_out.bias.fill_(torch.inf)


def another_scale(model: ClassDDPM) -> None:
    model.unet.conv_out.weight.mul_(-3)


def test_one_that_draws_grey_whatever_it_is_given_is_refused() -> None:
    with pytest.raises(UnusableModelError, match="same image"):
        probe(fresh(scheduler={"prediction_type": "sample"}))


def constant(model: ClassDDPM) -> None:
    model.unet.conv_out.weight.zero_()
    model.unet.conv_out.bias.fill_(-1e4)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (overflowing, "not finite"),
        (not_a_number, "not finite"),
        (another_scale, "as far off as saying nothing.*'epsilon'"),
        (constant, "same image"),
    ],
)
def test_what_no_job_could_use_is_refused(
    damage: Callable[[ClassDDPM], None], message: str, trained: ClassDDPM
) -> None:
    with torch.no_grad():
        damage(trained)

    with pytest.raises(UnusableModelError, match=message):
        probe(trained)


def test_weights_of_another_prediction_are_refused_or_told(weights: dict[str, torch.Tensor]) -> None:
    model = fresh(scheduler={"prediction_type": "v_prediction"})
    model.load_state_dict(weights)

    try:
        said = " ".join(probe(model))
    except UnusableModelError as error:
        said = str(error)

    assert "hardly trained" in said or "prediction type" in said
