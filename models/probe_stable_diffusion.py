"""Whether weights that load also make a Stable Diffusion model that a job can use, asked of a small draw of its own.

What decides is how much of the noise in noisy latents the U-Net finds, against a network that answers 0 throughout,
which costs 1 in this unit.
"""

import math

import torch
from torch import Tensor

from models.errors import UnusableModelError
from models.latent_diffusion import LatentDiffusion

SEED = 0
SIDE = 16
"""Of the latent, where the model's own is larger: SD 1.5 takes seconds a row at it, on one core."""
STEPS = 4
"""Of the sampler, without guidance, and as many timesteps looked at, spread over the range: the draw is rough."""
HARDLY = 0.9
"""Squared error over that of answering 0, from which on a model is hardly trained."""
MOST = 2.0
"""The same, from which on it answers something else than is asked of it."""
LEVELS_OFF = 32.0
"""Mean error of a pixel, in levels of 8 bits, beyond which the VAE hardly returns what it is given."""
APART = 1e-4
"""Least difference, relative to the answer, that a prompt makes where prompts matter."""


@torch.no_grad()
def probe_stable_diffusion(model: LatentDiffusion) -> list[str]:
    """Draw a small image, pass it through the VAE, and its noisy latents through the U-Net under two prompts.

    The seed is fixed; 12 rows go through the U-Net.

    Returns:
        Warnings: what is suspicious and may yet be right; most often none.

    Raises:
        UnusableModelError: something is not finite, or the error is far above that of answering 0.
        ArchitectureError: the tokenizer's files are none.
    """
    generator = torch.Generator().manual_seed(SEED)
    x, off = _drawn(model, generator)  # (1, c, s, s)
    steps, noise = model.diffusion.draw_stratified(STEPS, tuple(x.shape[1:]), generator=generator)
    steps, noise = steps.to(x.device), noise.to(x.device)
    null = model.null_condition[None]  # (1, tokens)
    known = min(one.vocab_size for one in model.tokenizers.values())
    other = torch.randint(known, null.shape, generator=generator)
    rows = x.expand(STEPS, *x.shape[1:])
    noised, target = model.diffusion.noised(rows, steps, noise), model.diffusion.target(rows, steps, noise)
    plain, told = (model.answer(noised, steps, model.told(condition.expand(STEPS, -1))) for condition in (null, other))
    share = float((plain - target).square().mean() / target.square().mean())
    if not math.isfinite(share) or not bool(torch.isfinite(told).all()):
        raise UnusableModelError(
            "the U-Net's answers are not finite in float32: a weight is far too large; use an earlier checkpoint"
        )
    if share > MOST:
        raise UnusableModelError(
            f"what the U-Net says of noisy latents is {share:.1f} times as far off as saying nothing: it predicts "
            f"something else than {model.diffusion.config['prediction_type']}, or is untrained; state prediction_type, "
            "or use another checkpoint"
        )
    warnings = []
    if share > HARDLY:
        warnings.append(
            f"the U-Net finds {max(0.0, 1 - share):.0%} of the noise in noisy latents: it is hardly trained"
        )
    if off > LEVELS_OFF:
        warnings.append(
            f"the VAE returns the model's own image with an error of {off:.0f} of 255 levels a pixel: hardly trained"
        )
    if float((told - plain).norm()) <= APART * float(plain.norm()):
        warnings.append("two prompts give the same answer: prompts make no difference")
    return warnings


def _drawn(model: LatentDiffusion, generator: torch.Generator) -> tuple[Tensor, float]:
    """The latent of an image that the model draws, (1, c, s, s), and the mean error of a pixel on its way back."""
    architecture = model.architecture
    halvings = 2 ** (len(architecture["unet"]["block_out_channels"]) - 1)
    channels, size, _ = model.latent_shape
    side = min(size, max(SIDE // halvings, 1) * halvings)
    told = model.told(model.null_condition[None])
    start = torch.randn(1, channels, side, side, generator=generator).to(told.device)
    x = model.diffusion.reverse(lambda noisy, steps: model.answer(noisy, steps, told), start, STEPS)
    scale = float(architecture["vae"]["scaling_factor"])
    image = model.vae.decode(x / scale).sample.clamp(-1, 1)
    mean = model.vae.encode(image).latent_dist.mean
    off = float((model.vae.decode(mean).sample.clamp(-1, 1) - image).abs().mean()) * 127.5
    if not math.isfinite(off) or not bool(torch.isfinite(mean).all()):
        raise UnusableModelError(
            "what the model draws is not finite in float32: a weight is far too large; use an earlier checkpoint"
        )
    return mean * scale, off
