"""Squared gradients of one example at a time by ordinary autograd: right for every model, fast where draws are many.

The gradient of a sum over draws is the sum of their gradients, so one example beside all of its draws is a batch like
any other, and the square is taken after it. Nothing is asked of the layers.

Left: hooks for convolutions, norms and sequences, with several examples in a batch. On a U-Net of 1.7 M parameters a
row of a batch of 500 takes 0.9 of the time that one of 100 does, so from 100 draws an example on there is nothing to
win; at 20, a row takes 1.8 times as long, of which every example's own gradient would take its share.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from models.conditional import ConditionalModel, Draws
from unlearning.errors import InputError


class AutogradSquares:
    """Sums of squared gradients, an example at a time, its draws in micro-batches."""

    name = "autograd"
    examples = 1
    """How many examples one call of `add` takes."""

    def __init__(self, model: ConditionalModel, parameters: Mapping[str, nn.Parameter], micro_batch: int) -> None:
        """`parameters` are float32, require gradients and have none yet; `micro_batch` bounds draws in one pass."""
        self._model, self._parameters, self._micro_batch = model, parameters, micro_batch
        self.sums = {name: torch.zeros_like(value, requires_grad=False) for name, value in parameters.items()}

    def add(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Add (d/dtheta_i sum_k loss_k)^2 of one example, all on the model's device.

        Args:
            x: (1, ...).
            condition: (1, ...).
            draws: of k rows.

        Returns:
            The sum of its losses, a scalar.
        """
        total = torch.zeros((), device=x.device)
        for part in zip(*(torch.split(value, self._micro_batch) for value in draws), strict=True):
            rows = len(part[0])
            example = _laid_out(x.expand(rows, *x.shape[1:]))
            label = condition.expand(rows, *condition.shape[1:])
            losses = self._model.losses(example, label, tuple(_laid_out(value) for value in part))
            loss = checked(losses, rows).sum()
            loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it without types
            total += loss.detach()
        for name, parameter in self._parameters.items():
            if parameter.grad is not None:
                self.sums[name].addcmul_(parameter.grad, parameter.grad)
                parameter.grad = None
        return total


def _laid_out(value: Tensor) -> Tensor:
    """Images channels last, which convolutions are faster on; values do not change."""
    return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value


def checked(losses: Tensor, rows: int) -> Tensor:
    """The losses of so many rows, if they are such: float32 with a gradient.

    Raises:
        InputError: they are not.
    """
    if losses.shape != (rows,) or not losses.is_floating_point():
        raise InputError(f"losses of {rows} rows are ({rows},) float32, not {tuple(losses.shape)} {losses.dtype}")
    if not losses.requires_grad:
        raise InputError("the losses do not depend on the named parameters; is their gradient switched off inside?")
    return losses.float()
