"""Adam in two sizes, and the weights and moments of an optimiser under stable names, for the state of a run."""

import importlib
import importlib.util
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from unlearning.errors import ParameterError

Optimiser = Literal["adam", "adam-8bit"]

MOMENT_BYTES: Mapping[str, float] = {"adam": 8.0, "adam-8bit": 2 + 8 / 256}
"""Of both moments of a weight: float32, or a byte each with a float32 scale for every 256."""


def check_optimiser(name: str, device: torch.device) -> None:
    """Refuse an optimiser that does not run here.

    Raises:
        ParameterError: 8-bit moments are asked for without bitsandbytes, or on a device that it does not serve.
    """
    if name != "adam-8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ParameterError("optimiser", 'adam-8bit needs bitsandbytes; install "forgetd[gpu]", or use adam')
    if device.type not in ("cuda", "cpu"):
        raise ParameterError("optimiser", f"adam-8bit runs on CUDA and on the CPU, not on {device.type}; use adam")


def adam(parameters: Iterable[nn.Parameter], *, learning_rate: float, name: str = "adam") -> torch.optim.Optimizer:
    """Adam with float32 moments, or with moments of a byte each (Dettmers et al., "8-bit Optimizers via Block-wise
    Quantization", 2022). The weights are float32 with either.

    Raises:
        ParameterError: see `check_optimiser`.
    """
    trained = list(parameters)
    check_optimiser(name, trained[0].device)
    if name == "adam":
        return torch.optim.Adam(trained, lr=learning_rate, fused=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its imports use parts of torch that are on their way out
        library: Any = importlib.import_module("bitsandbytes")
    return cast(torch.optim.Optimizer, library.optim.Adam8bit(trained, lr=learning_rate))


def pack(parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Weights and whatever the optimiser keeps of each under stable names; whole numbers as int64."""
    packed: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        packed[f"weight.{name}"] = parameter.detach()
        for key, value in optimiser.state.get(parameter, {}).items():
            packed[f"adam.{key}.{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return packed


@torch.no_grad()
def unpack(
    tensors: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """The reverse of `pack`."""
    kept: dict[str, dict[str, Tensor]] = {}
    for label, value in tensors.items():
        if label.startswith("adam."):
            _, key, name = label.split(".", 2)
            kept.setdefault(name, {})[key] = value
    for name, parameter in parameters.items():
        parameter.copy_(tensors[f"weight.{name}"])
        if name in kept:
            optimiser.state[parameter] = {key: _restored(value, parameter) for key, value in kept[name].items()}


def _restored(value: Tensor, parameter: nn.Parameter) -> Tensor | int:
    """Moments in the weights' layout; a count as a whole number, or on the weights' device as a fused step asks."""
    if value.dtype == torch.int64 and not value.ndim:
        return int(value)
    if value.shape == parameter.shape:
        return torch.empty_like(parameter, dtype=value.dtype, requires_grad=False).copy_(value)
    return value.to(parameter.device, copy=True)
