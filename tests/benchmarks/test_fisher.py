"""The benchmark of the Fisher information: what its figures are made of, and that both sides have the same pairs."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from benchmarks.fisher import GOALS, MOST_ERROR, Error, Side, error, summary, unet_side, vae_side

VAE = Side([40.0, 42.0, 80.0], [0.5, 0.4, 1.0], Error(1e-6, 1e-4), Error(2e-6, 2e-4), "hooks")
UNET = Side([30.0, 33.0], [1.5, 1.5], Error(2e-6, 1e-3), Error(2e-6, 1e-3), "autograd")


def test_speedups_are_of_medians_with_the_range_of_rounds_beside_them() -> None:
    figures = summary(VAE, UNET)

    assert (figures["vae_speedup"], figures["vae_speedup_range"]) == (84.0, [80.0, 105.0])
    assert (figures["unet_speedup"], figures["unet_max_relative_error"]) == (21.0, 2e-6)
    assert figures["within_goals"] is True
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_a_ratio_or_an_error_beyond_its_goal_is_a_miss_however_little() -> None:
    slow = dataclasses.replace(UNET, loop=[math.nextafter(GOALS["unet"], 0)], ours=[1.0])
    wrong = dataclasses.replace(VAE, error=Error(math.nextafter(MOST_ERROR, 1), 0.0))

    assert summary(VAE, slow)["within_goals"] is False
    assert summary(wrong, UNET)["within_goals"] is False


def test_a_quick_run_says_nothing_about_the_goals() -> None:
    assert summary(VAE, UNET, quick=True)["within_goals"] is None


def test_errors_are_told_over_the_tensor_and_over_the_entry() -> None:
    exact = {"w": torch.tensor([1.0, 100.0, 1e-9]), "v": torch.tensor([2.0])}
    found = {"w": torch.tensor([1.5, 100.0, 1e-3]), "v": torch.tensor([2.0])}

    assert error(found, exact).scaled == pytest.approx(0.005)
    assert error(found, exact).entrywise == pytest.approx(0.5)


def test_both_sides_compute_the_same_quantity() -> None:
    vae, unet = vae_side(1, 6), unet_side(1, 4, 2, 3)

    assert vae.estimator == "hooks"
    assert unet.estimator == "autograd"
    assert max(vae.error.scaled, unet.error.scaled) < 1e-4  # few examples: rounding is not averaged yet
