"""A small Stable Diffusion pipeline and its training from nothing: VAE, text encoder, then the U-Net on both.

Rombach et al., "High-Resolution Image Synthesis with Latent Diffusion Models" (2022). Stable Diffusion's text encoder
has learned from pairs of captions and images; ours, to tell from a caption what is in the image, which takes seconds
and saves the U-Net half of its training.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from examples.caption_tokenizer import clip_tokenizer, write_vocabulary
from models.conditional import Sampling
from models.diffusion import Diffusion, guided
from unlearning.randomness import stream

SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
"""Stable Diffusion's own."""
REPORT_STEPS = 50
"""Steps between two reports, over which the reported loss is averaged."""
PIECE = 200
"""Images drawn at once."""


@dataclass(frozen=True)
class PartRecipe:
    """How one network is trained. Bounded by steps: a busy machine takes longer and gives the same base."""

    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class PipelineRecipe:
    """A pipeline and its training. Every field is part of the result's identity: the cache is keyed by it."""

    digits: tuple[int, ...]
    """Those that it draws, in order."""
    image_size: int
    """Side in pixels."""
    vae_channels: tuple[int, ...]
    """Each further level halves the side."""
    vae: PartRecipe
    text: PartRecipe
    unet_channels: tuple[int, int]
    head_width: int
    unet: PartRecipe
    average: float
    """Decay of the running mean of the U-Net's weights, which is the result."""
    kl_weight: float = 1e-3
    """Of the KL divergence in nats a latent, against the squared error a pixel."""
    snr_cap: float = 5.0
    """The loss at a timestep counts min(SNR, cap) / SNR (Hang et al., "Min-SNR Weighting Strategy", 2023)."""
    empty: float = 0.1
    """Share of images whose caption is empty, for classifier-free guidance."""
    text_width: int = 64
    text_layers: int = 2
    positions: int = 24
    """Longest caption in tokens."""
    merges: int = 2000
    """Of CLIP's byte-pair encoding."""
    seed: int = 0


@dataclass(frozen=True)
class PartProgress:
    """One report of a running training."""

    part: str
    """"vae", "text" or "unet"."""
    step: int
    steps: int
    loss: float
    seconds: float
    """Since this part began."""


Report = Callable[[PartProgress], None]


@dataclass(frozen=True)
class Pipeline:
    """What a Stable Diffusion folder holds, in evaluation mode."""

    vae: Any
    text_encoder: Any
    tokenizer: Any
    unet: Any

    @torch.no_grad()
    def embed(self, captions: Sequence[str]) -> Tensor:
        """Embeddings of captions, (n, positions, width)."""
        tokens = self.tokenizer(list(captions), padding="max_length", return_tensors="pt").input_ids
        embedded: Tensor = self.text_encoder(tokens).last_hidden_state
        return embedded

    @torch.no_grad()
    def draw(self, captions: Sequence[str], generator: torch.Generator, sampling: Sampling) -> Tensor:
        """An image of each caption by DDIM, uint8 (n, 3, side, side)."""
        null, told = self.embed([""]), self.embed(captions)
        side = self.unet.config.sample_size
        start = torch.randn(len(told), self.vae.config.latent_channels, side, side, generator=generator)
        images = []
        for first in range(0, len(told), PIECE):
            condition = told[first : first + PIECE]
            predict = guided(self._predict, condition, null.expand_as(condition), sampling.guidance_scale)
            latents = Diffusion(SCHEDULER).reverse(predict, start[first : first + PIECE], sampling.steps)
            images.append(self.vae.decode(latents / self.vae.config.scaling_factor).sample)
        return ((torch.cat(images).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _predict(self, x: Tensor, steps: Tensor, embedded: Tensor) -> Tensor:
        answer: Tensor = self.unet(x, steps, embedded).sample
        return answer


def train_pipeline(
    images: Tensor,
    captions: Sequence[Sequence[str]],
    labels: Tensor,
    recipe: PipelineRecipe,
    callback: Report | None = None,
) -> Pipeline:
    """Train a pipeline from nothing.

    Args:
        images: uint8 (n, 3, side, side).
        captions: those of each label, as many of each; an image gets one of them in each step.
        labels: int64 (n,).
        recipe: what to train.
        callback: called from time to time.
    """
    pipeline = untrained(recipe)
    x = images.float() / 127.5 - 1
    train_vae(pipeline.vae, x, recipe, callback)
    mean, deviation = scaled_latents(pipeline.vae, x)
    train_text_encoder(pipeline, captions, recipe, callback)
    train_unet(pipeline, mean, deviation, captions, labels, recipe, callback)
    return pipeline


def write_folder(pipeline: Pipeline, folder: Path) -> None:
    """Write a folder that `StableDiffusionPipeline.from_pretrained` opens, weights as safetensors."""
    whole = StableDiffusionPipeline(
        vae=pipeline.vae, text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer, unet=pipeline.unet,
        scheduler=DDIMScheduler(**SCHEDULER), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    whole.save_pretrained(folder, safe_serialization=True)
    write_vocabulary(pipeline.tokenizer, folder / "tokenizer")


def open_folder(folder: Path) -> Pipeline:
    """The pipeline in a folder that `write_folder` wrote."""
    whole = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    return Pipeline(whole.vae.eval(), whole.text_encoder.eval(), whole.tokenizer, whole.unet.eval())


def untrained(recipe: PipelineRecipe) -> Pipeline:
    """A pipeline as it is drawn from the recipe's seed."""
    tokenizer, levels = clip_tokenizer(recipe.merges, recipe.positions), len(recipe.vae_channels)
    with torch.random.fork_rng(devices=[]):  # the libraries draw weights from the global generator: it is put back
        torch.manual_seed(recipe.seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * levels, up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=recipe.vae_channels, layers_per_block=1, latent_channels=4, norm_num_groups=4,
            sample_size=recipe.image_size,
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer), hidden_size=recipe.text_width, intermediate_size=2 * recipe.text_width,
                num_hidden_layers=recipe.text_layers, num_attention_heads=4, projection_dim=recipe.text_width,
                max_position_embeddings=recipe.positions, bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
            )
        )  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=recipe.image_size >> (levels - 1), in_channels=4, out_channels=4, layers_per_block=1,
            block_out_channels=recipe.unet_channels, norm_num_groups=8, cross_attention_dim=recipe.text_width,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            attention_head_dim=tuple(width // recipe.head_width for width in recipe.unet_channels),
        )  # fmt: skip
    return Pipeline(vae.eval(), text_encoder.eval(), tokenizer, unet.eval())


def train_vae(vae: Any, x: Tensor, recipe: PipelineRecipe, callback: Report | None = None) -> None:
    """Train the VAE on images x in [-1, 1], (n, 3, side, side)."""

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        latent = vae.encode(x[rows]).latent_dist
        z = latent.mean + latent.std * torch.randn(latent.mean.shape, generator=generator)
        kl: Tensor = latent.kl().mean() / z[0].numel()
        return F.mse_loss(vae.decode(z).sample, x[rows]) + recipe.kl_weight * kl

    _fit("vae", vae, len(x), recipe.vae, loss, stream(recipe.seed, "vae"), callback)


@torch.no_grad()
def scaled_latents(vae: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the latents of images, scaled to variance 1, which the VAE's configuration keeps.

    Returns:
        two of (n, 4, side, side).
    """
    parts = [vae.encode(x[first : first + PIECE]).latent_dist for first in range(0, len(x), PIECE)]
    mean, deviation = torch.cat([one.mean for one in parts]), torch.cat([one.std for one in parts])
    scale = 1 / float((mean.var() + deviation.square().mean()).sqrt())
    vae.register_to_config(scaling_factor=scale)
    return mean * scale, deviation * scale


def train_text_encoder(
    pipeline: Pipeline, captions: Sequence[Sequence[str]], recipe: PipelineRecipe, callback: Report | None = None
) -> None:
    """Train the text encoder to tell the label of a caption at its end, and where it is padded; none, of the empty one.

    Args:
        pipeline: its text encoder is trained.
        captions: those of each label.
        recipe: what to train.
        callback: called from time to time.
    """
    encoder, tokenizer = pipeline.text_encoder, pipeline.tokenizer
    flat = [*(caption for of in captions for caption in of), ""]
    labels = torch.tensor([*(label for label, of in enumerate(captions) for _ in of), len(captions)])
    tokens = tokenizer(flat, padding="max_length", return_tensors="pt").input_ids
    ends = tokens == tokenizer.eos_token_id  # (n, positions), of the padding too
    start = stream(recipe.seed, "text head")
    head = nn.Linear(recipe.text_width, len(captions) + 1, device="meta").to_empty(device="cpu")  # not drawn globally
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=start) / recipe.text_width**0.5)
        head.bias.zero_()

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:  # noqa: ARG001  # as the other parts' losses
        end = ends[rows]
        answers = head(encoder(tokens[rows]).last_hidden_state[end])  # (ends of all rows, labels)
        return F.cross_entropy(answers, labels[rows, None].expand_as(end)[end])

    both = nn.ModuleList([encoder, head])
    _fit("text", both, len(flat), recipe.text, loss, stream(recipe.seed, "text"), callback)
    encoder.requires_grad_(False)


def train_unet(
    pipeline: Pipeline,
    mean: Tensor,
    deviation: Tensor,
    captions: Sequence[Sequence[str]],
    labels: Tensor,
    recipe: PipelineRecipe,
    callback: Report | None = None,
) -> None:
    """Train the U-Net on latents N(mean, deviation^2) with captions; see `train_pipeline` and `scaled_latents`."""
    diffusion, unet, each = Diffusion(SCHEDULER), pipeline.unet, len(captions[0])
    embedded = pipeline.embed([*(caption for of in captions for caption in of), ""])  # (labels * each + 1, ...)
    abar: Tensor = DDIMScheduler(**SCHEDULER).alphas_cumprod
    weights = ((1 - abar) / abar * recipe.snr_cap).clamp(max=1)  # min(SNR, cap) / SNR
    average = {name: value.detach().clone() for name, value in unet.state_dict().items()}

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        n = len(rows)
        x = mean[rows] + deviation[rows] * torch.randn(mean[rows].shape, generator=generator)
        caption = labels[rows] * each + torch.randint(each, (n,), generator=generator)
        caption[torch.rand(n, generator=generator) < recipe.empty] = len(embedded) - 1
        steps, noise = diffusion.draw_stratified(n, tuple(x.shape[1:]), generator=generator)
        answer = unet(diffusion.noised(x, steps, noise), steps, embedded[caption]).sample
        error: Tensor = (answer - diffusion.target(x, steps, noise)).square().flatten(1).mean(1)
        return (error * weights[steps]).mean()

    @torch.no_grad()
    def follow(step: int) -> None:
        decay = min(recipe.average, step / (step + 10))
        for name, value in unet.state_dict().items():
            average[name].lerp_(value, 1 - decay)

    _fit("unet", unet, len(mean), recipe.unet, loss, stream(recipe.seed, "unet"), callback, follow)
    unet.load_state_dict(average)


def _fit(
    part: str,
    model: nn.Module,
    n: int,
    recipe: PartRecipe,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    generator: torch.Generator,
    callback: Report | None,
    after: Callable[[int], None] | None = None,
) -> None:
    """AdamW with a short rise of the learning rate and a cosine to nothing."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, recipe.learning_rate, total_steps=recipe.steps, pct_start=0.1, cycle_momentum=False
    )
    started, running = time.monotonic(), 0.0
    for step in range(1, recipe.steps + 1):
        value = loss(torch.randint(n, (recipe.batch,), generator=generator), generator)
        optimiser.zero_grad(set_to_none=True)
        value.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if after is not None:
            after(step)
        running += (float(value.detach()) - running) / min(step, REPORT_STEPS)
        if callback is not None and (step % REPORT_STEPS == 0 or step == recipe.steps):
            callback(PartProgress(part, step, recipe.steps, running, time.monotonic() - started))
