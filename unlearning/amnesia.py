"""Selective Amnesia: a condition comes to show something else, and what other conditions show stays as it was.

Heng and Soh, "Selective Amnesia", NeurIPS 2023, eq. 4: the ELBO of a surrogate under the forgotten conditions, the ELBO
of replayed samples under the others, and elastic weight consolidation, which holds each weight by its Fisher
information. No training data is needed.

What the default mode changes: the penalty is the Fisher-weighted drift relative to the weights, in units of the replay
loss at the start, so that its strength means the same whatever the model, its loss and the timesteps that the Fisher
information was taken over; and the run ends once the criterion holds on fresh samples.
"""

import copy
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel, GuidedConditional, StratifiedConditional
from unlearning.amnesia_parameters import AmnesiaParameters
from unlearning.errors import DivergedError, FisherError, InputError, StateError
from unlearning.fisher_result import Fisher, check_weights, normalise_fisher
from unlearning.optimiser import pack, unpack
from unlearning.progress import Callback, Step
from unlearning.randomness import stream
from unlearning.state import State
from unlearning.surrogates import Examples, Surrogate

PHASE = "unlearning"
VERSION = 2
"""Of the states: raised whenever the steps or what they read change."""
MOST_ROLLBACKS = 5
"""Times that a run goes back to its last good weights and halves its learning rate, before it is given up."""
REFERENCE_ROWS = 512
"""Most replay examples that the loss at the start is taken over."""


@dataclass(frozen=True)
class Check:
    """What a criterion found on samples of a model."""

    met: bool
    metrics: Mapping[str, float] = field(default_factory=dict)


Criterion = Callable[[ConditionalModel, int], Check]
"""Draws samples of a model with a seed, and judges them; equal seeds give equal samples."""


@dataclass(frozen=True)
class AmnesiaResult:
    """A model that forgot, and how it came about."""

    model: nn.Module
    """The changed copy."""
    met: bool
    """Whether the criterion held on the fresh samples of the final confirmation."""
    steps: int
    check: Check
    """That confirmation."""
    history: list[dict[str, float]]
    """Losses of each step with its number; where samples were judged after it, also the criterion's metrics."""
    rollbacks: int
    """How often a step was not finite and the run went back."""
    drift: float
    """Fisher-weighted drift relative to the weights: sum F (theta - theta*)^2 / sum F theta*^2, F between its floor and
    its ceiling."""
    seconds: float
    """Wall time, over all attempts of a resumed run."""
    parameters: AmnesiaParameters


def forget_conditions(
    model: ConditionalModel,
    conditions: Tensor,
    surrogate: Surrogate,
    replay: Examples,
    fisher: Fisher,
    parameters: AmnesiaParameters,
    *,
    criterion: Criterion,
    seed: int,
    state: State | None = None,
    callback: Callback | None = None,
    micro_batch: int = 256,
) -> AmnesiaResult:
    """Make a copy of a model show a surrogate under some conditions, until a criterion holds on fresh samples.

    Args:
        model: theta*, a module; it is not modified. Runs on the device that it is on.
        conditions: c_f, (k, ...): each step draws from them uniformly.
        surrogate: q(x | c_f).
        replay: samples of theta* under the conditions to remember.
        fisher: of the replay's conditions; the parameters that it names are trained.
        parameters: see `AmnesiaParameters`.
        criterion: what ends the run; it is asked with seeds that no step draws from.
        seed: of every draw; equal seeds give equal bits on the CPU with the same number of threads.
        state: of an interrupted run with the same arguments, to the bit; the result is that of a run never interrupted,
            unless a later step is not finite: it leads back to the last look since, or to where the run was resumed.
        callback: gets a `Step` at every boundary; may call its `snapshot()` and may raise `Interrupted`.
        micro_batch: most examples that pass through the model at once; bounds the memory.

    Returns:
        The changed copy; `met` is False where max_steps did not suffice.

    Raises:
        InputError: the model's loss of the replay is not finite.
        FisherError: the Fisher information is of another model or none of its parameters, or zero everywhere.
        DivergedError: steps were not finite, again and again.
        StateError: the state belongs to another run.
        Interrupted: as the callback raised it.
    """
    start = time.monotonic()
    values = parameters.resolved()
    fingerprint = _fingerprint(model, conditions, surrogate, replay, fisher, values, seed)
    if state is not None and state.meta.get("fingerprint") != fingerprint:
        raise StateError("the state belongs to a run with another model, request, Fisher information or seed")
    run = _Run(model, conditions, surrogate, replay, fisher, values, seed, micro_batch)
    step, attempts, before = 0, 0, 0.0
    history: list[dict[str, float]] = []
    promising = False
    if state is not None:
        run.restore(state.tensors, state.meta)
        step, attempts, promising = int(state.meta["step"]), int(state.meta["attempts"]), bool(state.meta["promising"])
        history, before = list(state.meta["history"]), float(state.meta["seconds"])
    while True:
        if promising or step >= cast(int, values.max_steps):
            check = criterion(cast(ConditionalModel, run.model), _seed(seed, "confirm", attempts))
            attempts += 1
            if check.met or step >= cast(int, values.max_steps):
                break
        losses = run.step(step)
        step += 1
        metrics: dict[str, float] = {}
        promising = False
        if step % values.check_every == 0:
            found = criterion(cast(ConditionalModel, run.model), _seed(seed, "check", step))
            metrics, promising = dict(found.metrics), found.met
            run.keep_next()
        history.append({"step": float(step), **losses, **metrics})
        if callback is not None:
            meta = {"fingerprint": fingerprint, "step": step, "attempts": attempts, "promising": promising}

            def capture(meta: dict[str, Any] = meta) -> State:
                seconds = before + time.monotonic() - start
                tensors = {name: value.detach().cpu().clone() for name, value in run.tensors().items()}
                return State(tensors, {**meta, **run.facts(), "history": list(history), "seconds": seconds})

            callback(Step(PHASE, step, cast(int, values.max_steps), losses, metrics, capture))
    return AmnesiaResult(
        model=run.model, met=check.met, steps=step, check=check, history=history, rollbacks=run.rollbacks,
        drift=run.drift(), seconds=before + time.monotonic() - start, parameters=values,
    )  # fmt: skip


class _Run:
    """The copy, its optimiser and the penalty; `forget_conditions` owns the loop and the state."""

    def __init__(
        self,
        model: ConditionalModel,
        conditions: Tensor,
        surrogate: Surrogate,
        replay: Examples,
        fisher: Fisher,
        values: AmnesiaParameters,
        seed: int,
        micro_batch: int,
    ) -> None:
        check_weights(fisher.weights, tensor_digest(cast(nn.Module, model).state_dict()))
        module = copy.deepcopy(cast(nn.Module, model)).eval().requires_grad_(False)
        own = dict(module.named_parameters())
        odd = sorted(name for name in fisher.tensors if name not in own)
        if odd or not fisher.tensors:
            raise FisherError(f"the Fisher information is of other parameters: {', '.join(odd[:3]) or 'of none'}")
        self.model = module
        self._conditions, self._surrogate, self._replay = conditions, surrogate, replay
        self._values, self._seed, self._micro_batch = values, seed, micro_batch
        self._parameters = {name: own[name] for name in fisher.tensors}
        for parameter in self._parameters.values():
            parameter.requires_grad_(True)
        self._device = next(iter(self._parameters.values())).device
        self._start = [parameter.detach().clone() for parameter in self._parameters.values()]
        self._fisher = fisher
        if values.mode == "default":
            self._scale, self._information = self._loss_at_start(), self._relative_to_start()
        else:
            self._scale, self._information = 1.0, self._in_order(fisher.tensors)
        self._strength = cast(float, values.strength) * (
            1.0 if values.mode == "default" else _of_all_terms(model, fisher)
        )
        self._optimiser = torch.optim.Adam(self._parameters.values(), lr=cast(float, values.learning_rate), fused=True)
        self.rollbacks = 0
        self._keep()

    def step(self, step: int) -> dict[str, float]:
        """One Adam step on eq. 4; one that is not finite goes back to the last good weights, at half the rate."""
        values, generator = self._values, stream(self._seed, "step", step)
        self._optimiser.zero_grad(set_to_none=True)
        losses = {}
        rows = torch.randint(len(self._conditions), (values.batch,), generator=generator)
        x = self._surrogate(values.batch, generator)
        losses["surrogate"] = self._backward(x, self._conditions[rows], 1.0, generator)
        if "replay" not in values.without and values.replay_weight:
            x, condition = self._replay.drawn(values.replay_batch, generator)
            condition = self._some_dropped(condition, generator)
            losses["replay"] = self._backward(x, condition, values.replay_weight, generator)
        losses["penalty"] = self._pull_back()
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), cast(float, values.clip))
        if not bool(torch.isfinite(norm)) or not all(map(_is_finite, losses.values())):
            self._roll_back(step)
            return {}
        if self._keeps_next:
            self._keep()  # only now it is known that these weights give finite losses
        for group in self._optimiser.param_groups:
            group["lr"] = cast(float, values.learning_rate) * 0.5**self.rollbacks
        self._optimiser.step()
        return losses

    def keep_next(self) -> None:
        """A step that is not finite shall lead back to these weights, once a step has shown that they are good."""
        self._keeps_next = True

    def drift(self) -> float:
        """See `AmnesiaResult.drift`."""
        relative = self._information if self._values.mode == "default" else self._relative_to_start()
        moved = torch._foreach_sub(list(self._parameters.values()), self._start)
        parts = [(weight * gap.detach().square()).sum() for weight, gap in zip(relative, moved, strict=True)]
        return float(torch.stack(parts).sum())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's moments."""
        return pack(self._parameters, self._optimiser)

    def facts(self) -> dict[str, Any]:
        """What else a step depends on."""
        return {"rollbacks": self.rollbacks}

    def restore(self, tensors: dict[str, Tensor], meta: Mapping[str, Any]) -> None:
        """The reverse of `tensors` and `facts`."""
        unpack(tensors, self._parameters, self._optimiser)
        self.rollbacks = int(meta["rollbacks"])
        self._keep()

    def _keep(self) -> None:
        self._good = {name: value.detach().clone() for name, value in pack(self._parameters, self._optimiser).items()}
        self._keeps_next = False

    def _backward(self, x: Tensor, condition: Tensor, weight: float, generator: torch.Generator) -> float:
        """Accumulate the gradient of a term's mean loss; returns the mean, in the loss's own units."""
        draws = cast(ConditionalModel, self.model).draw(len(x), generator=generator)
        share = weight / self._scale / (len(x) if self._values.reduction == "mean" else 1)
        total = 0.0
        for rows in torch.split(torch.arange(len(x)), self._micro_batch):
            part = self._losses(x[rows], condition[rows], tuple(draw[rows] for draw in draws)).sum()
            torch.autograd.backward(part * share)
            total += float(part.detach())
        return total / len(x)

    def _losses(self, x: Tensor, condition: Tensor, draws: tuple[Tensor, ...]) -> Tensor:
        model, device = cast(ConditionalModel, self.model), self._device
        with torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else nullcontext():
            found = model.losses(x.to(device), condition.to(device), tuple(draw.to(device) for draw in draws))
        return found.float()

    @torch.no_grad()
    def _pull_back(self) -> float:
        """Add the penalty's gradient in place, without a graph; returns the penalty."""
        if "penalty" in self._values.without or not self._strength:
            return 0.0
        total = torch.zeros((), device=self._device)
        for parameter, start, information in zip(
            self._parameters.values(), self._start, self._information, strict=True
        ):
            gap = parameter - start
            pull = information * gap  # one parameter at a time: all at once would hold the weights twice more
            total += (pull * gap).sum()
            cast(Tensor, parameter.grad).add_(pull, alpha=self._strength)
        return float(0.5 * self._strength * total)

    def _roll_back(self, step: int) -> None:
        if self.rollbacks == MOST_ROLLBACKS:
            raise DivergedError(
                f"steps up to {step} were not finite, {MOST_ROLLBACKS + 1} times, at a learning rate that was halved "
                "each time; lower the learning rate"
            )
        self.rollbacks += 1
        self._keeps_next = False
        self._optimiser.state.clear()  # the moments too; at the start there are none to go back to
        unpack(self._good, self._parameters, self._optimiser)

    def _in_order(self, tensors: Mapping[str, Tensor]) -> list[Tensor]:
        return [tensors[name].to(self._device, torch.float32) for name in self._parameters]

    def _some_dropped(self, condition: Tensor, generator: torch.Generator) -> Tensor:
        """Without their condition, a share of them: what the model makes without one is replayed too."""
        share = cast(float, self._values.null_share)
        if not share or not isinstance(self.model, GuidedConditional):
            return condition
        dropped = torch.rand(len(condition), generator=generator) < share
        condition = condition.clone()
        condition[dropped] = self.model.null_condition.to(condition)
        return condition

    def _relative_to_start(self) -> list[Tensor]:
        """Weights of the relative drift: F between floor and ceiling, divided by sum F theta*^2."""
        bounded = normalise_fisher(self._fisher, floor=self._values.floor, clip=self._values.ceiling)
        information = self._in_order(bounded)
        sizes = [(each * at.square()).sum() for each, at in zip(information, self._start, strict=True)]
        return list(torch._foreach_div(information, float(torch.stack(sizes).sum(dtype=torch.float64))))

    @torch.no_grad()
    def _loss_at_start(self) -> float:
        """The mean loss of replay examples under theta*."""
        generator = stream(self._seed, "reference")
        x, condition = self._replay.drawn(min(REFERENCE_ROWS, len(self._replay)), generator)
        draws = cast(ConditionalModel, self.model).draw(len(x), generator=generator)
        parts = [
            self._losses(x[rows], condition[rows], tuple(draw[rows] for draw in draws))
            for rows in torch.split(torch.arange(len(x)), self._micro_batch)
        ]
        found = float(torch.cat(parts).mean())
        if not _is_finite(found):
            raise InputError("the model's loss of its own samples is not finite; use an earlier checkpoint")
        return max(abs(found), 1e-12)


def _of_all_terms(model: ConditionalModel, fisher: Fisher) -> float:
    """What turns F over some of the loss's terms into F over all, as published: their ratio, squared."""
    terms = model.terms if isinstance(model, StratifiedConditional) else fisher.draws
    return (terms / fisher.draws) ** 2


def _is_finite(value: float) -> bool:
    return abs(value) < float("inf")


def _seed(seed: int, *names: str | int) -> int:
    return stream(seed, *names).initial_seed()


def _fingerprint(
    model: ConditionalModel,
    conditions: Tensor,
    surrogate: Surrogate,
    replay: Examples,
    fisher: Fisher,
    values: AmnesiaParameters,
    seed: int,
) -> str:
    """What a state must share with a run, to the bit: replay that another machine decoded is another run's."""
    facts = [
        VERSION, values.to_dict(), seed, tensor_digest(cast(nn.Module, model).state_dict()),
        tensor_digest({"conditions": conditions}), surrogate.digest(), replay.digest(),
        tensor_digest(fisher.tensors),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
