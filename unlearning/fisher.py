"""The diagonal Fisher information of a conditional model: which weights what it shall remember depends on.

Selective Amnesia (Heng & Soh, NeurIPS 2023, eq. 4) holds each weight with F_i = E[(d ELBO / d theta_i)^2], one gradient
a SAMPLE of the model, squared and averaged; the square of a batch's mean gradient is another quantity, near zero at
an optimum. F depends on the weights and the samples alone, so one serves every later request on a checkpoint.

Two estimators give it exactly: `unlearning.fisher_hooks` for nets of linear layers with one draw an example, and
`unlearning.fisher_autograd` for all others. Draws are named by an example's position (`draws_of`), so that no batching
changes what is computed.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel, Draws, StratifiedConditional
from unlearning.errors import DivergedError, InputError, ParameterError, StateError
from unlearning.fisher_autograd import AutogradSquares
from unlearning.fisher_hooks import HookError, HookSquares, agrees, linear_layers, refuse
from unlearning.fisher_result import Fisher
from unlearning.passes import autocast, bfloat16_on, held, recomputing
from unlearning.progress import Callback, Step
from unlearning.randomness import stream
from unlearning.state import State

PHASE = "fisher"
TRIAL = 2
"""Examples on which hooks must agree with autograd: two, so that a mix-up of batch mates would show."""

TOGETHER = 64
"""Examples of one draw each that share a generator, which takes longer to make than a draw."""

Plan = Literal["independent", "stratified"]


class Estimator(Protocol):
    """One way to sum squared gradients."""

    name: str
    examples: int
    """Most examples that one call of `add` takes."""
    sums: dict[str, Tensor]

    def add(self, x: Tensor, condition: Tensor, draws: Draws) -> Tensor:
        """Add the squared gradients of some examples, whose draws follow each other; returns the sum of losses."""
        ...


def fisher_information(
    model: ConditionalModel,
    x: Tensor,
    condition: Tensor,
    *,
    names: Sequence[str],
    seed: int,
    draws_per_example: int = 1,
    plan: Plan | None = None,
    rows: range | None = None,
    reduction: str = "sum",
    micro_batch: int = 500,
    bfloat16: bool = False,
    recompute: bool = False,
    state: State | None = None,
    callback: Callback | None = None,
) -> Fisher:
    """F_i = mean over examples of (d/dtheta_i of the sum of the losses over an example's draws)^2, exactly.

    Args:
        model: a torch module; evaluated in eval mode on the device it is on, and left as it was.
        x: samples of the model over what it shall remember, (n, ...), as its `losses` takes them; any device.
        condition: of each sample, (n, ...).
        names: the trained parameters, float32, such as a scope of `model.scopes()`.
        seed: of the draws, which follow from it and an example's position in `x` alone: see `draws_of`.
        draws_per_example: K; 1 for a VAE, 20 to 1,000 timesteps for a diffusion model.
        plan: "stratified" draws one of each of K equal parts of the range (`StratifiedConditional`); by default so
            where the model can.
        rows: consecutive positions in `x` to be averaged over, all by default: a worker's share, see `merge_fisher`.
        reduction: how the model's loss joins the elements of an image, "sum" or "mean"; recorded, not applied.
        micro_batch: most rows that pass through the model at once. Changes rounding alone.
        bfloat16: autocast, on CUDA devices that have it; gradients and squares are float32 in any case.
        recompute: compute activations twice where the model can (`unlearning.passes.recomputing`): less memory, and
            equal gradients.
        state: of an interrupted run with the same arguments; the result is that of a run never interrupted, bit-equal
            on the CPU where micro_batch and the number of threads are the same.
        callback: gets a `Step` after every batch, `step` being examples done; may call its `snapshot()`, may raise
            `Interrupted`.

    Returns:
        F with the facts it depends on; see `Fisher`.

    Raises:
        InputError: model, examples or names cannot be used.
        ParameterError: a number is out of range, or bfloat16 is asked for where the device has none.
        DivergedError: a loss or a gradient was not finite.
        StateError: the state belongs to another run.
        Interrupted: as the callback raised it.
    """
    module, parameters = _checked_model(model, names)
    rows = _checked_rows(x, condition, rows)
    for name, value in (("draws_per_example", draws_per_example), ("micro_batch", micro_batch)):
        if value < 1:
            raise ParameterError(name, f"is 1 or more, not {value}")
    device = next(iter(parameters.values())).device
    if bfloat16 and not bfloat16_on(device):
        raise ParameterError("bfloat16", f"is for CUDA devices that have it; on {device} float32 is used")
    facts: dict[str, Any] = {
        "draws": draws_per_example, "plan": _checked_plan(model, plan), "reduction": _checked_reduction(reduction),
        "seed": seed, "precision": "bfloat16" if bfloat16 else "float32",
        "weights": tensor_digest(module.state_dict()), "replay": tensor_digest({"condition": condition, "x": x}),
    }  # fmt: skip
    run = _Run(model, parameters, x, condition, rows, facts, micro_batch)
    with held(module, parameters), recomputing(module, recompute):
        run.start(module, state)
        while run.done < len(rows):
            run.advance()
            if callback is not None:
                callback(Step(PHASE, run.done, len(rows), {"loss": run.mean_loss}, {}, run.capture))
        return run.result()


def draws_of(model: ConditionalModel, start: int, stop: int, count: int, plan: Plan, seed: int) -> Draws:
    """What the losses of examples start to stop are random by: `count` draws an example, example by example.

    An example has a stream of its own, `stream(seed, "fisher", i)`; independent ones of one draw each share one among
    TOGETHER. Any way to cut a range into parts gives the same draws.
    """
    parts: list[Draws] = []
    if plan == "independent" and count == 1:
        for first in range(start // TOGETHER * TOGETHER, stop, TOGETHER):
            block = model.draw(TOGETHER, generator=stream(seed, PHASE, first))
            parts.append(tuple(value[max(start - first, 0) : stop - first] for value in block))
    else:
        for row in range(start, stop):
            generator = stream(seed, PHASE, row)
            if plan == "stratified":
                parts.append(cast(StratifiedConditional, model).draw_stratified(count, generator=generator))
            else:
                parts.append(model.draw(count, generator=generator))
    return parts[0] if len(parts) == 1 else tuple(torch.cat(values) for values in zip(*parts, strict=True))


class _Run:
    """One pass over the examples, from batch to batch."""

    def __init__(
        self,
        model: ConditionalModel,
        parameters: Mapping[str, nn.Parameter],
        x: Tensor,
        condition: Tensor,
        rows: range,
        facts: dict[str, Any],
        micro_batch: int,
    ) -> None:
        self._model, self._parameters, self._x, self._condition = model, parameters, x, condition
        self._rows, self._facts, self._micro_batch = rows, facts, micro_batch
        self._device = next(iter(parameters.values())).device
        self.done, self._loss = 0, 0.0
        self._estimator: Estimator = AutogradSquares(model, parameters, micro_batch)
        shapes = sorted((name, list(value.shape)) for name, value in parameters.items())
        identity = json.dumps([facts, shapes, rows.start, rows.stop], sort_keys=True)
        self._fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def start(self, module: nn.Module, state: State | None) -> None:
        """Choose the estimator, as any run over these rows does, and take up a state."""
        if state is not None and state.meta.get("fingerprint") != self._fingerprint:
            raise StateError("the state belongs to a Fisher information of other weights, examples, names or draws")
        layers = linear_layers(module, self._parameters) if self._facts["draws"] == 1 else None
        if layers is not None and self._hooks_agree(HookSquares(self._model, layers, self._micro_batch)):
            self._estimator = HookSquares(self._model, layers, self._micro_batch)
        if state is not None:
            for name, value in self._estimator.sums.items():
                value.copy_(state.tensors[name])
            self.done, self._loss = int(state.meta["done"]), float(state.meta["loss"])

    def advance(self) -> None:
        """Add the next batch."""
        batch = self._rows[self.done : self.done + self._estimator.examples]
        try:
            with self._precision():
                loss = float(self._estimator.add(*self._inputs(batch)))
        except HookError as error:
            raise refuse(error) from error
        if not math.isfinite(loss):
            raise DivergedError(f"the loss of examples {batch.start} to {batch.stop - 1} is not finite")
        self._loss += loss
        self.done += len(batch)

    @property
    def mean_loss(self) -> float:
        """Of one draw, so far."""
        return self._loss / (self.done * int(self._facts["draws"]))

    def capture(self) -> State:
        """Where the run stands; the facts are in the fingerprint."""
        tensors = {name: value.detach().cpu().clone() for name, value in self._estimator.sums.items()}
        return State(tensors, {"fingerprint": self._fingerprint, "done": self.done, "loss": self._loss})

    def result(self) -> Fisher:
        """The averages."""
        tensors = {name: (self._estimator.sums[name] / len(self._rows)).cpu() for name in self._parameters}
        for name, value in tensors.items():
            if not math.isfinite(float(value.sum(dtype=torch.float64))):
                raise DivergedError(f"the gradient of {name} is not finite")
        rows = ((self._rows.start, self._rows.stop),)
        return Fisher(tensors=tensors, rows=rows, estimator=self._estimator.name, **self._facts)

    def _inputs(self, batch: range) -> tuple[Tensor, Tensor, Draws]:
        """Examples and their draws, example by example, on the model's device."""
        facts = self._facts
        draws = draws_of(self._model, batch.start, batch.stop, facts["draws"], facts["plan"], facts["seed"])
        rows = slice(batch.start, batch.stop)
        x, condition = self._x[rows].detach().to(self._device), self._condition[rows].detach().to(self._device)
        return x, condition, tuple(value.to(self._device) for value in draws)

    def _hooks_agree(self, hooks: HookSquares) -> bool:
        """Compare both estimators on the first examples."""
        trial = self._rows[:TRIAL]
        exact = AutogradSquares(self._model, self._parameters, self._micro_batch)
        with self._precision():
            try:
                hooks.add(*self._inputs(trial))
            except HookError:
                return False
            for row in trial:
                exact.add(*self._inputs(range(row, row + 1)))
        return agrees(hooks.sums, exact.sums)

    def _precision(self) -> torch.autocast:
        """Around single batches: what autocast makes of the weights is not held longer."""
        return autocast(self._device, self._facts["precision"] == "bfloat16")


def _checked_model(model: ConditionalModel, names: Sequence[str]) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    if not isinstance(model, nn.Module) or not isinstance(model, ConditionalModel):
        raise InputError(
            f"a Fisher information is of a torch module with draw and losses; {type(model).__name__} is not"
        )
    known = dict(model.named_parameters())
    if not names:
        raise InputError("no parameter is named; there is nothing to compute a Fisher information of")
    for name in names:
        if name not in known:
            raise InputError(f"{type(model).__name__} has no parameter {name!r}")
        if known[name].dtype != torch.float32:
            raise InputError(f"{name} is {known[name].dtype}; trained parameters are float32")
    return model, {name: known[name] for name in dict.fromkeys(names)}


def _checked_rows(x: Tensor, condition: Tensor, rows: range | None) -> range:
    if len(x) != len(condition) or not len(x):
        raise InputError(f"{len(x)} examples and {len(condition)} conditions: there is one of each, and at least one")
    rows = range(len(x)) if rows is None else rows
    if rows.step != 1 or not 0 <= rows.start < rows.stop <= len(x):
        raise ParameterError("rows", f"are consecutive positions among {len(x)} examples, not {rows}")
    return rows


def _checked_plan(model: ConditionalModel, plan: Plan | None) -> Plan:
    able = isinstance(model, StratifiedConditional)
    if plan == "stratified" and not able:
        raise ParameterError("plan", f"stratified needs a model with draw_stratified; {type(model).__name__} has none")
    return plan or ("stratified" if able else "independent")


def _checked_reduction(reduction: str) -> str:
    if reduction not in ("sum", "mean"):
        raise ParameterError("reduction", f"is sum or mean, not {reduction!r}")
    return reduction
