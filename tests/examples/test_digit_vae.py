"""The VAE of digits: a base from a recipe, kept under its name, and figures that say what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples.digit_vae import ARCHITECTURE, RECIPE, SHAPE, VAE, digit_vae, sample_figures
from examples.digits import DigitClassifier
from models.checkpoints import read_manifest
from models.vae import ConditionalVAE

MOMENT = replace(RECIPE, steps=3, batch=8)


def test_the_base_has_the_papers_sizes() -> None:
    assert ARCHITECTURE == {"hidden": [512, 256], "latent": 8, "n_classes": 10}


def test_a_base_is_trained_once_and_kept_under_its_recipe(tmp_path: Path) -> None:
    first = digit_vae(tmp_path, MOMENT)
    written = VAE.path(tmp_path, MOMENT).stat().st_mtime_ns

    again = digit_vae(tmp_path, MOMENT)

    assert VAE.path(tmp_path, MOMENT).stat().st_mtime_ns == written
    assert VAE.path(tmp_path, MOMENT) != VAE.path(tmp_path, replace(MOMENT, steps=4))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    extra = read_manifest(VAE.path(tmp_path, MOMENT)).extra
    assert 0 < extra["nats_per_image_held_out"] < 1000
    assert extra["recipe"]["steps"] == 3


def test_the_figures_of_a_vae_that_draws_one_digit_are_the_classifiers() -> None:
    classifier = DigitClassifier(28)
    with torch.no_grad():
        for p in classifier.parameters():
            p.zero_()
        classifier.linear2.bias[4] = torch.log(torch.tensor(9.0))  # P(4) = 1/2, all others 1/18
    model = ConditionalVAE(SHAPE, n_classes=10, hidden=(4,), latent=2)

    figures = sample_figures(model, classifier, n=3)

    assert figures["p"] == [0.5 if digit == 4 else round(1 / 18, 4) for digit in range(10)]
    assert figures["entropy"] == [pytest.approx(0.5 * torch.log(torch.tensor(36.0)).item(), abs=1e-4)] * 10
    assert figures["samples"] == 3
