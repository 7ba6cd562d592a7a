"""Samplers of a TarFlow: exact inverses of its forward map, one token at a time or many in parallel, with guidance.

All of them share one opening (flow, latents, label, guidance) and keep nothing on the flow, so calls do not meet.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.errors import ArchitectureError, ImageError
from models.tarflow_decoder import Decoder, Guidance, guided_coefficients

if TYPE_CHECKING:
    from models.tarflow import Label, TarFlow
    from models.tarflow_blocks import Block

__all__ = ["Guidance", "Inverted", "fastest", "free_tokens", "parallel", "sequential"]

TOLERANCE = 1e-4
"""Largest |f_k(x) - z| that the parallel sampler may leave in a block, in standard deviations of the latents."""
ACCEPT = 0.05
"""Share of the tolerance at which a token is taken for settled: what is left grows on the way through later blocks."""
LEAST_FREE = 12.0
"""Tokens a read must have for free, for each row of the batch, before windows pay. Measured: 1.1 times sooner at 11."""
WINDOW = 3.0
"""Width of a window, in the tokens that a read has for free: wider ones save few reads and cost more."""
ALLOWANCE = 0.35
"""Share of a block's sequential cost that a window may waste before the block is finished one token at a time."""
OVERHEAD_SECONDS = 1e-4
"""What a read costs in each layer however few tokens it has: the launches of some twenty small operations."""
FLOPS = {"cpu": 3.5e10, "other": 3e12}
"""Float32 operations a second. Of one CPU thread: measured. Of an accelerator: not measured, but chosen low, some third
of the peak of the slowest data-centre cards in use, so that `fastest` errs towards the sequential sampler."""
SHARING = 0.75
"""Exponent by which threads add up."""
BANDWIDTH = {"cpu": 1e10, "other": 2e12}
"""Bytes a second at which a read streams its weights; high for an accelerator, to err to the same side."""
WEIGHTS = 12
"""Of a layer, in squares of its width."""


@dataclass(frozen=True)
class Inverted:
    """Images made of latents, and what that took."""

    images: Tensor
    """(b, c, h, w), not clipped."""
    reads: int
    """Passes through a block, of one token or of a window."""
    residual: float | None
    """Largest |f_k(x) - z| over all values of all blocks, by one parallel pass each, in standard deviations of the
    latents (the square roots of the flow's `var`, for each token and value); null where no pass was made."""
    fallbacks: int = 0
    """Blocks whose residual was above the tolerance, and which were done again one token at a time."""


@torch.no_grad()
def sequential(
    flow: "TarFlow", latents: Tensor, *, label: "Label" = None, guidance: Guidance | None = None
) -> Inverted:
    """Invert one token at a time over cached keys and values: exact to rounding.

    Args:
        flow: the flow.
        latents: (b, tokens, values), standard normal, as `flow.forward` gives them.
        label: classes of the images, see `models.tarflow.Label`.
        guidance: null for the flow's own law; else the map that is inverted is the guided one.

    Raises:
        ArchitectureError: the latents or the labels are not the flow's.
        ImageError: the latents hold NaN or infinity.
    """
    reads = 0

    def invert(decoder: Decoder, z: Tensor) -> Tensor:
        nonlocal reads
        x = z.clone()
        _finish(decoder, x, z, 0)
        reads += z.shape[1] - 1
        return x

    images = _through(flow, latents, label, guidance, lambda decoder, z, *_: invert(decoder, z))
    return Inverted(images, reads, None)


@torch.no_grad()
def parallel(
    flow: "TarFlow",
    latents: Tensor,
    *,
    label: "Label" = None,
    guidance: Guidance | None = None,
    tolerance: float = TOLERANCE,
    window: int | None = None,
) -> Inverted:
    """Invert by Jacobi sweeps of a window that slides over the tokens: exact to the tolerance, and certified.

    Every read of the window evaluates all of its tokens at once, each from the present guesses of those before it. The
    first of them is exact then; those after it that did not move by more than the tolerance are taken as they are, and
    the window moves behind them. So there are never more reads than tokens. Each block ends in one parallel forward
    pass: a residual above the tolerance sends it to the sequential sampler.

    Args:
        flow, latents, label, guidance: as in `sequential`.
        tolerance: largest residual, in standard deviations of the latent.
        window: tokens in a read; null: what the cost model holds for best. A window that costs more than it saves is
            given up for the rest of the block, unless it was stated.

    Raises:
        ArchitectureError, ImageError: as in `sequential`.
    """
    rows = len(latents) * (1 if guidance is None else 2)
    free = free_tokens(flow, rows)
    size = window if window is not None else round(WINDOW * free)
    reads, fallbacks, worst = 0, 0, 0.0

    def invert(decoder: Decoder, z: Tensor, unit: Tensor, check: Callable[[Tensor], float]) -> Tensor:
        nonlocal reads, fallbacks, worst
        x = z.clone()
        accept = ACCEPT * tolerance * unit
        reads += _slide(decoder, x, z, max(1, size), accept, free if window is None else None)
        left = check(x)
        if not left <= tolerance:
            _finish(decoder, x, z, 0)
            left, fallbacks, reads = check(x), fallbacks + 1, reads + z.shape[1] - 1
        worst = left if math.isnan(left) or left > worst else worst  # a NaN stays
        return x

    images = _through(flow, latents, label, guidance, invert)
    return Inverted(images, reads, worst, fallbacks)


def fastest(
    flow: "TarFlow",
    latents: Tensor,
    *,
    label: "Label" = None,
    guidance: Guidance | None = None,
    tolerance: float = TOLERANCE,
) -> Inverted:
    """Invert by whichever sampler is sooner for this batch, width and device; arguments as in `parallel`.

    A model of the cost decides, and no clock does: equal calls take equal ways, and give equal bits. A run that is
    taken up again draws its samples anew and needs them to be the same, which a choice by the clock would not promise.

    The model is measured on CPUs. Of an accelerator it assumes less arithmetic than any in use has: there windows may
    be narrower than would pay, or not be used where they would; but where they are used a read costs at most what the
    model says, and one that gains nothing is given up as `parallel` does, for `ALLOWANCE` of the block.
    `benchmarks.tarflow --device cuda` says what it comes to.
    """
    rows = len(latents) * (1 if guidance is None else 2)
    if free_tokens(flow, rows) < LEAST_FREE:
        return sequential(flow, latents, label=label, guidance=guidance)
    return parallel(flow, latents, label=label, guidance=guidance, tolerance=tolerance)


def free_tokens(flow: "TarFlow", rows: int) -> float:
    """How many tokens of each row make a read take twice the time of an empty one."""
    device = "cpu" if flow.var.device.type == "cpu" else "other"
    speed = FLOPS[device] * (torch.get_num_threads() ** SHARING if device == "cpu" else 1)
    weights = WEIGHTS * int(flow.architecture["width"]) ** 2
    empty = OVERHEAD_SECONDS + 4 * weights / BANDWIDTH[device]  # seconds a layer
    return empty * speed / (2 * weights) / max(1, rows)


def _through(
    flow: "TarFlow",
    latents: Tensor,
    label: "Label",
    guidance: Guidance | None,
    invert: Callable[[Decoder, Tensor, Tensor, Callable[[Tensor], float]], Tensor],
) -> Tensor:
    """Undo all blocks from the prior to the image, each by `invert(decoder, z, unit, check)` in the block's own order.

    A difference counts in units of the latents' deviation in every block: flows of a variance have blocks that do not
    scale, and all others have a variance of 1.
    """
    if latents.shape[1:] != flow.latent_shape:
        raise ArchitectureError(f"latents of this flow are (b, *{flow.latent_shape}), not {tuple(latents.shape)}")
    if not bool(torch.isfinite(latents).all()):
        raise ImageError("the latents hold NaN or infinity; check what made them")
    labels = flow.labels(label, len(latents))
    deviation = flow.var.sqrt()[None]  # (1, t, d)
    h = latents * deviation  # (b, t, d)
    with torch.autocast(h.device.type, enabled=False):
        for block in reversed(flow.chain() if len(latents) else []):
            z = block.ordered(h)
            unit = block.ordered(deviation)
            check = _certificate(block, z, unit, labels, guidance)
            x = invert(Decoder(block, z, labels, guidance), z, unit, check)
            h = block.ordered(x)
    return flow.unscaled(h)


def _certificate(
    block: "Block", z: Tensor, unit: Tensor, label: Tensor | None, guidance: Guidance | None
) -> Callable[[Tensor], float]:
    def check(x: Tensor) -> float:
        """max |f(x) - z| / unit by one parallel pass: z (b, t, d), unit (1, t, d)."""
        a, b = guided_coefficients(block, x, label, guidance)
        return float((((x - b) * torch.exp(-a) - z) / unit).abs().amax()) if x.numel() else 0.0

    return check


def _finish(decoder: Decoder, x: Tensor, z: Tensor, start: int) -> None:
    """Fill x (b, t, d) in behind token `start`, which is right and not yet read, one token at a time."""
    for i in range(start, x.shape[1] - 1):
        a, b = decoder.read(x[:, i : i + 1], i)
        x[:, i + 1 : i + 2] = z[:, i + 1 : i + 2] * a.exp() + b


def _slide(decoder: Decoder, x: Tensor, z: Tensor, window: int, accept: Tensor, free: float | None) -> int:
    """Fill x (b, t, d) in behind its first token by a sliding window; returns the reads that it took.

    x holds a guess of every token; `accept` (1, t, d) is how far a settled one may lie from z. `free` is the cost
    model's (`free_tokens`) where the window may be given up.
    """
    tokens = x.shape[1]
    start, reads, spent = 0, 0, 0.0  # tokens up to `start` are right, those before it read for good
    alone = 1 + 1 / free if free is not None else 0.0  # cost of one token, in reads of none
    while start < tokens - 1:
        stop = min(start + window, tokens - 1)
        a, b = decoder.read(x[:, start:stop], start)
        reads += 1
        new = z[:, start + 1 : stop + 1] * a.exp() + b  # tokens start + 1 to stop
        moved = (new - x[:, start + 1 : stop + 1]).abs() * torch.exp(-a)  # (b, n, d): what is left, in latents
        # the last of them was not read itself
        step = 1 + _leading(moved[:, :-1], accept[:, start + 1 : stop])
        x[:, start + step : stop + 1] = new[:, step - 1 :]
        ahead = slice(stop + 1, stop + 1 + step)  # enter with the next read: guessed to be like the last
        x[:, ahead] = z[:, ahead] * a[:, -1:].exp() + b[:, -1:]
        start += step
        if free is not None:
            spent += 1 + (stop - start + step) / free
            if spent > alone * (start + ALLOWANCE * tokens):
                _finish(decoder, x, z, start)
                return reads + tokens - 1 - start
    return reads


def _leading(moved: Tensor, accept: Tensor) -> int:
    """How many tokens in front did not move by more than `accept`, in any row: moved (b, n, d), accept (1, n, d)."""
    settled: list[bool] = (moved <= accept).all(dim=2).all(dim=0).tolist()
    return settled.index(False) if False in settled else len(settled)
