"""How a model is passed through for gradients: which weights get one, in which precision, and what is kept of it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["autocast", "bfloat16_on", "held", "recomputable", "recomputing"]

SWITCH = "gradient_checkpointing"
"""The attribute by which the blocks of diffusers recompute what is in them."""


def bfloat16_on(device: torch.device) -> bool:
    """Whether passes on this device run in bfloat16: on CUDA from compute capability 8.0; below, it is emulated."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, enabled: bool = True) -> torch.autocast:
    """bfloat16 for products and convolutions, where the device has it; weights, losses and gradients stay float32.

    Nothing is scaled, as float16 would ask for: bfloat16 has the range of float32.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled and bfloat16_on(device))


@contextmanager
def held(module: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Eval mode, gradients for the named parameters alone; afterwards everything is as it was."""
    modes = [(one, one.training) for one in module.modules()]
    before = [(value, value.requires_grad, value.grad) for value in module.parameters()]
    module.eval()
    for value, _, _ in before:
        value.grad = None
        value.requires_grad_(False)
    for value in parameters.values():
        value.requires_grad_(True)
    try:
        with torch.enable_grad():
            yield
    finally:
        for one, training in modes:
            one.training = training
        for value, requires, gradient in before:
            value.requires_grad_(requires)
            value.grad = gradient


def recomputable(module: nn.Module) -> bool:
    """Whether `recomputing` changes anything for this model."""
    return bool(_switchable(module))


@contextmanager
def recomputing(module: nn.Module, wanted: bool = True) -> Iterator[None]:
    """Gradient checkpointing: keep the inputs of blocks alone, and compute what is in them anew on the way back.

    Less memory for about a third more time, and equal gradients. For models of diffusers, and those around one; without
    effect on others. Afterwards each block is as it was.
    """
    before = [(one, getattr(one, SWITCH)) for one in module.modules() if hasattr(one, SWITCH)] if wanted else []
    try:
        for one in _switchable(module) if wanted else []:
            one.enable_gradient_checkpointing()
        yield
    finally:
        for one, value in before:
            setattr(one, SWITCH, value)


def _switchable(module: nn.Module) -> list[Any]:
    """The outermost modules that offer it, so that a model decides for its parts."""
    if callable(getattr(module, "enable_gradient_checkpointing", None)):
        return [module]
    return [one for child in module.children() for one in _switchable(child)]
