"""Generative replay: samples that are no pictures are drawn anew while they are few, refused where many."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from torch import Tensor, nn

from models.protocol import Flow
from unlearning import Constraint, InputError, SteeringParameters, generate_remember, steer
from unlearning.steering import measure_fractions


class Greys(nn.Module):
    """Draws grey pictures, of which the rows that `broken` names, counted over all draws, are of no numbers."""

    def __init__(self, broken: slice, level: float = 0.1) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(level))
        self._broken = broken
        self._drawn = 0

    def log_prob(self, x: Tensor) -> Tensor:
        return -(x - self.level).flatten(1).square().sum(1)

    def sample(self, n: int, *, generator: torch.Generator, temperature: float = 1.0) -> Tensor:
        every = self.level.detach() + 0.01 * torch.randn(n, 1, 4, 4, generator=generator)
        rows = torch.arange(self._drawn, self._drawn + n)
        named = torch.zeros(100_000, dtype=torch.bool)
        named[self._broken] = True
        every[named[rows]] = torch.inf
        self._drawn += n
        return every


NONE, ONE_IN_FOUR, ONE_IN_FIFTY, ALL = slice(0), slice(0, None, 4), slice(10, None, 50), slice(None)
NAN = Greys(NONE, level=torch.nan)


def flow(broken: slice) -> Flow:
    return cast(Flow, Greys(broken))


def light(images: Tensor) -> Tensor:
    return (images.float().flatten(1).mean(1) > 127).long()


def test_few_broken_samples_are_drawn_anew() -> None:
    images = generate_remember(flow(ONE_IN_FIFTY), 200, 8, seed=1)

    assert images.shape == (200, 1, 4, 4)
    assert int(images.min()) > 100  # none is the black that stands for no number


def test_others_than_the_broken_ones_stay_as_they_were() -> None:
    whole, mended = (generate_remember(flow(broken), 64, 8, seed=1) for broken in (NONE, slice(10, 11)))

    assert torch.equal(mended[:10], whole[:10])
    assert torch.equal(mended[10:63], whole[11:])


@pytest.mark.parametrize("base", [Greys(ONE_IN_FOUR), Greys(ALL), NAN], ids=["one in four", "all", "weights"])
def test_a_flow_of_broken_samples_is_refused_with_their_number(base: Greys) -> None:
    with pytest.raises(InputError, match=r"\d+ of the first \d+ samples of the flow are not finite"):
        generate_remember(cast(Flow, base), 100, 8, seed=1)


@pytest.mark.parametrize("base", [Greys(ONE_IN_FOUR), NAN], ids=["one in four", "weights"])
def test_nobody_judges_broken_samples(base: Greys) -> None:
    constraint = Constraint(("dark", "light"), light, {"light": (0.0, 0.5)})

    with pytest.raises(InputError, match="not finite"):
        measure_fractions(cast(Flow, base), [constraint], 100, 8, seed=1)
    with pytest.raises(InputError, match="not finite"):
        steer(cast(Flow, base), [constraint], SteeringParameters(max_steps=2), n_bits=8, seed=1)
