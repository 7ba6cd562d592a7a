"""The kernel distance: a naive sum, a closed form, nothing for equal distributions, and a floor that holds."""

import math

import numpy as np
import pytest
import torch

from evidence.kid import RANK, Extractor, _discrepancy, _shuffled, kid, kid_beside_floor, pca_extractor


def normal(n, d=3, mean=0.0, seed=0):
    return mean + torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(n, seed, contrast=40.0):
    noise = torch.randn(n, 1, 6, 6, generator=torch.Generator().manual_seed(seed))
    return (128 + contrast * noise).clamp(0, 255).to(torch.uint8)


FLAT = Extractor("pixels", lambda images: images.flatten(1).double() / 64 - 2)


BARE = Extractor("as given", lambda features: features)


def naive(x, y):
    def k(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_the_value_is_the_mean_of_naive_sums_over_blocks():
    # Within a block all pictures are alike, so that any shuffle gives blocks of which the sums are known.
    x, y = torch.ones(32, 2) * torch.tensor([1.0, 2.0]), torch.ones(32, 2) * torch.tensor([0.0, 1.0])

    assert kid(x, y, seed=1).value == pytest.approx(naive(x[:4].double(), y[:4].double()))


def test_a_block_is_the_naive_sum():
    x, y = normal(7, seed=1), normal(5, mean=0.5, seed=2)

    assert _discrepancy(x, y) == pytest.approx(naive(x, y), rel=1e-9)


def test_equal_distributions_are_at_zero_in_the_mean():
    values = [kid(normal(64, seed=i), normal(64, seed=1000 + i), seed=i).value for i in range(200)]

    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def test_shifted_normals_are_as_far_apart_as_the_closed_form_says():
    # d = 1: k = (ab + 1)^3, so that the squared discrepancy is 3 (m1)^2 + 3 (m2)^2 + (m3)^2 over the differences of
    # the first three moments; of N(0, 1) and N(.5, 1) these differ by .5, .25 and 1.625.
    exact = 3 * 0.5**2 + 3 * 0.25**2 + 1.625**2

    found = kid(normal(8000, d=1, seed=3), normal(8000, d=1, mean=0.5, seed=4), seed=5)

    assert abs(found.value - exact) < 4 * found.standard_error
    assert found.standard_error < 0.1 * exact


def test_the_standard_error_is_that_of_repetitions():
    found = [kid(normal(160, seed=i), normal(160, mean=0.3, seed=1000 + i), seed=i) for i in range(150)]

    spread = np.std([one.value for one in found], ddof=1)
    assert np.mean([one.standard_error for one in found]) == pytest.approx(spread, rel=0.2)


def test_the_same_seed_gives_the_same_value():
    x, y = normal(50, seed=1), normal(60, seed=2)

    assert kid(x, y, seed=3) == kid(x, y, seed=3) != kid(x, y, seed=4)


def test_all_shufflings_come_from_one_kernel():
    x, y = normal(9, seed=1), normal(6, mean=0.5, seed=2)
    pooled = torch.cat([x, y])

    value, shuffled = _shuffled(x, y, 40, torch.Generator().manual_seed(3))

    keys = torch.rand(15, 40, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    dealt = [keys[:, k].argsort() for k in range(40)]
    assert value == pytest.approx(naive(x, y), rel=1e-9)
    assert shuffled.tolist() == pytest.approx([naive(pooled[one[:9]], pooled[one[9:]]) for one in dealt], rel=1e-9)


def test_of_ten_equal_distributions_one_is_told_apart_in_one_of_twenty_groups():
    groups, apart = 60, 0
    for group in range(groups):
        told = [
            kid_beside_floor(
                normal(40, seed=1000 * group + k), normal(33, seed=1000 * group + 500 + k), BARE, seed=k, comparisons=10
            ).within_noise
            for k in range(10)
        ]
        apart += not all(told)

    # At 5 % more than 8 of 60 come in 1 of 300 runs; a floor for one distance alone would tell 24 of 60 apart.
    assert apart <= 8


def test_the_place_of_the_value_among_the_shufflings_is_uniform_under_equal_distributions():
    places = []
    for i in range(400):
        value, shuffled = _shuffled(
            normal(20, seed=2 * i), normal(35, seed=2 * i + 1), 99, torch.Generator().manual_seed(i)
        )
        places.append(int((shuffled >= value).sum()) + 1)

    counts = np.histogram(places, bins=np.arange(0.5, 101, 20))[0]
    assert len(counts) == 5
    assert np.abs(counts - 80).max() < 4 * 8  # binomial: 400 in fifths, deviation 8
    assert np.mean(np.array(places) <= RANK) == pytest.approx(0.05, abs=4 * 0.011)


@pytest.mark.parametrize(("n", "shift", "least"), [(150, 0.3, 19), (600, 0.15, 19)])
def test_a_shift_is_told_from_noise_among_ten(n, shift, least):
    told = [
        kid_beside_floor(
            normal(n, d=8, seed=i), normal(n, d=8, mean=shift, seed=100 + i), BARE, seed=i, comparisons=10
        ).within_noise
        for i in range(20)
    ]

    assert told.count(False) >= least


def test_more_comparisons_raise_the_floor():
    floors = [
        kid_beside_floor(normal(60, seed=1), normal(60, seed=2), BARE, seed=3, comparisons=k).floor for k in (1, 10, 50)
    ]

    assert floors == sorted(floors)
    assert floors[0] > 0


def test_pictures_of_another_source_do_not():
    other = kid_beside_floor(pictures(200, 1), pictures(200, 2) // 2 + 60, FLAT, seed=1)

    assert other.within_noise is False
    assert other.value > other.floor > 0


@pytest.mark.parametrize(("n", "m"), [(0, 50), (50, 0), (31, 31)])
def test_too_few_pictures_are_a_result(n, m):
    found = kid_beside_floor(pictures(n, 1), pictures(m, 2), FLAT, seed=1)

    assert math.isnan(found.value)
    assert (found.standard_error, found.floor, found.within_noise) == (None, None, None)


def test_features_that_are_no_numbers_are_a_result():
    broken = Extractor("broken", lambda images: torch.full((len(images), 2), math.nan))

    assert math.isnan(kid_beside_floor(pictures(80, 1), pictures(80, 2), broken, seed=1).value)


def test_the_default_extractor_says_what_it_is():
    base = pictures(64, 1)
    extractor = pca_extractor(base)

    assert "principal components" in kid_beside_floor(base, pictures(64, 2), extractor, seed=1).extractor
    assert extractor.features(base).shape == (64, 36)
