"""The benchmark of debiasing: what its targets are and what its figures are made of, without a run."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor

from benchmarks.debias import PARITY, TOLERANCE, Outcome, summary, targets
from evidence.kid import Kid
from examples.digits import CLASSES, DigitClassifier
from unlearning.constraints import count

BASE = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.15, 0.05]


def distance(value: float) -> Kid:
    """A distance beside a floor of 1."""
    return Kid(value, 0.1, 1.0, 500, 500, "features")


def outcome(*, inside: bool, miss: float, values: list[float], unaffected: list[str]) -> Outcome:
    """What a judge may say."""
    return Outcome(
        inside=inside, met=True, miss=miss, second_miss=2 * miss, steps=10, seconds=1.0, confident=0.5,
        distances=dict(zip(CLASSES, map(distance, values), strict=False)), unaffected=unaffected,
    )  # fmt: skip


def test_there_are_five_full_distributions_and_each_is_off_the_base() -> None:
    chosen = targets(DigitClassifier(), BASE)

    assert len(chosen) == 5
    for target in chosen.values():
        assert math.isclose(sum(target.wanted.values()), 1)
        assert math.isclose(sum(target.shares), 1)
        assert set(target.wanted) == set(target.constraint.classes) == set(target.constraint.bounds)
        for name, (low, high) in target.constraint.bounds.items():
            assert max(target.wanted[name] - low, high - target.wanted[name]) <= TOLERANCE + 1e-9
        assert max(abs(share - base) for share, base in zip(target.shares, BASE, strict=True)) > 0.01


def test_parity_weighs_the_digits_of_a_class_alike() -> None:
    odd = targets(DigitClassifier(), BASE)["odd"]

    assert odd.constraint.classes == PARITY
    assert math.isclose(sum(odd.shares[1::2]), 0.7)
    assert math.isclose(odd.shares[8] / odd.shares[0], BASE[8] / BASE[0])


@pytest.mark.parametrize(("even", "miss"), [(50, 0.0), (80, 0.3), (20, 0.3)])
def test_a_miss_is_that_of_the_worst_fraction(even: int, miss: float) -> None:
    parity = targets(DigitClassifier(), BASE)["parity"]
    labels: Tensor = torch.tensor([0] * even + [1] * (100 - even))

    assert math.isclose(parity.miss(count(parity.constraint, labels, 0.95)), miss, abs_tol=1e-9)


def test_a_run_outside_its_bounds_and_a_digit_beyond_its_floor_are_counted() -> None:
    figures = summary(
        {
            "one": outcome(inside=True, miss=0.01, values=[0.5, 2.0, 0.1], unaffected=["0", "1"]),
            "two": outcome(inside=False, miss=0.04, values=[0.5], unaffected=[]),
        },
        confident=0.6,
    )

    assert (figures["targets"], figures["inside"], figures["worst_miss"]) == (2, 1, 0.04)
    assert (figures["unaffected"], figures["unaffected_within_noise"]) == (2, 1)
    assert (figures["all_digits"], figures["all_digits_within_noise"]) == (4, 3)
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures
