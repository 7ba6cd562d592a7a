"""Weights and an optimiser's moments under stable names, for the state of a run."""

import torch
from torch import Tensor, nn


def pack(parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and Adam's moments under stable names."""
    packed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        packed[f"weight.{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            packed[f"adam.{key}.{name}"] = value
    return packed


@torch.no_grad()
def unpack(tensors: dict[str, Tensor], parameters: dict[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
    """The reverse of `pack`."""
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        moments = {key: tensors.get(f"adam.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
        found = {key: value.clone() for key, value in moments.items() if value is not None}
        if found:
            optimiser.state[parameter] = {
                # The count on the weights' device, as a fused step asks; the moments in the weights' layout.
                key: value.to(parameter.device) if key == "step" else torch.empty_like(parameter).copy_(value)
                for key, value in found.items()
            }
