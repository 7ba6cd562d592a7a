"""What taming did to everything else: drift of likelihoods, divergence of the models, health of the samples."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from evidence.likelihood import BATCH, FloatArray, density_nll, derive_seed
from models.protocol import Flow

__all__ = ["Drift", "KlEstimate", "SampleHealth", "draw_samples", "kl_per_dim", "nll_drift", "sample_health"]

ROUND_TRIP_TOLERANCE = 1e-2
"""Largest error, in units where an image spans 1, that a flow's inverse may leave on its own samples."""

RANGE_LOSS_TOLERANCE = 0.05
"""Share of pixel values that may leave the image range beyond what the base model's samples do."""

CHANCE = 0.02
"""Probability with which a model is taken for less sound than its base by chance, at most."""


@dataclass(frozen=True)
class Drift:
    """Mean of |nll_tamed - nll_base| / sigma_base over images that should not change, on common noise.

    In units of the base model's sigma_R; 0 or more, lower is better, 0 for equal models. Unlike the quantile drop it
    sees changes that cancel in the mean and changes shared by all images. It sees only the images it was given.

    Attributes:
        value: the drift; NaN without images or with a likelihood that is not finite.
        standard_error: over the images, taken as independent; None with fewer than two.
        n: images.
    """

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class KlEstimate:
    """KL(p_base || p_tamed) per dimension, as the mean of (log p_base - log p_tamed) / dims over base samples.

    In nats per dimension; the true value is 0 or more, lower is better, 0 for equal models; the estimate may fall
    below 0 by chance. It is blind where the base model puts no mass, and a single face is a vanishing part of its mass.

    Attributes:
        value: the estimate; NaN where a likelihood is not finite.
        standard_error: over the samples, which are independent; None with fewer than two.
        n: samples.
    """

    value: float
    standard_error: float | None
    n: int


@dataclass(frozen=True)
class SampleHealth:
    """Whether a model's samples are numbers, pictures and invertible. It does not judge how good they look.

    Attributes:
        n: samples, at temperature 1.
        finite: share of samples with finite values only, in [0, 1]; hold it against the base model's.
        in_range: share of values within [-0.5, 0.5], in [0, 1], of the first samples where there are many; hold it
            against the base model's.
        round_trip_error: largest |x - inverse(forward(x))| over the finite ones of these; None where the flow has no
            inverse, infinite where it is not finite.
    """

    n: int
    finite: float
    in_range: float
    round_trip_error: float | None

    @property
    def sound(self) -> bool:
        """Whether all samples are finite and the inverse leads back."""
        return self.finite == 1 and (self.round_trip_error or 0.0) <= ROUND_TRIP_TOLERANCE

    def finite_floor(self, n: int) -> float:
        """The least share of finite samples, of n, that is expected of a model as good as this one; above 0.

        The least that an exact test of two shares does not tell from this one's (Fisher's, one-sided, at CHANCE): wide,
        since both shares vary. A flow with affine couplings draws a sample that explodes now and then: that none of
        these did says little of one in the other model's.
        """
        from scipy.stats import hypergeom  # takes a third of a second, which who asks for no floor need not wait for

        if not 0 <= self.finite <= 1 or self.n < 1 or n < 1:
            return math.nan
        broken = round((1 - self.finite) * self.n)
        low, high = 0, n  # broken ones of n: these may be, these are too many
        while high - low > 1:
            middle = (low + high) // 2
            likely = hypergeom.sf(middle - 1, self.n + n, broken + middle, n) >= CHANCE
            low, high = (middle, high) if likely else (low, middle)
        return (n - low) / n

    def as_good_as(self, base: SampleHealth) -> bool:
        """As finite, as invertible and as much in range as the base model's samples from the same latents."""
        reachable = max(ROUND_TRIP_TOLERANCE, ROUND_TRIP_GROWTH * (base.round_trip_error or 0.0))
        invertible = self.round_trip_error is None or self.round_trip_error <= reachable
        finite = self.finite >= base.finite_floor(self.n)
        return finite and invertible and self.in_range >= base.in_range - RANGE_LOSS_TOLERANCE


def nll_drift(base: FloatArray, tamed: FloatArray, sigma_base: float) -> Drift:
    """Drift between likelihoods (n,) in nats of the same images on the same noise.

    Args:
        base: under the base model.
        tamed: under the tamed model.
        sigma_base: sigma_R of the base model, nats.
    """
    if base.shape != tamed.shape:
        raise ValueError(f"likelihoods of base and tamed must pair up, got {base.shape} and {tamed.shape}")
    if not sigma_base > 0 or not (np.isfinite(base).all() and np.isfinite(tamed).all()):
        return Drift(math.nan, None, len(base))
    return Drift(*_mean_and_error(np.abs(tamed - base) / sigma_base), n=len(base))


def draw_samples(flow: Flow, n: int, *, seed: int, temperature: float = 1.0, batch_size: int = BATCH) -> Tensor:
    """n samples (n, c, h, w) float32 on the CPU; the same seed gives two models the same latents."""
    if n < 1:
        raise ValueError(f"at least one sample must be drawn, got {n}")
    with torch.inference_mode():
        sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]
        # A generator of its own for each batch, on the CPU, so that devices see the same latents.
        seeds = [derive_seed(seed, "samples", index) for index in range(len(sizes))]
        return torch.cat(
            [
                flow.sample(size, generator=torch.Generator().manual_seed(one), temperature=temperature).cpu()
                for size, one in zip(sizes, seeds, strict=True)
            ]
        )


def kl_per_dim(base: Flow, tamed: Flow, samples: Tensor, *, batch_size: int = BATCH) -> KlEstimate:
    """Estimate the divergence of two flows with exact likelihoods.

    Args:
        base: the model that drew the samples.
        tamed: the model to compare.
        samples: (n, c, h, w) from the base model at temperature 1.
        batch_size: samples that pass through a model at once.
    """
    dims = math.prod(samples.shape[1:])
    difference = density_nll(tamed, samples, batch_size=batch_size) - density_nll(base, samples, batch_size=batch_size)
    terms = (difference / dims).numpy()
    if not np.isfinite(terms).all():
        return KlEstimate(math.nan, None, len(terms))
    return KlEstimate(*_mean_and_error(terms), n=len(terms))


def sample_health(
    flow: Flow, samples: Tensor, *, batch_size: int = BATCH, finite_of: tuple[int, int] | None = None
) -> SampleHealth:
    """Look at samples (n, c, h, w) that the flow drew.

    Args:
        flow: whose samples.
        samples: the first of them, or all.
        batch_size: samples that pass through the flow at once.
        finite_of: how many samples are finite, of how many, where more were drawn than are given.
    """
    finite = samples.isfinite().flatten(1).all(1)  # (n,)
    counted, drawn = finite_of or (int(finite.sum()), len(samples))
    in_range = (samples.abs() <= 0.5).float().mean() if samples.numel() else torch.tensor(math.nan)
    return SampleHealth(
        n=drawn,
        finite=counted / drawn if drawn else math.nan,
        in_range=float(in_range),
        round_trip_error=_round_trip_error(flow, samples[finite], batch_size),
    )


def _round_trip_error(flow: Flow, x: Tensor, batch_size: int) -> float | None:
    inverse = getattr(flow, "inverse", None)
    if not isinstance(flow, nn.Module) or not callable(inverse) or not len(x):
        return None
    worst = 0.0
    with torch.inference_mode():
        weight = next(flow.parameters(), x)
        for start in range(0, len(x), batch_size):
            part = x[start : start + batch_size].to(weight.device)
            latents, _ = flow(part)
            error = float((inverse(latents) - part).abs().max())
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def _mean_and_error(values: FloatArray) -> tuple[float, float | None]:
    if not len(values):
        return math.nan, None
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
    return float(values.mean()), error


ROUND_TRIP_GROWTH = 10.0
"""A base model that itself inverts badly may be followed by so much; then the report notes the base."""
