"""The families of models that a checkpoint may hold: a new one is an entry here and in the table of its law tests."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from models.autoregressive import IAF, MAF
from models.class_prior import ClassPriorFlow
from models.conditional import CheckpointedConditional
from models.glow import Glow
from models.protocol import Checkpointed, CheckpointedFlow
from models.realnvp import RealNVP
from models.tarflow import TarFlow
from models.vae import ConditionalVAE

__all__ = ["CONDITIONALS", "FAMILIES", "FLOWS", "PIPELINES", "Family"]

M_co = TypeVar("M_co", bound=Checkpointed, covariant=True)


@dataclass(frozen=True)
class Family(Generic[M_co]):
    """How a manifest becomes a model."""

    model: Callable[..., M_co]
    """The class; called as `model(image_shape, n_bits, **architecture)`, and with a `generator` to start training."""
    architecture: Mapping[str, type]
    """Every field of the manifest's architecture with its JSON type; all are required."""

    def build(self, image_shape: tuple[int, int, int], n_bits: int, architecture: Mapping[str, Any]) -> M_co:
        """An empty model of this family, for weights to be loaded into."""
        return self.model(image_shape, n_bits, **architecture)

    def load(self) -> None:
        """Import the libraries that `build` needs, for who has the time before the manifest is there."""
        if isinstance(self.model, _Later):
            self.model.load()


@dataclass(frozen=True)
class _Later:
    """A class whose module is imported when a model is built: diffusers takes seconds, which no job on a flow has."""

    module: str
    name: str

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self.load()(*arguments, **named)

    def load(self) -> Callable[..., Any]:
        """The class."""
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.name)
        return found


FLOWS: dict[str, Family[CheckpointedFlow]] = {
    "glow": Family(Glow, {"n_block": int, "n_flow": int, "hidden": int, "affine": bool, "lu": list}),
    "realnvp": Family(RealNVP, {"n_block": int, "n_flow": int, "hidden": int, "depth": int}),
    "maf": Family(MAF, {"n_flow": int, "hidden": int, "depth": int}),
    "iaf": Family(IAF, {"n_flow": int, "hidden": int, "depth": int}),
    "tarflow": Family(
        TarFlow,
        {
            "patch_size": int,
            "width": int,
            "n_block": int,
            "n_layer": int,
            "head_width": int,
            "noise_std": float,
            "n_classes": int,
        },
    ),
    "class-prior": Family(
        ClassPriorFlow,
        {
            "patch_size": int,
            "width": int,
            "n_block": int,
            "n_layer": int,
            "head_width": int,
            "noise_std": float,
            "n_classes": int,
        },
    ),
}
"""Densities with exact likelihoods, by the name that stands in a manifest, which is the class's `family`."""
CONDITIONALS: dict[str, Family[CheckpointedConditional]] = {
    "vae": Family(ConditionalVAE, {"hidden": list, "latent": int, "n_classes": int}),
    "ddpm": Family(
        _Later("models.ddpm", "ClassDDPM"),
        {
            "channels": list,
            "layers": int,
            "attention": list,
            "middle_attention": bool,
            "norm_groups": int,
            "head_width": int,
            "scale_shift": bool,
            "n_classes": int,
            "scheduler": dict,
            "sampling": dict,
        },
    ),
    "stable-diffusion": Family(
        _Later("models.stable_diffusion", "StableDiffusion"),
        {
            "unet": dict,
            "vae": dict,
            "text_encoder": dict,
            "tokenizer": dict,
            "scheduler": dict,
            "sampling": dict,
        },
    ),
    "stable-diffusion-xl": Family(
        _Later("models.stable_diffusion_xl", "StableDiffusionXL"),
        {
            "unet": dict,
            "vae": dict,
            "text_encoder": dict,
            "text_encoder_2": dict,
            "tokenizer": dict,
            "tokenizer_2": dict,
            "force_zeros_for_empty_prompt": bool,
            "scheduler": dict,
            "sampling": dict,
        },
    ),
}
"""Models p(x | c) that are known by a bound of their likelihood; likewise by name."""
PIPELINES = ("stable-diffusion", "stable-diffusion-xl")
"""Those that are a pipeline of diffusers: `models.diffusers_folder` reads and writes them."""
FAMILIES: dict[str, Family[Checkpointed]] = {**FLOWS, **CONDITIONALS}
"""All of them."""
