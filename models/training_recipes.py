"""How models are trained: the settings of a training, whose every field is part of what comes out."""

from dataclasses import dataclass


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
class TransformerRecipe(TrainingRecipe):
    """What a TarFlow's training has on top: AdamW, dropped labels, bfloat16 (Zhai et al., 2024, app. A).

    A type of its own, so that the fields of `TrainingRecipe`, and with them the keys of caches, stay as they are.
    """

    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decays."""
    weight_decay: float = 1e-4
    label_drop: float = 0.1
    """Share of labels that become "no class", so that a conditional flow learns the unconditional density too."""
    bf16: bool = True
    """Whether matrix products may run in bfloat16, on devices that are made for it; likelihoods stay float32."""


@dataclass(frozen=True)
class AutoencoderRecipe(TrainingRecipe):
    """What a VAE's training has on top: images that are turned, scaled, slanted and moved by fractions of a pixel."""

    turn: float = 0.0
    """Largest angle each way, in degrees."""
    zoom: float = 0.0
    """Largest change of width and of height, as a share."""
    shear: float = 0.0
    """Largest slant each way, as a share of the height."""
    move: float = 0.0
    """Largest move each way, in pixels; `shift` moves by whole ones."""
    distorted: float = 0.8
    """Share of the images that all this happens to."""
    kl_weight: float = 1.0
    """Of the KL divergence in the loss, until the middle of the training. Above 1 the loss is a looser bound, and the
    latents of the images fill the prior better, so that samples are surer of their class (Higgins et al., 2017)."""
    kl_final: float = 1.0
    """The same at the end, to which it falls linearly; 1 is the ELBO."""

    def kl(self, share: float) -> float:
        """The weight of the KL divergence at that share of the training, 0 to 1."""
        return self.kl_weight + (self.kl_final - self.kl_weight) * min(1.0, max(0.0, 2 * share - 1))
