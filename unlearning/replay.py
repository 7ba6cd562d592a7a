"""Generative replay: samples of the base flow, for what nobody has images of."""

import inspect
from typing import cast

import torch
from torch import Tensor

from models.images import denoised, to_uint8
from models.protocol import Flow, Sampler
from unlearning.errors import ParameterError
from unlearning.randomness import stream

BATCH = 32
"""Images drawn at once. Fixed, since the draws depend on it: equal seeds give equal sets, however small the memory."""


def generate_remember(flow: Flow | Sampler, n: int, n_bits: int, seed: int, *, temperature: float = 1.0) -> Tensor:
    """Samples of the base flow, to stand in for a remember set that the caller does not have.

    Args:
        flow: the base; a foreign one whose `sample` takes no generator is drawn from under a forked global seed.
        n: how many.
        n_bits: colour depth; samples are rounded to it.
        seed: of the draw.
        temperature: 1 samples the flow itself; lower values are biased towards likely images.

    Returns:
        uint8 (n, c, h, w).
    """
    if n < 2:
        raise ParameterError("generated", f"must be at least 2, not {n}")
    parts = []
    named = "generator" in inspect.signature(flow.sample).parameters
    for start in range(0, n, BATCH):
        count = min(BATCH, n - start)
        generator = stream(seed, "generate", start)
        with torch.no_grad():
            if named:
                x = cast(Flow, flow).sample(count, generator=generator, temperature=temperature)
            else:
                with torch.random.fork_rng():
                    torch.manual_seed(generator.initial_seed())
                    x = cast(Sampler, flow).sample(count)
        parts.append(to_uint8(denoised(flow, x).float().cpu(), n_bits))
    return torch.cat(parts)
