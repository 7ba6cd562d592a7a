"""Laws of the quantiles, and of the test that says which of them to trust."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from evidence.quantiles import Reference, choose_primary, normality, quantile_drop

NORMAL = np.random.default_rng(1).normal(100, 15, 2000)
SKEWED = np.random.default_rng(2).exponential(15, 300)


def test_q_of_the_mean_is_a_half():
    reference = Reference.of(NORMAL)

    assert reference.gaussian(np.array([reference.mean])) == pytest.approx(0.5)


def test_gaussian_q_is_the_normal_tail():
    reference = Reference.of(NORMAL)
    at_four = np.array([reference.mean + 4 * reference.std])

    assert reference.gaussian(at_four) == pytest.approx(stats.norm.sf(4))


def test_sigma_is_over_n_as_in_equation_7():
    assert Reference.of(np.array([1.0, 3.0])).std == 1


def test_both_quantiles_agree_on_normal_values():
    reference = Reference.of(NORMAL)

    gap = reference.gaussian(NORMAL) - reference.empirical(NORMAL)

    assert np.abs(gap).max() < 1.36 / math.sqrt(2000) + reference.resolution  # Kolmogorov's 95 % band


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=30), st.floats(-1e7, 1e7))
def test_empirical_q_stays_within_its_rank_bounds(values, x):
    reference = Reference.of(np.array(values))

    q = reference.empirical(np.array([x]))[0]

    assert reference.resolution <= q <= 1
    assert q == (1 + sum(value >= x for value in values)) / (len(values) + 1)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=20))
def test_less_likely_images_have_no_higher_quantile(values):
    reference, x = Reference.of(np.array(values)), np.linspace(-2e6, 2e6, 50)

    assert (np.diff(reference.empirical(x)) <= 0).all()


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf], [2.0, 2.0]])
def test_too_little_reference_gives_nan_and_no_exception(values):
    reference = Reference.of(np.array(values))

    assert np.isnan(reference.gaussian(np.array([1.0, 5.0]))).all()


def test_identical_models_drop_exactly_nothing():
    q = np.linspace(0, 1, 7)

    drop = quantile_drop(q, q)

    assert (drop.value, drop.low, drop.high, drop.n) == (0, 0, 0, 7)


def test_interval_is_that_of_the_paired_t_test():
    rng = np.random.default_rng(3)
    before, after = rng.uniform(0.3, 0.6, 12), rng.uniform(0, 0.3, 12)

    drop = quantile_drop(before, after)

    outside = stats.ttest_rel(before, after).confidence_interval(0.95)
    assert (drop.low, drop.high) == (pytest.approx(outside.low), pytest.approx(outside.high))


def test_interval_stays_within_what_a_drop_can_be():
    drop = quantile_drop(np.array([1.0, 0.0]), np.array([0.0, 0.0]))

    assert (drop.low, drop.high) == (-1, 1)


@pytest.mark.parametrize("n", [0, 1])
def test_too_few_images_have_no_interval(n):
    drop = quantile_drop(np.full(n, 0.5), np.full(n, 0.1))

    assert (drop.low, drop.high, drop.n) == (None, None, n)


def test_a_skewed_sample_is_rejected():
    test = normality(SKEWED)

    assert test.rejected
    assert test.skew > 1


def test_a_normal_sample_is_not_rejected():
    assert normality(NORMAL[:300]).rejected is False


def test_level_is_kept_although_the_normal_is_fitted():
    rng = np.random.default_rng(4)
    tests = [normality(rng.normal(5, 2, 50)) for _ in range(200)]

    rejected = sum(bool(test.rejected) for test in tests)
    naive = sum(test.p_value_naive < 0.05 for test in tests)

    assert 2 <= rejected <= 21  # binomial(200, .05) leaves this range once in 1,000
    assert naive < 2  # what makes the textbook p-value useless here


def test_statistic_is_the_textbook_one():
    values = NORMAL[:200]

    outside = stats.kstest((values - values.mean()) / values.std(ddof=1), "norm")

    assert normality(values).statistic == pytest.approx(outside.statistic)


@given(shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_normality_ignores_shift_and_scale(shift, scale):
    assert normality(shift + scale * SKEWED[:40]).statistic == pytest.approx(normality(SKEWED[:40]).statistic)


@pytest.mark.parametrize("values", [np.zeros(0), np.arange(5.0), np.ones(50), np.full(50, math.nan)])
def test_too_few_or_useless_values_leave_normality_open(values):
    assert normality(values).rejected is None


def test_empirical_quantile_leads_where_normality_is_rejected():
    assert choose_primary(normality(SKEWED), normality(NORMAL[:300])).kind == "empirical"
    assert choose_primary(normality(NORMAL[:300]), normality(NORMAL[300:600])).kind == "gaussian"


def test_an_untested_gaussian_is_called_untested():
    assert "untested" in choose_primary(normality(np.arange(5.0)), normality(np.arange(5.0))).reason
