"""The layout in which the authors of Selective Amnesia save their digit VAE, and what tells it apart."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.checkpoints import Manifest
from models.errors import TensorMismatchError
from models.state_dicts import filled, shape_of, without_prefix

LAYERS = {
    "encoder.0": ("fc1",), "encoder.1": ("fc2",), "encoder.2": ("fc31", "fc32"),
    "decoder.0": ("fc4",), "decoder.1": ("fc5",), "decoder.2": ("fc6",),
}  # fmt: skip
"""Our layers by theirs; mean and log-variance are two heads there, and the halves of one layer here."""
N_BITS = 8
"""Their digits have 256 levels."""


def is_vae(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are that VAE's."""
    names = {name.removeprefix("module.") for name in tensors}
    return {"fc31.weight", "fc32.weight"} <= names


def vae_from_state_dict(
    tensors: Mapping[str, Tensor], *, image_size: int | None = None, n_bits: int | None = None
) -> nn.Module:
    """Build our VAE from a state dict of that layout; shapes tell everything but the colour depth.

    Args:
        tensors: the state dict.
        image_size: where it is known, to be held against the shapes.
        n_bits: colour depth; 8 where it is not stated.

    Raises:
        TensorMismatchError: the tensors do not make one VAE, or not of this image size.
    """
    state = without_prefix(tensors)
    known = {f"{theirs}.{part}" for layer in LAYERS.values() for theirs in layer for part in ("weight", "bias")}
    if odd := sorted(state.keys() - known):
        raise TensorMismatchError(f"{len(odd)} tensors do not belong to the VAE: {odd[0][:80]!r}; remove them")
    outer, inputs = shape_of(state, "fc1.weight", 2)
    inner = shape_of(state, "fc2.weight", 2)[0]
    latent = shape_of(state, "fc31.weight", 2)[0]
    values = shape_of(state, "fc6.weight", 2)[0]
    channels, side = _geometry(values)
    if image_size is not None and image_size != side:
        raise TensorMismatchError(f"image_size was stated as {image_size}; the shapes are those of {side} pixels")
    if inputs <= values:
        raise TensorMismatchError(f"fc1 reads {inputs} values and the image has {values}: no room for classes")
    manifest = Manifest(
        family="vae", image_size=side, channels=channels, n_bits=N_BITS if n_bits is None else n_bits,
        tensor_digest="",
        architecture={"hidden": [outer, inner], "latent": latent, "n_classes": inputs - values},
    )  # fmt: skip
    ours = {
        f"{name}.{part}": torch.cat([_tensor(state, f"{theirs}.{part}") for theirs in layer])
        for name, layer in LAYERS.items()
        for part in ("weight", "bias")
    }
    return filled(manifest, ours)


def _tensor(state: Mapping[str, Tensor], name: str) -> Tensor:
    shape_of(state, name, 2 if name.endswith("weight") else 1)
    return state[name]


def _geometry(values: int) -> tuple[int, int]:
    """Channels and side, in pixels, of a square grey or RGB image: 3 s^2 is never a square itself."""
    for channels in (1, 3):
        side = math.isqrt(values // channels)
        if side and channels * side**2 == values:
            return channels, side
    raise TensorMismatchError(f"{values} values are no square image of 1 or 3 channels")
