"""Generative replay: samples of the base flow, for what nobody has images of."""

import inspect
from typing import cast

import torch
from torch import Tensor

from models.images import denoised, to_uint8
from models.protocol import Flow, Sampler
from unlearning.errors import InputError, ParameterError
from unlearning.randomness import stream

BATCH = 32
"""Images drawn at once. Fixed, since the draws depend on it: equal seeds give equal sets, however small the memory."""

MOST_BROKEN = 0.05
"""Share of samples that may hold NaN or infinity: flows with affine couplings draw such a one now and then."""


def generate_remember(flow: Flow | Sampler, n: int, n_bits: int, seed: int, *, temperature: float = 1.0) -> Tensor:
    """Samples of the base flow, to stand in for a remember set that the caller does not have.

    Args:
        flow: the base; a foreign one whose `sample` takes no generator is drawn from under a forked global seed.
        n: how many.
        n_bits: colour depth; samples are rounded to it.
        seed: of the draw.
        temperature: 1 samples the flow itself; lower values are biased towards likely images.

    Returns:
        uint8 (n, c, h, w). A sample of values that are not finite is no picture, and another is drawn in its place.

    Raises:
        ParameterError: fewer than 2.
        InputError: more than one in twenty samples is not finite.
    """
    if n < 2:
        raise ParameterError("generated", f"must be at least 2, not {n}")
    parts: list[Tensor] = []
    drawn = found = 0
    while found < n:
        count = min(BATCH, n - drawn if drawn < n else n - found)
        x = _drawn(flow, count, stream(seed, "generate", drawn), temperature)
        x = x[x.isfinite().flatten(1).all(1)]
        parts.append(to_uint8(x, n_bits))
        drawn, found = drawn + count, found + len(x)
        if drawn - found > max(1.0, MOST_BROKEN * n):
            raise InputError(
                f"{drawn - found:,} of the first {drawn:,} samples of the flow are not finite: its inverse leaves the "
                "range of float32. Use an earlier checkpoint, or train it again with a smaller learning rate"
            )
    return torch.cat(parts)


def _drawn(flow: Flow | Sampler, count: int, generator: torch.Generator, temperature: float) -> Tensor:
    """Samples (count, c, h, w) float32 on the CPU, denoised where the flow offers that."""
    with torch.no_grad():
        if "generator" in inspect.signature(flow.sample).parameters:
            x = cast(Flow, flow).sample(count, generator=generator, temperature=temperature)
        else:
            with torch.random.fork_rng():
                torch.manual_seed(generator.initial_seed())
                x = cast(Sampler, flow).sample(count)
    return denoised(flow, x).float().cpu()
