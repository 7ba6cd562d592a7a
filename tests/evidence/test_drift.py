"""Laws of drift, divergence and sample health."""

import math

import numpy as np
import pytest
import torch

from evidence.drift import SampleHealth, draw_samples, kl_per_dim, nll_drift, sample_health
from evidence.flow_evaluation import HEALTH_SAMPLES


def test_equal_models_neither_drift_nor_diverge(gaussian_flow):
    flow, nll = gaussian_flow(), np.arange(5.0)

    assert nll_drift(nll, nll, 2.0).value == 0
    assert kl_per_dim(flow, gaussian_flow(), draw_samples(flow, 20, seed=1)).value == 0


def test_drift_sees_changes_that_cancel_in_the_mean():
    drift = nll_drift(np.zeros(4), np.array([3.0, -3.0, 3.0, -3.0]), sigma_base=2.0)

    assert drift.value == 1.5


def test_divergence_of_gaussians_is_its_closed_form(gaussian_flow):
    base, tamed = gaussian_flow(0.0, 0.25), gaussian_flow(0.1, 0.3)
    exact = math.log(0.3 / 0.25) + (0.25**2 + 0.1**2) / (2 * 0.3**2) - 0.5

    found = kl_per_dim(base, tamed, draw_samples(base, 2000, seed=2))

    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.01


@pytest.mark.parametrize("sigma", [0.0, math.nan])
def test_drift_without_a_scale_is_nan(sigma):
    assert math.isnan(nll_drift(np.zeros(2), np.ones(2), sigma).value)


def test_likelihoods_that_are_not_finite_give_nan():
    assert math.isnan(nll_drift(np.zeros(2), np.array([1.0, math.inf]), 1.0).value)


def test_equal_seeds_give_equal_latents_whatever_the_model(gaussian_flow):
    base, tamed = gaussian_flow(0.0, 0.25), gaussian_flow(0.1, 0.25)

    torch.testing.assert_close(draw_samples(base, 5, seed=3) + 0.1, draw_samples(tamed, 5, seed=3))


def test_samples_of_a_sound_flow_are_healthy(gaussian_flow):
    flow = gaussian_flow()

    health = sample_health(flow, draw_samples(flow, 50, seed=4))

    assert (health.finite, health.as_good_as(health)) == (1, True)
    assert health.in_range == pytest.approx(0.954, abs=0.03)  # P(|z| < 2)
    assert health.round_trip_error < 1e-5


@pytest.mark.parametrize("std", [math.nan, math.inf, 5.0])
def test_broken_samples_are_not_as_good(gaussian_flow, std):
    base, broken = gaussian_flow(), gaussian_flow(0.0, std)

    before, after = (sample_health(flow, draw_samples(flow, 20, seed=5)) for flow in (base, broken))

    assert not after.as_good_as(before)


def test_an_unsound_base_does_not_fail_what_is_as_sound_as_it_is():
    base, equal, worse = (SampleHealth(32, finite, 0.99, 0.2) for finite in (0.84, 0.81, 0.5))

    assert (base.sound, equal.as_good_as(base), worse.as_good_as(base)) == (False, True, False)


@pytest.mark.parametrize("n", [HEALTH_SAMPLES, 2000])
@pytest.mark.parametrize("share", [0.0, 0.005, 0.015, 0.03])
def test_a_model_that_is_as_sound_as_its_base_hardly_ever_fails_by_chance(share, n):
    broken = np.random.default_rng(0).binomial(n, share, (2000, 2))
    pairs = [[SampleHealth(n, 1 - k / n, 0.99, 1e-6) for k in row] for row in broken]

    failed = np.mean([not tamed.as_good_as(base) for base, tamed in pairs])

    assert failed < 0.02


def test_a_tenth_of_broken_samples_fails_against_a_sound_base():
    base, tamed = SampleHealth(64, 1.0, 0.99, 1e-6), SampleHealth(64, 58 / 64, 0.99, 1e-6)

    assert not tamed.as_good_as(base)


def test_a_hundredth_of_broken_samples_fails_where_many_were_drawn():
    base = SampleHealth(2000, 1.0, 0.99, 1e-6)

    assert not SampleHealth(2000, 0.99, 0.99, 1e-6).as_good_as(base)
    assert SampleHealth(64, 63 / 64, 0.99, 1e-6).as_good_as(base)  # one of 64 says little


def test_a_flow_that_draws_no_picture_at_all_is_as_good_as_none():
    nothing = SampleHealth(64, 0.0, 0.0, None)

    assert not nothing.as_good_as(nothing)


def test_a_flow_without_an_inverse_has_no_round_trip(images):
    class Bare:
        def log_prob(self, x):
            return x.flatten(1).sum(1)

        def sample(self, n, *, generator, temperature=1.0):
            return torch.zeros(n, 1, 4, 4)

    assert sample_health(Bare(), draw_samples(Bare(), 3, seed=1)).round_trip_error is None


def test_no_samples_are_refused(gaussian_flow):
    with pytest.raises(ValueError, match="at least one"):
        draw_samples(gaussian_flow(), 0, seed=1)
