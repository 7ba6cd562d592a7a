"""How well samples fit the prompts that they were asked for, by whatever scores them: the hook for a CLIP score.

A scorer is the caller's: a function of pictures and their prompts, such as a hundred times the cosine of CLIP's
embeddings of both (Hessel et al. 2021, arXiv 2104.08718). None comes with this library, since none can be had without
weights from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy import special
from torch import Tensor

from evidence.amnesia_records import Mean
from evidence.errors import TargetError
from evidence.fractions import CONFIDENCE
from evidence.likelihood import derive_seed

__all__ = ["PromptSampler", "PromptScorer", "PromptScores", "score_prompts"]

BATCH = 50
"""Pictures that are drawn and scored at once; a batch has a seed of its own."""

PromptScorer = Callable[[Tensor, Sequence[str]], Tensor]
"""Images (n, c, h, w) uint8 and their n prompts to scores (n,)."""


class PromptSampler(Protocol):
    """What draws by prompt: `models.conditional.PromptConditional` has both."""

    def tokens(self, prompts: Sequence[str]) -> Tensor:
        """Conditions of prompts, (n, ...)."""
        ...

    def sample(self, condition: Tensor, *, generator: torch.Generator) -> Tensor:
        """An image of each, uint8 (n, c, h, w)."""
        ...


@dataclass(frozen=True)
class PromptScores:
    """Mean scores with normal intervals.

    Attributes:
        before: of the base.
        after: of the changed model.
        change: after less before, over pairs from equal latents.
    """

    before: Mean
    after: Mean
    change: Mean


def score_prompts(
    base: PromptSampler,
    changed: PromptSampler,
    prompts: Sequence[str],
    scorer: PromptScorer,
    *,
    n: int,
    seed: int,
    confidence: float = CONFIDENCE,
) -> PromptScores:
    """Score n samples of each model, from equal latents, for prompts in turn.

    Args:
        base: the model before.
        changed: the model after.
        prompts: to ask for, such as held-out phrasings of what stays.
        scorer: scores pictures against prompts.
        n: samples of each model, at least 2.
        seed: of the latents.
        confidence: of each interval by itself.

    Raises:
        TargetError: there is no prompt or sample, or a score is missing or not finite.
    """
    if not prompts or n < 2:
        raise TargetError(
            f"there is nothing to score in {n} samples of {len(prompts)} prompts; two of one are the least"
        )
    asked = [prompts[number % len(prompts)] for number in range(n)]
    before, after = (_scored(model, asked, scorer, seed) for model in (base, changed))
    return PromptScores(*(_mean(values, confidence) for values in (before, after, after - before)))


def _scored(model: PromptSampler, asked: Sequence[str], scorer: PromptScorer, seed: int) -> Tensor:
    found = []
    for start in range(0, len(asked), BATCH):
        part = asked[start : start + BATCH]
        generator = torch.Generator().manual_seed(derive_seed(seed, "prompts", start))
        scores = scorer(model.sample(model.tokens(part), generator=generator).cpu(), part).detach().double().cpu()
        if scores.shape != (len(part),) or not bool(scores.isfinite().all()):
            raise TargetError(f"a scorer gives a finite number a picture, ({len(part)},), not {tuple(scores.shape)}")
        found.append(scores)
    return torch.cat(found)


def _mean(values: Tensor, confidence: float) -> Mean:
    reach = float(special.ndtri(0.5 + confidence / 2)) * float(values.std()) / math.sqrt(len(values))
    value = float(values.mean())
    return Mean(value, value - reach, value + reach, len(values), confidence)
