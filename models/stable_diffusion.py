"""Stable Diffusion 1.x and 2.x: a latent diffusion model of prompts, in one module and so in one checkpoint."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.latent_diffusion import N_BITS, SCOPES, LatentDiffusion
from models.stable_diffusion_parts import PARTS, Part

__all__ = ["SAMPLING", "SCOPES", "StableDiffusion"]

SAMPLING = {"steps": 50, "guidance_scale": 7.5}
"""As the pipelines of SD 1.x and 2.x draw where they are told nothing."""


class StableDiffusion(LatentDiffusion):
    """See `models.latent_diffusion.LatentDiffusion`; the U-Net is told the text encoder's last hidden states.

    Args:
        image_shape: (channels, side, side), what the VAE makes of latents of the U-Net's sample_size.
        n_bits: 8.
        unet: configuration of the U-Net, see `models.stable_diffusion_parts.UNET`.
        vae: of the VAE.
        text_encoder: of the text encoder.
        tokenizer: bytes of its files and special tokens, see `models.prompt_tokens.checked_tokenizer`.
        scheduler: of the forward process and the sampler, see `models.diffusion.KNOWN`.
        sampling: {"steps", "guidance_scale"}, see `models.conditional.Sampling`.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.

    Raises:
        ArchitectureError: a value is out of range, or the parts do not fit each other.
    """

    family: ClassVar[str] = "stable-diffusion"
    PARTS: ClassVar[Mapping[str, Part]] = PARTS
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder"}
    SAMPLING: ClassVar[Mapping[str, Any]] = SAMPLING
    text_encoder: Any

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = N_BITS,
        *,
        unet: Mapping[str, Any],
        vae: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        scheduler: Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder}
        tokenizers = {"tokenizer": tokenizer}
        super().__init__(
            image_shape, n_bits, configs, tokenizers, scheduler=scheduler, sampling=sampling, generator=generator
        )

    def answer(self, x: Tensor, steps: Tensor, told: Tensor) -> Tensor:
        """What the U-Net answers to x_t (n, c, h, w), timesteps (n,) and hidden states (n, tokens, width)."""
        answer: Tensor = self.unet(x, steps, encoder_hidden_states=told).sample
        return answer

    @torch.no_grad()
    def _embedded(self, row: Tensor) -> Tensor:
        with self._exactly():
            hidden: Tensor = self.text_encoder(row.to(self._device)).last_hidden_state
        return hidden
