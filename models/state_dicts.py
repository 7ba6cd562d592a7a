"""What the readers of foreign state dicts share: counting by names, shapes asked for, and the final checks."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.checkpoints import Manifest, build, check_shapes, later_state
from models.errors import NonFiniteError, TensorMismatchError

PREFIX = "module."
"""What a data-parallel wrapper puts before every name."""


def without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that the bare model gives them."""
    state = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    if len(state) != len(tensors):
        raise TensorMismatchError(f"some names stand both with and without {PREFIX!r}; save one state dict")
    return state


def count(state: Mapping[str, Tensor], pattern: re.Pattern[str]) -> int:
    """One more than the highest index that the pattern finds, capped so that a name cannot make us allocate."""
    found = [int(match.group(1)[:6]) for name in state if (match := pattern.match(name))]
    highest = max(found, default=-1) + 1
    if highest > len(state):
        raise TensorMismatchError(f"index {highest - 1} is named but only {len(state)} tensors are there")
    return highest


def shape_of(state: Mapping[str, Tensor], name: str, dimensions: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with so many dimensions."""
    if name not in state:
        raise TensorMismatchError(f"{name} is missing; save the whole state dict")
    shape = tuple(state[name].shape)
    if len(shape) != dimensions:
        raise TensorMismatchError(f"{name} has shape {list(shape)}; it needs {dimensions} dimensions")
    return shape


def filled(manifest: Manifest, state: Mapping[str, Tensor]) -> nn.Module:
    """The manifest's model with these tensors as its weights, in evaluation mode; floats take the model's dtype.

    Raises:
        TensorMismatchError: a tensor is missing, odd or of another shape.
        NonFiniteError: one holds NaN or infinity.
    """
    model = build(manifest)
    expected = {name: (value.dtype, tuple(value.shape)) for name, value in model.state_dict().items()}
    plain: dict[str, Tensor] = later_state(model)
    for name, value in state.items():
        if name in expected and value.is_floating_point():
            value = value.to(expected[name][0])
        plain[name] = value.detach().clone().contiguous()
    check_shapes({name: (value.dtype, tuple(value.shape)) for name, value in plain.items()}, expected)
    for name, value in plain.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{name} holds NaN or infinity; use an earlier checkpoint")
    model.load_state_dict(plain, assign=True)
    return model.requires_grad_(True).eval()
