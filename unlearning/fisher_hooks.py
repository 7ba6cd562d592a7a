"""Squared gradients of many examples at once, for nets of linear layers, without the gradient of a single one.

Of y = W a + b the gradient of one example is the outer product of g = dloss/dy and its input a, so that the sum of its
squares over a batch is one matrix product, F_W = (g^2)^T (a^2), and F_b = sum g^2. That holds where each layer is
applied once a pass to one row an example; `linear_layers` tells by the layers, `agrees` by the numbers.
"""

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from models.conditional import ConditionalModel, Draws
from unlearning.errors import InputError
from unlearning.fisher_autograd import checked

CLOSE = 1e-3
"""Largest difference to autograd, over a tensor's largest entry, at which a layer is what its hooks take it for."""
NOTHING = 1e-10
"""Over the largest entry of all tensors: squares of rounding errors, as of a gradient that is zero by symmetry."""


class Layer(NamedTuple):
    """A linear layer with the names of those of its parameters that are trained."""

    module: nn.Linear
    weight: str | None
    bias: str | None


class _Call(NamedTuple):
    layer: Layer
    rows: Tensor
    edge: GradientEdge


class HookError(Exception):
    """A layer was applied in a way that the hooks cannot square."""


def linear_layers(model: nn.Module, names: Mapping[str, nn.Parameter]) -> list[Layer] | None:
    """The layers that hold all of these parameters, where all are unshared weights and biases of `nn.Linear` itself."""
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    layers, found = [], set[str]()
    for path, module in model.named_modules():
        own = {key: f"{path}.{key}" if path else key for key, _ in module.named_parameters(recurse=False)}
        trained = {key: name for key, name in own.items() if name in names}
        if not trained:
            continue
        if type(module) is not nn.Linear or any(uses[id(names[name])] > 1 for name in trained.values()):
            return None
        layers.append(Layer(module, trained.get("weight"), trained.get("bias")))
        found |= set(trained.values())
    return layers if found == set(names) else None


class HookSquares:
    """Sums of squared gradients, one draw an example and many examples in one pass."""

    name = "hooks"

    def __init__(self, model: ConditionalModel, layers: list[Layer], micro_batch: int) -> None:
        """`layers` are those of `linear_layers`, their trained parameters requiring gradients."""
        self._model, self._layers, self.examples = model, layers, micro_batch
        self.sums: dict[str, Tensor] = {}
        for module, weight, bias in layers:
            if weight is not None:
                self.sums[weight] = torch.zeros_like(module.weight, requires_grad=False)
            if bias is not None:
                self.sums[bias] = torch.zeros_like(module.bias, requires_grad=False)

    def add(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Add the squared gradients of n examples, all on the model's device; returns the sum of their losses.

        Raises:
            HookError: a layer was applied more than once, or not to one row an example.
        """
        calls: list[_Call] = []
        handles = [
            layer.module.register_forward_hook(partial(self._called, calls, layer, len(x))) for layer in self._layers
        ]
        try:
            loss = checked(self._model.losses(x, condition, draws), len(x)).sum()
        finally:
            for handle in handles:
                handle.remove()
        if not calls:
            raise HookError("no layer was called")
        # With respect to the layers' outputs alone: the weights' own gradients, a third of the work, are not taken.
        slopes = torch.autograd.grad(loss, [call.edge for call in calls], allow_unused=True)
        for call, slope in zip(calls, slopes, strict=True):
            if slope is not None:
                self._square(call.layer, call.rows, slope.float())
        return loss.detach()

    def _called(
        self, calls: list[_Call], layer: Layer, rows: int, _: nn.Module, inputs: tuple[Any, ...], output: Tensor
    ) -> None:
        value = inputs[0] if inputs else None
        if not isinstance(value, Tensor) or value.ndim != 2 or len(value) != rows:
            raise HookError("a layer was not given one row an example")
        if any(call.layer is layer for call in calls):
            raise HookError("a layer was applied more than once")
        # The edge, not the output: what is done to that in place afterwards does not move it.
        calls.append(_Call(layer, value.detach(), get_gradient_edge(output)))

    def _square(self, layer: Layer, rows: Tensor, slope: Tensor) -> None:
        squares = slope.square()  # not in place: layers whose outputs are added up share one tensor of slopes
        if layer.weight is not None:
            self.sums[layer.weight].addmm_(squares.T, rows.float().square())
        if layer.bias is not None:
            self.sums[layer.bias].add_(squares.sum(0))


def agrees(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    """Whether sums of a few examples are those of autograd: weights used outside of their layer show here."""
    nothing = NOTHING * max((float(value.max()) for value in expected.values()), default=0.0)
    return all(
        float((found[name] - value).abs().max()) <= CLOSE * float(value.max()) + nothing
        for name, value in expected.items()
    )


def refuse(error: HookError) -> InputError:
    """What to say where a model passes the trial and then acts otherwise."""
    return InputError(f"{error}, unlike with the first examples: the model's layers must not depend on its input")
