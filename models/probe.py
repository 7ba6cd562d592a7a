"""Whether weights that load also make a model that a job can use: asked of its own samples, since no image is at hand.

Flows stand here, a VAE in `models.probe_vae`, diffusion models in `models.probe_ddpm` and
`models.probe_stable_diffusion`.

The thresholds were measured on flows before, early in and after training, on faces and on drawings with hardly any
greys. What may be a legitimate flow is a warning and not a refusal. What cannot be told without training images is not
judged: a stated n_bits that is too high shifts every likelihood by a constant and changes nothing else.
"""

import math
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from models.errors import UnusableModelError, WrongKindError
from models.families import PIPELINES
from models.images import denoised, flow_input, to_uint8
from models.probe_vae import probe_vae
from models.protocol import Checkpointed, CheckpointedFlow
from models.tarflow import TarFlow
from models.tarflow_sampling import fastest
from models.vae import ConditionalVAE

SEED = 0
TEMPERATURE = 0.7
"""Of the samples. At 1 an outlier of a flow with affine couplings may explode although the flow is sound."""
FEWEST_SAMPLES = 3
"""Drawn whatever their size, so that a median is not one odd sample's."""
MAX_SAMPLES = 8
MAX_VALUES = 2**18
"""Pixel values of all samples together, beyond the fewest."""
ROUND_TRIP_TOLERANCE = 1 / 256
"""Largest error of a pixel, in units of the image range: one level of 8 bits. Sound flows stay below 1e-4."""
WIDE = 0.75
"""Half of the width about 0 that most pixels of the samples must lie in; images are in [-0.5, 0.5)."""
LEAST_IN_WIDE = 0.5
USUAL_IN_RANGE = 0.75
"""Share of the samples' pixels in [-0.5, 0.5) below which a warning is due; flows of black drawings go down to 0.55."""
MOST_EXCESS = 1.0
"""Bits per dimension above the cost of uniform noise, which is n_bits where images are dequantised. Flows fresh from
their actnorm start reach 0.3 on noise and lie below 0 on images; weights that never saw an image lie above 1.4."""
MOST_EXCESS_UNSHAPED = 2.0
"""The same for flows over images with Gaussian noise, whose start no data shape: fresh ones reach 1.2."""
LEAST_BITS = -0.75
"""Bits per dimension of the samples, above those of the noise that images carry. That noise keeps a flow above 0, and
so above -0.5 at this temperature."""
NOISE_REACH = 2.0
"""In its standard deviations: how far Gaussian noise may take samples beyond the range of images."""


class UnusableFlowError(UnusableModelError):
    """The weights load, but the flow they make has no inverse, no finite likelihood or not the stated colour depth."""


@runtime_checkable
class _Invertible(Protocol):
    """A flow whose two directions can be held against each other."""

    def forward(self, x: Tensor) -> tuple[Any, Tensor]: ...

    def inverse(self, latents: Any) -> Tensor: ...


def probe(model: Checkpointed) -> list[str]:
    """Hold a model of any family, float32, against what every job relies on.

    Returns:
        Warnings: what is suspicious and may yet be right; most often none.

    Raises:
        UnusableModelError: no job could use it: see `probe_flow` and the modules of the other families.
        WrongKindError: it is of a kind that nothing is known of here.
    """
    if isinstance(model, ConditionalVAE):
        return probe_vae(model)
    if isinstance(model, CheckpointedFlow):
        return probe_flow(model)
    if getattr(model, "family", None) == "ddpm":
        from models.probe_ddpm import ClassDiffusion, probe_ddpm  # which imports diffusers, as the model did

        return probe_ddpm(cast(ClassDiffusion, model))
    if getattr(model, "family", None) in PIPELINES:
        from models.probe_stable_diffusion import probe_stable_diffusion  # likewise

        return probe_stable_diffusion(cast(Any, model))
    raise WrongKindError(f"{type(model).__name__} is neither a flow nor a VAE nor a diffusion model: nothing to probe")


@torch.no_grad()
def probe_flow(flow: CheckpointedFlow) -> list[str]:
    """Draw a few images from a float32 flow and hold them against what every job relies on.

    The samples are also brought to images as a job reads them: clipped to [-0.5, 0.5), rounded to n_bits, dequantised.
    Medians decide, so that one odd sample does not. The seed is fixed, at most 8 images go through the flow 5 times.

    Returns:
        Warnings: what is suspicious and may yet be right; most often none.

    Raises:
        UnusableFlowError: the samples or their likelihoods are not finite; the samples lie outside of the image range;
            an image does not survive forward and inverse to 1 / 256 of the range; or n_bits is implausible.
    """
    drawn, latents = _draw(flow)  # (n, c, h, w)
    whole = torch.isfinite(drawn).flatten(1).all(dim=1)  # (n,)
    samples = drawn[whole]  # (m, c, h, w)
    if not len(samples):
        raise UnusableFlowError(
            "the samples of the flow hold NaN or infinity: a scale of 0 or a singular 1x1 convolution has no inverse; "
            "use an earlier checkpoint"
        )
    noise = float(getattr(flow, "noise_std", 0.0))
    warnings = _check_range(samples, NOISE_REACH * noise)
    generator = torch.Generator().manual_seed(SEED)
    images = flow_input(flow, to_uint8(denoised(flow, samples), flow.n_bits), flow.n_bits, generator)
    own, read = _bits_per_dim(flow, samples), _bits_per_dim(flow, images)
    if not (math.isfinite(own) and math.isfinite(read)):
        raise UnusableFlowError(
            "the log-likelihood of the flow's own samples is not finite in float32: a scale or the diagonal of a 1x1 "
            "convolution is too large or too small; use an earlier checkpoint"
        )
    if isinstance(flow, _Invertible) and latents is not None:  # the inverse is slow: the one that drew will do
        _check_return(flow.forward(samples)[0], latents[whole])
    elif isinstance(flow, _Invertible):
        _check_return(flow.inverse(flow.forward(images)[0]), images)
    warnings += _check_noise(own, read, noise) if noise > 0 else _check_depth(own, read, flow.n_bits)
    if len(samples) < len(drawn):
        warnings.append(
            f"{len(drawn) - len(samples)} of {len(drawn)} samples hold NaN or infinity; "
            "give images to remember, since generated ones may be unusable"
        )
    return warnings


def _draw(flow: CheckpointedFlow) -> tuple[Tensor, Tensor | None]:
    """Samples, and the latents that they were made of where these are one tensor."""
    count = max(FEWEST_SAMPLES, min(MAX_SAMPLES, MAX_VALUES // math.prod(flow.image_shape)))
    generator = torch.Generator().manual_seed(SEED)
    if type(flow) is TarFlow:  # its heirs may have latents of another law
        latents = torch.randn(count, *flow.latent_shape, generator=generator) * TEMPERATURE
        return fastest(flow, latents.to(flow.var)).images, latents.to(flow.var)
    try:
        return flow.sample(count, generator=generator, temperature=TEMPERATURE), None
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]  # public, yet missing from its __all__
        raise UnusableFlowError(
            "the flow cannot be sampled: a 1x1 convolution is singular, so it has no inverse; use an earlier checkpoint"
        ) from error


def _check_range(samples: Tensor, reach: float) -> list[str]:
    """Judge where the pixels lie; noise may take them so far beyond the range of images."""
    wide = float((samples.abs() <= WIDE + reach).float().mean())
    if wide < LEAST_IN_WIDE:
        raise UnusableFlowError(
            f"only {wide:.0%} of the pixels of the flow's samples lie in [-{WIDE + reach:g}, {WIDE + reach:g}]; images "
            "are scaled to [-0.5, 0.5): the flow is untrained, or was trained on images of another scale; train it on "
            "this one"
        )
    within = float(((samples >= -0.5 - reach) & (samples < 0.5 + reach)).float().mean())
    if within >= USUAL_IN_RANGE:
        return []
    return [
        f"only {within:.0%} of the pixels of the flow's samples lie in [-0.5, 0.5), to which images are scaled; "
        "make sure that it was trained on images of this scale"
    ]


def _check_return(back: Tensor, given: Tensor) -> None:
    """Judge what came back through both directions of a flow against what was given, (n, ...) both."""
    error = _median((back - given).abs().flatten(1).amax(dim=1))
    if not error <= ROUND_TRIP_TOLERANCE:
        raise UnusableFlowError(
            f"the flow does not invert itself in float32: an image comes back {error:.2g} off, the most is "
            f"{ROUND_TRIP_TOLERANCE:.2g} of the image range; use an earlier checkpoint"
        )


def _check_depth(own: float, read: float, n_bits: int) -> list[str]:
    """Judge n_bits by bits per dimension, of the samples and of the images made of them; uniform noise costs n_bits."""
    own, read = own + n_bits, read + n_bits
    if own < LEAST_BITS:
        raise UnusableFlowError(
            f"n_bits = {n_bits} is implausible: the flow's samples have {own:.2f} bits per dimension; a flow "
            "trained at that depth has 0 or more: state the n_bits that it was trained at"
        )
    said = f"images made of the flow's samples cost {read:.2f} bits per dimension, uniform noise {n_bits}"
    if read > n_bits + MOST_EXCESS:
        raise UnusableFlowError(
            f"n_bits = {n_bits} is implausible or the flow untrained: {said}; state the n_bits that it was trained at, "
            "or train it on images in [-0.5, 0.5)"
        )
    return [f"{said}: the flow is hardly trained, or not at this n_bits"] if read >= n_bits else []


def _check_noise(own: float, read: float, noise_std: float) -> list[str]:
    """Judge the stated noise likewise: a density cannot be narrower than the noise on what it is over."""
    floor = math.log2(noise_std * math.sqrt(2 * math.pi * math.e))  # of N(0, noise_std^2), in bits per dimension
    if own - floor < LEAST_BITS:
        raise UnusableFlowError(
            f"noise_std = {noise_std:g} is implausible: the flow's samples have {own - floor:.2f} bits per dimension "
            "above that noise; a flow trained with it has 0 or more: state the noise_std that it was trained with"
        )
    if read > MOST_EXCESS_UNSHAPED:
        raise UnusableFlowError(
            f"the flow is untrained, or trained on images of another scale: images made of its samples cost {read:.2f} "
            "bits per dimension more than uniform noise; train it on images in [-0.5, 0.5)"
        )
    return (
        [f"images made of the flow's samples cost {read:.2f} bits more than noise: hardly trained"] if read >= 0 else []
    )


def _bits_per_dim(flow: CheckpointedFlow, x: Tensor) -> float:
    """Median of -log2 of the density over [-0.5, 0.5)^d, per dimension; 0 for uniform noise."""
    return _median(-flow.log_prob(x) / (math.prod(flow.image_shape) * math.log(2)))


def _median(values: Tensor) -> float:
    """The median of (n,) values, where NaN and both infinities count as largest."""
    return float(values.nan_to_num(math.inf, math.inf, math.inf).median())
