"""The families of flows that a checkpoint may hold: a new one is an entry here and in the law tests' table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from models.autoregressive import IAF, MAF
from models.class_prior import ClassPriorFlow
from models.glow import Glow
from models.protocol import CheckpointedFlow
from models.realnvp import RealNVP
from models.tarflow import TarFlow

__all__ = ["FAMILIES", "Family"]


@dataclass(frozen=True)
class Family:
    """How a manifest becomes a flow."""

    flow: Callable[..., CheckpointedFlow]
    """The class; called as `flow(image_shape, n_bits, **architecture)`, and with a `generator` to start training."""
    architecture: Mapping[str, type]
    """Every field of the manifest's architecture with its JSON type; all are required."""

    def build(
        self, image_shape: tuple[int, int, int], n_bits: int, architecture: Mapping[str, Any]
    ) -> CheckpointedFlow:
        """An empty flow of this family, for weights to be loaded into."""
        return self.flow(image_shape, n_bits, **architecture)


FAMILIES: dict[str, Family] = {
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
"""By the name that stands in a manifest, which is the class's `family`."""
