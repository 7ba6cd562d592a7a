"""Precision, recall and the Frechet distance: what is known of them for sets that are known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evidence.errors import InsufficientEvidenceError
from evidence.spread import frechet, spread


def normal(n: int, d: int = 4, seed: int = 0, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    return shift + scale * torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_set_covers_itself_and_nothing_far_away() -> None:
    x = normal(60)

    own, far = spread(x, x, "given"), spread(x, x + 100, "given")

    assert (own.precision.value, own.recall.value) == (1.0, 1.0)
    assert (far.precision.value, far.recall.value) == (0.0, 0.0)


def test_what_is_drawn_no_more_costs_recall_and_what_is_new_costs_precision() -> None:
    first = normal(200, seed=1)
    whole, half = torch.cat([first, normal(200, seed=2, shift=50)]), normal(200, seed=3)

    alike, lost, gained = spread(first, half, "given"), spread(whole, half, "given"), spread(half, whole, "given")

    assert lost.recall.value == pytest.approx(alike.recall.value / 2)  # nothing of the far half is covered
    assert gained.precision.value == pytest.approx(alike.recall.value / 2)
    assert (lost.precision, gained.recall) == (alike.precision, alike.precision)
    assert min(alike.precision.value, alike.recall.value) > 0.7


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 10), shift=st.floats(-5, 5))
def test_swapping_the_sets_swaps_precision_and_recall_and_units_do_not_matter(
    seed: int, scale: float, shift: float
) -> None:
    x, y = normal(40, seed=seed), normal(30, seed=seed + 1, scale=1.5)
    there, back = spread(x, y, "given"), spread(y, x, "given")
    other = spread(scale * x + shift, scale * y + shift, "given")

    assert (there.precision, there.recall) == (back.recall, back.precision)
    assert other.precision.value == pytest.approx(there.precision.value, abs=0.04)  # of 30, one by rounding
    assert there.precision.n == 30


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-3, 3), scale=st.floats(0.5, 2))
def test_the_frechet_distance_of_normal_distributions_is_the_formulas(shift: float, scale: float) -> None:
    d, x = 3, normal(4000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T))).T  # mean 0 and covariance 1, exactly

    assert frechet(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet(x, scale * x + shift) == pytest.approx(d * shift**2 + d * (scale - 1) ** 2, rel=1e-6, abs=1e-9)


def test_a_frechet_distance_is_told_of_enough_pictures_alone() -> None:
    few, enough, wide = (
        spread(normal(n, d), normal(n, d, 1), "given").fid for n, d in ((999, 2), (1000, 2), (1000, 101))
    )

    assert (few, wide) == (None, None)
    assert enough is not None
    assert math.isfinite(enough)


def test_sets_without_neighbours_are_refused() -> None:
    with pytest.raises(InsufficientEvidenceError, match="more than 3 pictures"):
        spread(normal(3), normal(50), "given")
