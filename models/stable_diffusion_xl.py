"""Stable Diffusion XL, the base model: what it is told of a prompt by two text encoders, and of the image's size.

Podell et al., "SDXL: Improving Latent Diffusion Models for High-Resolution Image Synthesis" (2023). The rest is that of
every latent diffusion model of prompts. Its refiner, which reads with the second encoder alone, is another model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from models.errors import ArchitectureError
from models.latent_diffusion import N_BITS, LatentDiffusion
from models.stable_diffusion_parts import PARTS_XL, Part
from models.tensor_files import quoted

__all__ = ["SAMPLING", "StableDiffusionXL"]

SAMPLING = {"steps": 50, "guidance_scale": 5.0}
"""As the pipeline of SDXL draws where it is told nothing."""
SIZES = 6
"""Numbers that tell the image's size: as it was, where it was cropped, as it is to be; a height and a width each."""
PENULTIMATE = -2


class StableDiffusionXL(LatentDiffusion):
    """See `models.latent_diffusion.LatentDiffusion`; a condition is the first tokenizer's row, then the second's.

    The U-Net is told the hidden states of the last layer but one, of both text encoders side by side; and, added to the
    timestep, the second's projection of the whole prompt, and that the image was never cropped or of another size.

    Args:
        image_shape: (channels, side, side), what the VAE makes of latents of the U-Net's sample_size.
        n_bits: 8.
        unet: configuration of the U-Net, see `models.stable_diffusion_parts.UNET_XL`.
        vae: of the VAE.
        text_encoder: of the first text encoder.
        text_encoder_2: of the second.
        tokenizer: of the first, see `models.prompt_tokens.checked_tokenizer`.
        tokenizer_2: of the second, which pads otherwise.
        force_zeros_for_empty_prompt: whether p(x) is what zeros for all that is told of a prompt make, instead of what
            the empty prompt does.
        scheduler: of the forward process and the sampler, see `models.diffusion.KNOWN`.
        sampling: {"steps", "guidance_scale"}, see `models.conditional.Sampling`.
        generator: draws the starting weights; without it all of them are zero, for weights to be loaded into.

    Raises:
        ArchitectureError: a value is out of range, or the parts do not fit each other.
    """

    family: ClassVar[str] = "stable-diffusion-xl"
    PARTS: ClassVar[Mapping[str, Part]] = PARTS_XL
    TOKENIZERS: ClassVar[Mapping[str, str]] = {"tokenizer": "text_encoder", "tokenizer_2": "text_encoder_2"}
    SAMPLING: ClassVar[Mapping[str, Any]] = SAMPLING
    text_encoder: Any
    text_encoder_2: Any

    def __init__(
        self,
        image_shape: Sequence[int],
        n_bits: int = N_BITS,
        *,
        unet: Mapping[str, Any],
        vae: Mapping[str, Any],
        text_encoder: Mapping[str, Any],
        text_encoder_2: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        tokenizer_2: Mapping[str, Any],
        force_zeros_for_empty_prompt: bool,
        scheduler: Mapping[str, Any],
        sampling: Mapping[str, Any] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(force_zeros_for_empty_prompt, bool):
            raise ArchitectureError(
                f"force_zeros_for_empty_prompt is true or false, not {quoted(force_zeros_for_empty_prompt)}"
            )
        configs = {"unet": unet, "vae": vae, "text_encoder": text_encoder, "text_encoder_2": text_encoder_2}
        tokenizers = {"tokenizer": tokenizer, "tokenizer_2": tokenizer_2}
        super().__init__(
            image_shape, n_bits, configs, tokenizers, scheduler=scheduler, sampling=sampling, generator=generator
        )
        self._zeros = force_zeros_for_empty_prompt

    @property
    def architecture(self) -> dict[str, Any]:
        """The constructor's arguments beyond image shape and n_bits, as JSON values."""
        return {**super().architecture, "force_zeros_for_empty_prompt": self._zeros}

    def answer(self, x: Tensor, steps: Tensor, told: Tensor) -> Tensor:
        """What the U-Net answers to x_t (n, c, h, w), timesteps (n,) and what it is told (n, values), see `told`."""
        width = self._configs["unet"]["cross_attention_dim"]
        # laid out anew once: every layer of attention would make, and keep, a copy of its own of what is not contiguous
        hidden = told[:, : -self._projected].contiguous().view(len(x), -1, width)
        side = float(self.image_shape[1])
        sizes = torch.tensor([side, side, 0.0, 0.0, side, side], device=x.device).expand(len(x), SIZES)
        answer: Tensor = self.unet(
            x,
            steps,
            encoder_hidden_states=hidden,
            added_cond_kwargs={"text_embeds": told[:, -self._projected :], "time_ids": sizes},
        ).sample
        return answer

    @torch.no_grad()
    def _embedded(self, row: Tensor) -> Tensor:
        """Hidden states (tokens * width) and projection of a row of tokens, as one row."""
        if self._zeros and torch.equal(row[0], self.null_condition):
            positions, width = self.tokenizers["tokenizer"].positions, self._configs["unet"]["cross_attention_dim"]
            return torch.zeros(1, positions * width + self._projected)
        first, second = row.to(self._device).chunk(2, dim=1)
        with self._exactly():
            one = self.text_encoder(first, output_hidden_states=True)
            two = self.text_encoder_2(second, output_hidden_states=True)
        hidden = torch.cat([found.hidden_states[PENULTIMATE] for found in (one, two)], dim=-1)  # (1, tokens, width)
        return torch.cat([hidden.flatten(1), two.text_embeds], dim=1)

    def _check_parts(self) -> None:
        super()._check_parts()
        unet, first, second = (self._configs[part] for part in ("unet", "text_encoder", "text_encoder_2"))
        if first["max_position_embeddings"] != second["max_position_embeddings"]:
            raise ArchitectureError(
                f"one text encoder reads {first['max_position_embeddings']} tokens, the other "
                f"{second['max_position_embeddings']}: they do not belong together"
            )
        reads = unet["projection_class_embeddings_input_dim"]
        told = SIZES * unet["addition_time_embed_dim"] + second["projection_dim"]
        if reads != told:
            raise ArchitectureError(
                f"the U-Net's projection_class_embeddings_input_dim is {reads}; the second text encoder and {SIZES} "
                f"sizes make {told}: a refiner, or parts that do not belong together"
            )

    @property
    def _projected(self) -> int:
        return int(self._configs["text_encoder_2"]["projection_dim"])
