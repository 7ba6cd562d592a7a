"""The benchmark of class priors: what its figures are made of, on an untrained flow and a judge that is never right."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

from benchmarks.class_prior import Outcome, Removal, removals, summary
from models.class_prior import ClassPriorFlow

OUTCOME = Outcome(
    kind="access removal", met=None, seconds=0.1, steps=0, sampled_rate=0.003, relearned_rate=0.9,
    relearned_rate_many=0.9, drift=0.0, z_held_out=0.1, others_identical=True, others_right=0.98,
)  # fmt: skip
REMOVED = [
    Removal(digit=digit, rate=rate, rate_cool=0.0, misread=rate, drawn=0.0, others_identical=True)
    for digit, rate in enumerate((0.002, 0.019, 0.004))
]


def takes_all_for_class_1(pictures: Tensor) -> Tensor:
    """A judge."""
    return torch.ones(len(pictures), dtype=torch.int64)


def flow() -> ClassPriorFlow:
    """A tiny flow of three classes."""
    generator = torch.Generator().manual_seed(0)
    return ClassPriorFlow((1, 4, 4), 8, width=8, n_block=2, n_layer=1, n_classes=3, generator=generator)


def test_the_forgotten_rate_is_the_worst_of_all_digits_and_not_that_of_one() -> None:
    figures = summary(REMOVED, {"prior": OUTCOME}, accuracy=0.985, samples=2000)

    assert (figures["accuracy"], figures["samples"]) == (0.985, 2000)
    assert (figures["forgotten_rate"], figures["worst_digit"], figures["worst_digit_misread"]) == (0.019, 1, 0.019)
    assert figures["drawn_rate"] == 0
    assert figures["others_identical"] is True
    assert [one["rate"] for one in figures["removals"]] == [0.002, 0.019, 0.004]
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


@pytest.mark.parametrize("which", ["one digit", "the outcome"])
def test_one_sample_of_another_digit_that_changed_is_enough(which: str) -> None:
    removed, outcome = list(REMOVED), OUTCOME
    if which == "one digit":
        removed[2] = dataclasses.replace(removed[2], others_identical=False)
    else:
        outcome = dataclasses.replace(outcome, others_identical=False)

    assert summary(removed, {"prior": outcome}, accuracy=0.985)["others_identical"] is False


def test_what_is_misread_is_told_from_what_is_drawn() -> None:
    found = removals(flow(), takes_all_for_class_1, 30)

    assert [one.digit for one in found] == [0, 1, 2]
    for told in ("rate", "rate_cool", "misread"):
        assert [getattr(one, told) for one in found] == [0, 1, 0]
    assert [one.drawn for one in found] == [0, 0, 0]
    assert all(one.others_identical for one in found)
