"""Mixtures: drawn as often as asked, told apart by their digests, mixed so that what a judge sees is the target."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from unlearning import InputError, Mixture, Pool, mixing_fractions

NEVER = 1e-9
"""Probability with which a right draw may fail a test."""


def pool(value: float, n: int = 5) -> Pool:
    """Examples that show by their first pixel which pool they are of, and by their second which row."""
    return Pool(torch.stack([torch.full((n,), value), torch.arange(float(n))], 1))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.2, 0.0, 0.8), (0.0, 1.0), (1.0,)])
def test_each_pool_is_drawn_from_as_often_as_asked_and_each_row_alike(fractions: tuple[float, ...]) -> None:
    n, rows = 20_000, (3, 7, 4)
    mixture = Mixture(tuple(pool(k, rows[k]) for k in range(len(fractions))), fractions)

    drawn = mixture(n, generator())

    for k, fraction in enumerate(fractions):
        of_pool = drawn[drawn[:, 0] == k]
        low, high = binom.interval(1 - NEVER, n, fraction)
        assert low <= len(of_pool) <= high
        if fraction:
            low, high = binom.interval(1 - NEVER, len(of_pool), 1 / rows[k])
            counts = of_pool[:, 1].long().bincount(minlength=rows[k])
            assert low <= counts.min() <= counts.max() <= high


def test_equal_generators_give_equal_draws() -> None:
    mixture = Mixture((pool(0), pool(1)), (0.3, 0.7))

    assert torch.equal(mixture(50, generator(4)), mixture(50, generator(4)))
    assert not torch.equal(mixture(50, generator(4)), mixture(50, generator(5)))


def test_the_digest_tells_pools_fractions_and_their_order_apart() -> None:
    mixtures = [
        Mixture((pool(0), pool(1)), (0.3, 0.7)),
        Mixture((pool(0), pool(1)), (0.7, 0.3)),
        Mixture((pool(1), pool(0)), (0.3, 0.7)),
        Mixture((pool(0), pool(2)), (0.3, 0.7)),
    ]

    assert len({one.digest() for one in mixtures}) == len(mixtures)
    assert mixtures[0].digest() == Mixture((pool(0), pool(1)), (0.3, 0.7)).digest()


@pytest.mark.parametrize(
    ("pools", "fractions", "message"),
    [
        ((), (), "0 pools"),
        ((pool(0),), (0.5, 0.5), "1 pools do not go with 2"),
        ((pool(0), pool(1)), (0.5, 0.6), "sum to 1"),
        ((pool(0), pool(1)), (-0.5, 1.5), "between 0 and 1"),
        ((pool(0), pool(1)), (float("nan"), 1.0), "between 0 and 1"),
        ((pool(0), pool(1, 0)), (0.5, 0.5), "empty"),
        ((pool(0), Pool(torch.zeros(2, 3))), (0.5, 0.5), r"\(2,\), \(3,\)"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(
    pools: tuple[Pool, ...], fractions: tuple[float, ...], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        Mixture(pools, fractions)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 5), st.integers(0, 10_000))
def test_what_some_mixture_shows_is_found_again(pools: int, seed: int) -> None:
    draws = generator(seed)
    shown = torch.rand(pools, pools + 1, dtype=torch.float64, generator=draws)
    shown /= shown.sum(1, keepdim=True)
    fractions = torch.rand(pools, dtype=torch.float64, generator=draws)
    target = (fractions / fractions.sum()) @ shown

    found = mixing_fractions(shown, target.tolist())

    assert sum(found) == pytest.approx(1)
    assert min(found) >= 0
    assert (torch.tensor(found, dtype=torch.float64) @ shown).tolist() == pytest.approx(target.tolist(), abs=1e-6)


def test_what_no_mixture_shows_is_come_near_to() -> None:
    shown = torch.tensor([[0.9, 0.1], [0.4, 0.6]])

    assert mixing_fractions(shown, [0.1, 0.9]) == pytest.approx((0.0, 1.0))
    assert mixing_fractions(shown, [0.5, 0.5]) == pytest.approx((0.2, 0.8))


@pytest.mark.parametrize("target", [[0.5], [0.5, float("nan")]])
def test_shares_of_other_classes_are_refused(target: list[float]) -> None:
    with pytest.raises(InputError, match="do not go with"):
        mixing_fractions(torch.eye(2), target)
