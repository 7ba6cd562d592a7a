"""Fractions: intervals that cover, sample counts that keep their promise, and bounds judged by the interval."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from evidence.errors import TargetError, UnknownClassError
from evidence.fractions import (
    POWER,
    Bound,
    count,
    fraction_of,
    judge,
    judge_fraction,
    samples_for,
    samples_to_pass,
)


@given(st.integers(1, 400), st.data())
@settings(max_examples=60, deadline=None)
def test_interval_is_clopper_and_pearsons(n, data):
    hits = data.draw(st.integers(0, n))

    ours = fraction_of(hits, n, confidence=0.9)

    theirs = binomtest(hits, n).proportion_ci(0.9, method="exact")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-9)
    assert ours.low <= ours.value <= ours.high


@pytest.mark.parametrize("rate", [0.0, 0.003, 0.1, 0.5, 0.97])
@pytest.mark.parametrize("n", [1, 20, 157])
def test_interval_covers_the_rate_as_often_as_it_says(rate, n):
    intervals = [fraction_of(hits, n) for hits in range(n + 1)]

    covered = sum(binom.pmf(hits, n, rate) for hits, one in enumerate(intervals) if one.low <= rate <= one.high)

    assert covered >= 0.95


def test_intervals_of_all_classes_hold_together():
    rates = np.array([0.05, 0.15, 0.3, 0.5])
    rng = np.random.default_rng(1)
    names = "abcd"
    hold = 0
    for _ in range(400):
        labels = torch.from_numpy(rng.choice(4, size=120, p=rates))
        found = count(labels, names)
        hold += all(found[name].low <= rate <= found[name].high for name, rate in zip(names, rates, strict=True))

    assert hold / 400 >= 0.95


def test_more_samples_narrow_the_interval():
    widths = [one.high - one.low for one in (fraction_of(n // 4, n) for n in (8, 40, 400, 4000))]

    assert widths == sorted(widths, reverse=True)


def test_two_classes_are_one_question():
    labels = torch.tensor([0] * 30 + [1] * 10)

    found = count(labels, ("no", "yes"))

    assert found["yes"].level == found["yes"].confidence == 0.95
    assert found["no"].low == pytest.approx(1 - found["yes"].high)


def test_an_empty_class_is_counted():
    assert count(torch.tensor([0, 0]), ("a", "b", "c"))["c"].value == 0


def test_a_label_without_a_name_is_refused():
    with pytest.raises(UnknownClassError, match="label 2"):
        count(torch.tensor([0, 2]), ("a", "b"))


@pytest.mark.parametrize(
    ("target", "tolerance"),
    [((0.5, 0.5), 0.03), ((0.1,) * 10, 0.03), ((0.02, 0.98), 0.01), ((0.3, 0.3, 0.4), 0.1)],
)
def test_a_flow_at_its_target_passes_as_often_as_promised(target, tolerance):
    n = samples_for(target, tolerance)
    rng = np.random.default_rng(2)
    names = [str(i) for i in range(len(target))]
    bounds = {name: Bound.around(p, tolerance) for name, p in zip(names, target, strict=True)}

    runs = rng.multinomial(n, target, size=300)
    passed = 0
    for hits in runs:
        comparisons = 1 if len(target) == 2 else len(target)
        found = {name: fraction_of(int(h), n, comparisons=comparisons) for name, h in zip(names, hits, strict=True)}
        passed += judge(found, bounds).told == "inside"

    assert passed / 300 >= POWER - 3 * math.sqrt(POWER * (1 - POWER) / 300)  # three errors of 300 runs


def test_sample_count_is_no_more_than_its_promise_needs():
    n = samples_for((0.5, 0.5), 0.03)

    # The textbook's normal approximation: (1.96 + 1.96)^2 p (1 - p) / tolerance^2.
    assert n == pytest.approx(4 * 1.96**2 * 0.25 / 0.03**2, rel=0.03)


def test_a_looser_tolerance_needs_fewer_samples():
    needed = [samples_for((0.3, 0.7), tolerance) for tolerance in (0.01, 0.02, 0.05, 0.2)]

    assert needed == sorted(needed, reverse=True)


def test_certainty_costs_samples():
    assert samples_for((0.3, 0.7), 0.05, 0.99) > samples_for((0.3, 0.7), 0.05, 0.9)
    assert samples_for((0.3, 0.7), 0.05, power=0.99) > samples_for((0.3, 0.7), 0.05, power=0.8)
    assert samples_for([0.3], 0.05, classes=10) > samples_for([0.3], 0.05, classes=2)


@pytest.mark.parametrize(
    ("hits", "bound", "told"),
    [
        (500, Bound(0.45, 0.55), "inside"),
        (0, Bound(high=0.01), "inside"),
        (1000, Bound(low=0.99), "inside"),
        (500, Bound(0.49, 0.51), "insufficient"),
        (520, Bound(0.4, 0.51), "outside"),
        (900, Bound(0.0, 0.5), "outside"),
    ],
)
def test_the_interval_judges(hits, bound, told):
    assert judge_fraction(fraction_of(hits, 1000), bound).told == told


def test_insufficient_evidence_names_the_samples_that_would_do():
    bound = Bound.around(0.5, 0.03)
    few = fraction_of(51, 100)

    judgement = judge_fraction(few, bound)

    assert judgement.told == "insufficient"
    enough = fraction_of(round(judgement.needed * 0.51), judgement.needed)
    assert judge_fraction(enough, bound).told == "inside"


def test_no_number_is_named_where_none_would_do():
    assert samples_to_pass(0.5, Bound(0.5, 0.6), level=0.95) is None
    assert samples_to_pass(0.5, Bound(0.4999999, 0.6), level=0.95) is None


def test_no_samples_are_insufficient_evidence():
    assert judge_fraction(fraction_of(0, 0), Bound(high=0.1)).told == "insufficient"


def test_one_class_outside_decides_over_all():
    found = count(torch.tensor([0] * 90 + [1] * 10), ("a", "b"))

    assert judge(found, {"a": Bound(0.85, 0.95), "b": Bound(high=0.01)}).told == "outside"
    assert judge(found, {"a": Bound(low=0.5)}).told == "inside"
    assert judge(found, {}).told == "inside"


def test_bounds_of_an_unknown_class_are_refused():
    with pytest.raises(UnknownClassError, match="smile"):
        judge(count(torch.tensor([0]), ("a", "b")), {"smile": Bound()})


@pytest.mark.parametrize(
    "nonsense",
    [
        lambda: Bound(0.6, 0.4),
        lambda: Bound(-0.1, 0.4),
        lambda: Bound.around(0.5, 0.0),
        lambda: Bound.around(1.5, 0.1),
        lambda: fraction_of(3, 2),
        lambda: fraction_of(1, 2, confidence=1.0),
        lambda: samples_for([], 0.1),
        lambda: samples_for([0.5], 1e-5),
    ],
)
def test_nonsense_is_refused(nonsense):
    with pytest.raises(TargetError):
        nonsense()
