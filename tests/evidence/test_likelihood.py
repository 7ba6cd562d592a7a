"""Laws of the likelihoods: closed forms, shared noise, and no dependence on how images are batched."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evidence.likelihood import NllAccumulator, bits_per_dim, derive_seed, image_nll


def test_nll_of_a_gaussian_flow_is_its_closed_form(gaussian_flow, images):
    flow, pictures, draws = gaussian_flow(mean=0.1, std=0.3), images(3), 4000
    d = torch.div(pictures, 8, rounding_mode="floor").double() / 32 - 0.5 - 0.1
    squares = d**2 + d / 32 + 1 / (3 * 32**2)  # E (d + u / 32)^2 with u ~ U(0, 1)
    expected = (squares / (2 * 0.3**2)).flatten(1).sum(1) + 16 * (math.log(0.3) + 0.5 * math.log(2 * math.pi))

    found = image_nll(flow, pictures, n_bits=5, draws=draws, seed=1)

    error = found.noise_std / math.sqrt(draws)
    assert (np.abs(found.nll - expected.numpy()) < 5 * error).all()  # five standard errors of the noise


def test_equal_seeds_share_their_noise_and_others_do_not(gaussian_flow, images):
    one, again, other = (image_nll(gaussian_flow(), images(5), n_bits=5, draws=2, seed=s).nll for s in (1, 1, 2))

    assert (one == again).all()
    assert (one != other).all()


@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(0, 12), max_size=4), draws=st.integers(1, 4), batch_size=st.integers(1, 20))
def test_accumulator_gives_the_number_of_one_call(gaussian_flow, images, cuts, draws, batch_size):
    flow, pictures = gaussian_flow(), images(12)
    bounds = [0, *sorted(cuts), 12]
    accumulator = NllAccumulator(flow, n_bits=5, draws=draws, seed=3, batch_size=batch_size)

    for start, stop in pairwise(bounds):
        accumulator.update(pictures[start:stop])

    whole = image_nll(flow, pictures, n_bits=5, draws=draws, seed=3)
    np.testing.assert_allclose(accumulator.result().nll, whole.nll, rtol=1e-5)  # float32 sums in another order


def test_a_prefix_of_the_images_gives_a_prefix_of_the_values(gaussian_flow, images):
    flow, pictures = gaussian_flow(), images(9)

    whole = image_nll(flow, pictures, n_bits=5, draws=3, seed=4).nll

    np.testing.assert_allclose(image_nll(flow, pictures[:4], n_bits=5, draws=3, seed=4).nll, whole[:4], rtol=1e-5)


def test_more_draws_mean_less_noise(gaussian_flow, images):
    few, many = (
        np.stack([image_nll(gaussian_flow(), images(8), n_bits=3, draws=k, seed=s).nll for s in range(20)])
        .std(0)
        .mean()
        for k in (1, 16)
    )

    assert 2 < few / many < 8  # four is expected: the square root of 16


def test_no_images_are_a_result(gaussian_flow, images):
    assert image_nll(gaussian_flow(), images(0), n_bits=5, seed=1).n == 0


def test_uniform_density_scores_n_bits():
    assert bits_per_dim(0.0, dims=48, n_bits=5) == 5


def test_bits_per_dim_counts_nats_over_dims():
    assert bits_per_dim(48 * math.log(2), dims=48, n_bits=5) == pytest.approx(6)


@pytest.mark.parametrize("bad", [torch.zeros(2, 1, 4, 4), torch.zeros(1, 4, 4, dtype=torch.uint8)])
def test_anything_but_uint8_batches_is_refused(gaussian_flow, bad):
    with pytest.raises(ValueError, match="uint8"):
        image_nll(gaussian_flow(), bad, n_bits=5, seed=1)


def test_no_draws_are_refused(gaussian_flow, images):
    with pytest.raises(ValueError, match="draw"):
        image_nll(gaussian_flow(), images(1), n_bits=5, draws=0, seed=1)


@given(seed=st.integers(0, 2**63 - 1), purpose=st.text(max_size=5))
def test_derived_seeds_suit_a_generator(seed, purpose):
    torch.Generator().manual_seed(derive_seed(seed, purpose, 0))

    assert derive_seed(seed, purpose, 0) != derive_seed(seed, purpose, 1)
