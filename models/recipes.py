"""What each family is built and trained like where nobody says otherwise, by the size of its images.

Defaults are for one machine without a GPU and some hundreds to thousands of small images; every value can be replaced.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from models.errors import ModelError
from models.families import FAMILIES, FLOWS, PIPELINES
from models.protocol import Checkpointed, CheckpointedFlow
from models.training_recipes import AutoencoderRecipe, TrainingRecipe, TransformerRecipe

LAST_SIDE = 4
"""Pixels: a multiscale flow halves the image until its last scale is about this wide."""
MOST_SCALES = 4
SMALL_SIDE = 32
"""Pixels: up to here, defaults are those of a small flow."""
SMALL_TOKENS, TOKENS = 64, 256
"""Most tokens that an image is cut into by default, up to `SMALL_SIDE` and above: attention costs their square."""
WIDTHS = ("hidden", "channels")
"""The lists of an architecture that hold numbers; other lists hold truth values."""
TRAINABLE = tuple(sorted(FAMILIES.keys() - set(PIPELINES)))
"""Families that are trained here; the others come from elsewhere."""
NAMES_FOR_NULL = ("none", "null")
RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 10**8), "seconds": (0.0, 10**8), "batch": (1, 4096), "learning_rate": (1e-8, 1.0),
    "warmup": (1, 10**6), "final_share": (0.0, 1.0), "clip": (1e-6, 1e9), "shift": (0, 64), "average": (0.0, 0.99999),
    "weight_decay": (0.0, 10.0), "label_drop": (0.0, 1.0), "turn": (0.0, 180.0), "zoom": (0.0, 0.9),
    "shear": (0.0, 1.0), "move": (0.0, 64.0), "distorted": (0.0, 1.0), "kl_weight": (0.0, 1e3),
    "kl_final": (0.0, 1e3),
}  # fmt: skip
"""Lowest and highest value of each number of a recipe."""
ADAM = TrainingRecipe(steps=2500, batch=16, learning_rate=2e-3, average=0.99)
TRANSFORMER = TransformerRecipe(
    steps=3000, batch=32, learning_rate=1e-3, warmup=100, final_share=0.01, shift=0, average=0.99
)
DIFFUSION = TransformerRecipe(
    steps=5000, batch=64, learning_rate=2e-3, warmup=100, final_share=0.01, flip=False, shift=0, average=0.998,
    betas=(0.9, 0.99),
)  # fmt: skip
BASE_WIDTH, MOST_WIDTH = 32, 256
"""Of the levels of a U-Net, each twice as wide as the one before."""
AUTOENCODER = AutoencoderRecipe(
    steps=6000, batch=128, learning_rate=1e-3, warmup=100, final_share=0.01, flip=False, shift=0, average=0.999,
    kl_weight=3.0,
)  # fmt: skip
"""Nothing is mirrored: what has classes is often digits or letters. The weight of the KL divergence, 3 at first and 1
in the end, makes samples sure of their class: of 28 x 28 digits the mean P(y = c) was .95 with it, and .88 with a
weight of 1 throughout, after 8,000 steps of 64 images."""
DIGITS = replace(AUTOENCODER, turn=10.0, zoom=0.1, shear=0.1, move=1.5)
"""For grey images of digit size, where a drawing that is turned a little stays of its class."""


class SettingError(ModelError):
    """A setting is unknown or out of range: the message lists what there is."""


@dataclass(frozen=True)
class Plan:
    """How a model is built and trained."""

    architecture: dict[str, Any]
    """Arguments of the family's constructor; it has defaults for what is missing."""
    recipe: TrainingRecipe


def plan_for(family: str, image_shape: Sequence[int], *, n_classes: int = 0) -> Plan:
    """The defaults of a family for images (channels, height, width).

    Args:
        family: one of `TRAINABLE`.
        image_shape: (channels, height, width).
        n_classes: classes of a model of classes; 0 for none.

    Raises:
        SettingError: the family is unknown or not trained here, or has no classes.
    """
    if family not in FAMILIES:
        raise SettingError(f"there is no family {family!r}; known: {', '.join(TRAINABLE)}")
    if family not in TRAINABLE:
        raise SettingError(f"a {family} is not trained here, but uploaded; trained are {', '.join(TRAINABLE)}")
    known = FAMILIES[family].architecture
    if n_classes and "n_classes" not in known:
        raise SettingError(f"a {family} has no classes; a tarflow, a class-prior, a vae and a ddpm can have")
    channels, side = image_shape[0], min(image_shape[1:])
    small = side <= SMALL_SIDE
    if family == "glow":
        sizes = {"n_flow": 8, "hidden": 96} if small else {"n_flow": 16, "hidden": 128}
        recipe: TrainingRecipe = (
            ADAM if small else TrainingRecipe(steps=10_000, batch=16, learning_rate=1e-3, average=0.999)
        )
        return Plan({"n_block": _scales(image_shape), "affine": True, "lu": True, **sizes}, recipe)
    if family == "realnvp":
        return Plan({"n_block": _scales(image_shape), "n_flow": 3, "hidden": 64 if small else 96, "depth": 1}, ADAM)
    if "patch_size" in known:
        patch = _patch_size(image_shape)
        noise = 0.05 if channels == 1 else 0.025  # as published for digits and for photos, on our scale
        defaults = {
            "patch_size": patch, "width": 128, "n_block": 4, "n_layer": 2, "noise_std": noise, "n_classes": n_classes
        }  # fmt: skip
        recipe = TRANSFORMER if family == "tarflow" else replace(TRANSFORMER, label_drop=0.0)  # a prior is of a class
        return Plan({name: value for name, value in defaults.items() if name in known}, recipe)
    if family == "vae":
        drawing = small and channels == 1  # the paper's sizes are those of its digits
        widths, latent = ([512, 256], 8) if drawing else ([1024, 512], 32)
        return Plan({"hidden": widths, "latent": latent, "n_classes": n_classes}, DIGITS if drawing else AUTOENCODER)
    if family == "ddpm":
        widths = [min(BASE_WIDTH << level, MOST_WIDTH) for level in range(_halvings(image_shape) + 1)]
        layers = 1 if small else 2
        return Plan({"channels": widths, "layers": layers, "attention": False, "n_classes": n_classes}, DIFFUSION)
    return Plan({}, TrainingRecipe(steps=2500, batch=32, learning_rate=1e-3, average=0.99))


def model_for(
    family: str, image_shape: Sequence[int], n_bits: int, generator: torch.Generator | None, **overrides: Any
) -> Checkpointed:
    """A model of a family for images (channels, height, width), with the defaults of `plan_for`.

    Args:
        family: one of `TRAINABLE`.
        image_shape: (channels, height, width).
        n_bits: colour depth.
        generator: draws the starting weights; null: for weights to be loaded into.
        **overrides: arguments of the family's constructor that replace defaults, such as `hidden=128`.

    Raises:
        SettingError: the family or an argument is unknown.
        ArchitectureError: the family does not take this size.
    """
    architecture = plan_for(family, image_shape, n_classes=overrides.get("n_classes", 0)).architecture | overrides
    known = FAMILIES[family].architecture
    if odd := sorted(architecture.keys() - known.keys()):
        raise SettingError(f"a {family} has no {odd[0]!r}; it has {', '.join(sorted(known))}")
    return FAMILIES[family].model(tuple(image_shape), n_bits, **architecture, generator=generator)


def flow_for(
    family: str, image_shape: Sequence[int], n_bits: int, generator: torch.Generator | None, **overrides: Any
) -> CheckpointedFlow:
    """`model_for`, of the families that are flows.

    Raises:
        SettingError: as there, or the family is none of flows.
        ArchitectureError: as there.
    """
    model = model_for(family, image_shape, n_bits, generator, **overrides)
    if not isinstance(model, CheckpointedFlow):
        raise SettingError(f"a {family} is no flow; flows are {', '.join(sorted(FLOWS))}")
    return model


def read_settings(family: str, texts: Sequence[str], recipe: TrainingRecipe) -> tuple[dict[str, Any], TrainingRecipe]:
    """Texts such as "hidden=128" or "batch=64" as overrides of the architecture, and the recipe with its own replaced.

    Raises:
        SettingError: a text has no "=", a name is unknown, or a value is of the wrong type or out of range.
    """
    types = FAMILIES[family].architecture
    current = asdict(recipe)
    architecture: dict[str, Any] = {}
    changes: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"a setting is name=value, not {text!r}")
        if name in types:
            architecture[name] = _value(name, value, types[name])
        elif name in current:
            changes[name] = _recipe_value(name, value, current[name])
        else:
            there = f"architecture: {', '.join(sorted(types))}; training: {', '.join(sorted(current))}"
            raise SettingError(f"a {family} has no setting {name!r}. There are, {there}")
    return architecture, replaced(recipe, changes)


def replaced(recipe: TrainingRecipe, changes: Mapping[str, Any]) -> TrainingRecipe:
    """The recipe with some fields replaced, all in range.

    Raises:
        SettingError: a number is out of range, with the range.
    """
    values = {field.name: getattr(recipe, field.name) for field in fields(recipe)} | dict(changes)
    for name, (low, high) in RANGES.items():
        value = values.get(name)
        if value is not None and not low <= value <= high:
            raise SettingError(f"{name} must be from {low:g} to {high:g}, not {value:g}")
    return type(recipe)(**values)


def _scales(image_shape: Sequence[int]) -> int:
    """Of a multiscale flow: one at least."""
    return max(1, _halvings(image_shape))


def _halvings(image_shape: Sequence[int]) -> int:
    """How often the sides can be halved, until the last scale is small."""
    sides = [int(side) for side in image_shape[1:]]
    possible = min((side & -side).bit_length() - 1 for side in sides)
    wanted = int(math.log2(max(min(sides) // LAST_SIDE, 1)))
    return min(possible, wanted, MOST_SCALES)


def _patch_size(image_shape: Sequence[int]) -> int:
    """The smallest patch that cuts the image into few enough tokens."""
    height, width = (int(side) for side in image_shape[1:])
    most = SMALL_TOKENS if max(height, width) <= SMALL_SIDE else TOKENS
    whole = [p for p in range(2, min(height, width) + 1) if height % p == 0 and width % p == 0] or [1]
    return next((p for p in whole if height * width // p**2 <= most), whole[-1])


def _recipe_value(name: str, text: str, current: Any) -> Any:
    if name in ("steps", "seconds") and text.lower() in NAMES_FOR_NULL:
        return None
    if isinstance(current, tuple):
        parts = tuple(_value(name, part, float) for part in text.split(","))
        if len(parts) != len(current) or not all(0 <= part < 1 for part in parts):
            raise SettingError(f"{name} takes {len(current)} numbers from 0 to 1, with a comma between, not {text!r}")
        return parts
    kind = {"steps": int, "seconds": float}.get(name, type(current))
    return _value(name, text, kind)


def _value(name: str, text: str, kind: type) -> Any:
    """A text as a number, truth value, JSON object, list of widths, or list of truth values (one: for all blocks)."""
    truths = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    try:
        if kind is bool:
            return truths[text.lower()]
        if kind is list and name in WIDTHS:
            return [int(part) for part in text.split(",")]
        if kind is list:
            flags = [truths[part.lower()] for part in text.split(",")]
            return flags if len(flags) > 1 else flags[0]
        if kind is dict:
            read = json.loads(text)
            if not isinstance(read, dict):
                raise ValueError(text)
            return read
        value = kind(text)
    except (ValueError, KeyError) as error:
        wanted = {int: "a whole number", float: "a number", dict: "a JSON object"}.get(kind, "true or false")
        if kind is list and name in WIDTHS:
            wanted = "whole numbers with a comma between"
        raise SettingError(f"{name} is {wanted}, not {text!r}") from error
    if isinstance(value, float) and not math.isfinite(value):
        raise SettingError(f"{name} is a finite number, not {text!r}")
    return value
