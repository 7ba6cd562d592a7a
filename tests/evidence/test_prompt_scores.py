"""Scores of samples against prompts, by a scorer that is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from evidence.errors import TargetError
from evidence.prompt_scores import score_prompts

GREYS = {"dark": 40, "bright": 200}


@dataclass
class Painter:
    """Paints the grey that a prompt asks for, moved by so much, with a little noise."""

    moved: int = 0

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        return torch.tensor([GREYS[one] for one in prompts])

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        noise = torch.randint(-5, 6, (len(condition),), generator=generator)
        return (condition + self.moved + noise).to(torch.uint8)[:, None, None, None].expand(-1, 1, 2, 2)


def nearness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    wanted = torch.tensor([GREYS[one] for one in prompts])
    return -(images.float().mean((1, 2, 3)) - wanted).abs()


def test_equal_models_score_alike_to_the_bit() -> None:
    found = score_prompts(Painter(), Painter(), list(GREYS), nearness, n=120, seed=3)

    assert found.before == found.after
    assert (found.change.value, found.change.low, found.change.high) == (0.0, 0.0, 0.0)
    assert found.before.n == 120


def test_what_fits_less_scores_less_by_as_much_and_pairs_make_it_certain() -> None:
    found = score_prompts(Painter(), Painter(20), list(GREYS), nearness, n=120, seed=3)

    assert found.before.low < found.before.value < found.before.high
    assert found.change.value == pytest.approx(found.after.value - found.before.value)
    assert found.change.high < -10
    assert found.change.high - found.change.low < 4


@pytest.mark.parametrize("scores", [torch.ones(3), torch.full((4,), torch.nan)])
def test_a_scorer_that_gives_no_numbers_is_refused(scores: Tensor) -> None:
    with pytest.raises(TargetError, match="a finite number a picture"):
        score_prompts(Painter(), Painter(), ["dark"], lambda images, prompts: scores, n=4, seed=0)


def test_nothing_to_score_is_refused() -> None:
    with pytest.raises(TargetError, match="nothing to score"):
        score_prompts(Painter(), Painter(), [], nearness, n=4, seed=0)
