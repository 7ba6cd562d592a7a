"""The copy of a model that a run changes: what is trained is copied, what is frozen is not held twice."""

import copy
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

__all__ = ["working_copy"]


def working_copy(model: nn.Module, trained: Collection[str], device: torch.device) -> nn.Module:
    """A model of its own on a device, in eval mode, only the named parameters requiring gradients.

    Parameters that are not trained share their memory with the model's where both are on one device: whoever writes
    into them changes both. The copy can be moved, saved and used without the model.

    Args:
        model: not changed.
        trained: names of its parameters.
        device: of the copy.
    """
    own = {id(value) for name, value in model.named_parameters() if name in trained}
    memo: dict[int, Any] = {}
    for value in model.parameters():
        mine = id(value) in own
        memo[id(value)] = nn.Parameter(value.detach().to(device, copy=mine), requires_grad=mine)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to(device, copy=True)
    found: nn.Module = copy.deepcopy(model, memo)
    return found.eval()
