"""The TarFlow layout in which Apple publishes its weights, and what tells it apart."""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.checkpoints import Manifest
from models.errors import MissingFactError, TensorMismatchError
from models.state_dicts import count, filled, shape_of, without_prefix
from models.tarflow import HEAD_WIDTH, INPUT_SCALE

DERIVED = re.compile(r"^blocks\.\d+\.attn_mask$")
"""A triangle of ones a block; attention is causal without it."""
N_BITS = 8
"""Published models are trained on images of 256 levels."""
NAMES = re.compile(r"^(?:module\.)?blocks\.\d+\.attn_blocks\.")


def is_tarflow(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are a TarFlow's."""
    return any(NAMES.match(name) for name in tensors)


def tarflow_from_state_dict(
    tensors: Mapping[str, Tensor],
    *,
    noise_std: float | None,
    image_size: int | None = None,
    n_bits: int | None = None,
) -> nn.Module:
    """Build our TarFlow from a state dict of the published layout; shapes tell everything but the noise.

    Heads are 64 wide, as in all published models. A volume-preserving model, which has no log-scales, becomes one whose
    log-scales are zero.

    Args:
        tensors: the state dict.
        noise_std: of the Gaussian noise it was trained with, on images in [-1, 1]: the last number of the published
            file's name. 0 for a model of uniform noise.
        image_size: where it is known, to be held against the shapes.
        n_bits: colour depth; 8 where it is not stated.

    Raises:
        MissingFactError: noise_std is not stated.
        TensorMismatchError: the tensors do not make one TarFlow, or not of this image size.
    """
    state = {name: value for name, value in without_prefix(tensors).items() if not DERIVED.match(name)}
    blocks = count(state, re.compile(r"^blocks\.(\d+)\."))
    layers = count(state, re.compile(r"^blocks\.\d+\.attn_blocks\.(\d+)\."))
    if not blocks or not layers:
        shown = ", ".join(sorted(state)[:3]) or "none"
        raise TensorMismatchError(f"these are no TarFlow weights (no blocks.B.attn_blocks.L names; found {shown})")
    width, size = shape_of(state, "blocks.0.proj_in.weight", 2)
    tokens = shape_of(state, "blocks.0.pos_embed", 2)[0]
    channels, patch, side = _geometry(tokens, size)
    if image_size is not None and image_size != side:
        raise TensorMismatchError(f"image_size was stated as {image_size}; the shapes are those of {side} pixels")
    if width % HEAD_WIDTH:
        raise TensorMismatchError(f"the width {width} is no multiple of {HEAD_WIDTH}, the published width of a head")
    if noise_std is None:
        raise MissingFactError(
            "the file does not tell noise_std, the noise it was trained with on images in [-1, 1] (the last number of "
            "a published file's name, 0 for uniform noise); state it and send the file again"
        )
    classes = state.get("blocks.0.class_embed")
    manifest = Manifest(
        family="tarflow", image_size=side, channels=channels, n_bits=N_BITS if n_bits is None else n_bits,
        tensor_digest="",
        architecture={
            "patch_size": patch, "width": width, "n_block": blocks, "n_layer": layers, "head_width": HEAD_WIDTH,
            "noise_std": float(noise_std) / INPUT_SCALE, "n_classes": 0 if classes is None else len(classes),
        },
    )  # fmt: skip
    state.setdefault("var", torch.ones(tokens, size))
    return filled(manifest, {name: _with_log_scales(name, value, size) for name, value in state.items()})


def _geometry(tokens: int, size: int) -> tuple[int, int, int]:
    """Channels, patch and image side, in pixels, of square RGB or grey images: 3 p^2 is never a square itself."""
    rows = math.isqrt(tokens)
    for channels in (3, 1):
        patch = math.isqrt(size // channels)
        if rows and patch and channels * patch**2 == size and rows**2 == tokens:
            return channels, patch, rows * patch
    raise TensorMismatchError(f"{tokens} tokens of {size} values are no square image of 1 or 3 channels")


def _with_log_scales(name: str, value: Tensor, size: int) -> Tensor:
    """The output layer of a volume-preserving model gives shifts alone: log-scales of zero go before them."""
    if ".proj_out." in name and value.ndim and len(value) == size:
        return torch.cat([torch.zeros_like(value), value])
    return value
