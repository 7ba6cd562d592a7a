"""Maximum-likelihood training of a flow on uint8 images: small, seeded, bounded by steps or by time."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.augmentation import augment
from models.errors import ModelError
from models.images import flow_input
from models.protocol import Flow


@dataclass(frozen=True)
class TrainingRecipe:
    """How a flow is trained. Every field is part of the result's identity, so a cache can be keyed by it."""

    steps: int | None = 2000
    """Optimiser steps; null: bounded by time alone."""
    seconds: float | None = None
    """Wall-clock budget; the learning rate then decays over the elapsed share of it."""
    batch: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    """Steps over which the learning rate rises linearly from 0."""
    final_share: float = 0.05
    """Share of the learning rate that the cosine decay ends at."""
    clip: float = 50.0
    """Largest norm of the gradient of the mean nll in nats; longer ones are scaled down."""
    flip: bool = True
    """Whether images are mirrored at random."""
    shift: int = 1
    """Images move by up to so many pixels each way, the border repeated."""
    average: float = 0.0
    """Decay of the running mean of the weights that is the result (0: the last weights)."""


@dataclass(frozen=True)
class TrainingProgress:
    """One report of a running training."""

    step: int
    seconds: float
    total_seconds: float | None
    """The time budget, or an extrapolation from the steps done."""
    bits_per_dim: float
    """Running mean over the last reports' batches."""


def fit_flow(
    flow: nn.Module,
    images: Tensor,
    recipe: TrainingRecipe,
    *,
    n_bits: int,
    generator: torch.Generator,
    callback: Callable[[TrainingProgress], None] | None = None,
    report_every: int = 20,
) -> float:
    """Train in place; returns the last running mean of the loss in bits per dimension.

    Args:
        flow: a module that is a `models.protocol.Flow`, started (its actnorms initialised) by the caller.
        images: uint8 (n, c, h, w), on any device; batches go to the flow's device.
        recipe: how.
        n_bits: colour depth.
        generator: draws batches, augmentation and noise; on the CPU.
        callback: gets a report every `report_every` steps.
        report_every: in steps.

    Raises:
        ModelError: the loss was not finite ten times running, or the recipe has no bound.
    """
    if not isinstance(flow, Flow):
        raise ModelError(f"{type(flow).__name__} has no log_prob and sample; it is no flow")
    if recipe.steps is None and recipe.seconds is None:
        raise ModelError("the recipe must bound steps or seconds")
    device = next(flow.parameters()).device
    dims = math.prod(images.shape[1:])
    optimiser = torch.optim.Adam(flow.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.99), fused=True)
    mean_weights = [p.detach().clone() for p in flow.parameters()] if recipe.average else []
    start = time.monotonic()
    running, skipped, step = math.nan, 0, 0
    set_memory_format(flow.train(), torch.channels_last)  # convolutions run faster so
    while True:
        elapsed = time.monotonic() - start
        share = max(
            step / recipe.steps if recipe.steps is not None else 0.0,
            elapsed / recipe.seconds if recipe.seconds is not None else 0.0,
        )
        if share >= 1.0:
            break
        for group in optimiser.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * share))
            decay = recipe.final_share + (1 - recipe.final_share) * cosine
            group["lr"] = recipe.learning_rate * min(1.0, (step + 1) / recipe.warmup) * decay
        rows = torch.randint(len(images), (recipe.batch,), generator=generator)
        batch = augment(images[rows.to(images.device)], generator, flip=recipe.flip, shift=recipe.shift)
        x = flow_input(flow, batch.cpu(), n_bits, generator).to(device)
        loss = -flow.log_prob(x).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(flow.parameters(), recipe.clip)
        step += 1
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(loss)):
            skipped += 1
            if skipped == 10:
                raise ModelError(f"the loss was not finite ten times running at step {step}; lower the learning rate")
            continue
        skipped = 0
        optimiser.step()
        if mean_weights:
            decay = min(recipe.average, (1 + step) / (10 + step))
            with torch.no_grad():
                for kept, now in zip(mean_weights, flow.parameters(), strict=True):
                    kept.lerp_(now, 1 - decay)
        bits = float(loss.detach()) / (dims * math.log(2)) + n_bits
        running = bits if math.isnan(running) else 0.95 * running + 0.05 * bits
        if callback is not None and step % report_every == 0:
            elapsed = time.monotonic() - start
            total = recipe.seconds if recipe.seconds is not None else elapsed / max(share, 1e-6)
            callback(TrainingProgress(step, elapsed, total, running))
    if mean_weights:
        with torch.no_grad():
            for kept, now in zip(mean_weights, flow.parameters(), strict=True):
                now.copy_(kept)
    set_memory_format(flow.eval(), torch.contiguous_format)
    return running


def set_memory_format(module: nn.Module, memory_format: torch.memory_format) -> None:
    """Lay the module's four-dimensional parameters and buffers out anew, in place; values do not change."""
    for tensor in [*module.parameters(), *module.buffers()]:
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)


@torch.no_grad()
def bits_per_dim(flow: Flow, images: Tensor, *, n_bits: int, generator: torch.Generator, batch: int = 128) -> Tensor:
    """-log2 of the probability of each uint8 image (n, c, h, w), per dimension, on one noise draw: (n,).

    The density over [-0.5, 0.5) becomes a probability of the 2^n_bits levels by adding n_bits.
    """
    dims = math.prod(images.shape[1:])
    parts = [
        -flow.log_prob(flow_input(flow, part, n_bits, generator)) / (dims * math.log(2)) + n_bits
        for part in torch.split(images, batch)
    ]
    return torch.cat(parts)
