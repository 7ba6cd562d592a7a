"""The diffusion model of digits: a base from a recipe, kept under its name, and figures that say what is drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from examples.digit_ddpm import ARCHITECTURE, DDPM, RECIPE, SHAPE, digit_ddpm, load, sample_figures
from examples.digits import DigitClassifier
from models.checkpoints import read_manifest
from models.ddpm import ClassDDPM

MOMENT = replace(RECIPE, steps=2, batch=4)


def test_the_digits_are_small_and_evenly_split() -> None:
    digits = load()

    assert (digits.training.shape, digits.held_out.shape) == ((4500, *SHAPE), (500, *SHAPE))
    assert digits.held_out_labels.bincount().tolist() == [50] * 10
    assert int(digits.training.max()) > 200


def test_a_base_is_trained_once_and_kept_under_its_recipe(tmp_path: Path) -> None:
    first = digit_ddpm(tmp_path, MOMENT)
    written = DDPM.path(tmp_path, MOMENT).stat().st_mtime_ns

    again = digit_ddpm(tmp_path, MOMENT)

    assert DDPM.path(tmp_path, MOMENT).stat().st_mtime_ns == written
    assert DDPM.path(tmp_path, MOMENT) != DDPM.path(tmp_path, replace(MOMENT, steps=4))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in first.state_dict().items())
    extra = read_manifest(DDPM.path(tmp_path, MOMENT)).extra
    assert 0 < extra["squared_error_per_image_held_out"] < 200
    assert extra["recipe"]["steps"] == 2


def test_the_figures_are_the_classifiers() -> None:
    classifier = DigitClassifier(8)
    with torch.no_grad():
        for p in classifier.parameters():
            p.zero_()
        classifier.linear2.bias[4] = torch.log(torch.tensor(9.0))  # P(4) = 1/2, all others 1/18
    model = ClassDDPM(SHAPE, **{**ARCHITECTURE, "sampling": {"steps": 1, "guidance_scale": 1.0}})

    figures = sample_figures(model, classifier, n=2)

    assert figures["p"] == [0.5 if digit == 4 else round(1 / 18, 4) for digit in range(10)]
    assert (figures["accuracy"], figures["samples"]) == (0.1, 2)
