"""Selective Amnesia: a condition comes to show something else, and what other conditions show stays as it was.

Heng and Soh, "Selective Amnesia", NeurIPS 2023, eq. 4: the ELBO of a surrogate under the forgotten conditions, the ELBO
of replayed samples under the others, and elastic weight consolidation, which holds each weight by its Fisher
information. No training data is needed.

What the default mode changes: the penalty is the Fisher-weighted drift relative to the weights, in units of the replay
loss at the start, so that its strength means the same whatever the model, its loss and the timesteps that the Fisher
information was taken over; and the run ends once the criterion holds on fresh samples.
"""

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from models.conditional import ConditionalModel
from unlearning.amnesia_parameters import AmnesiaParameters
from unlearning.amnesia_run import AmnesiaRun
from unlearning.errors import StateError
from unlearning.fisher_result import Fisher
from unlearning.passes import recomputing
from unlearning.processes import ALONE, Processes
from unlearning.progress import Callback, Step
from unlearning.randomness import stream
from unlearning.state import State
from unlearning.surrogates import Examples, Surrogate

PHASE = "unlearning"
VERSION = 3
"""Of the states: raised whenever the steps or what they read change."""


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
    """The changed copy; what was not trained shares its memory with the model that it was made from."""
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
    device: torch.device | None = None,
    recompute: bool = False,
    processes: Processes = ALONE,
) -> AmnesiaResult:
    """Make a copy of a model show a surrogate under some conditions, until a criterion holds on fresh samples.

    Args:
        model: theta*, a module; it is not modified, and has to stay as it is until the run is over: its weights are
            the ones that the penalty pulls to, not a copy of them.
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
        device: where the copy is trained, by default where the model is. From a model on the CPU it takes as much there
            as from one on the device: the weights once, and those that are trained once more.
        recompute: compute activations twice where the model can (`unlearning.passes.recomputing`): less memory, and
            equal gradients.
        processes: those that share the work, each called with equal arguments and its own copy of the model; criterion
            and callback are called in the first alone. Each has a result.

    Returns:
        The changed copy; `met` is False where max_steps did not suffice.

    Raises:
        InputError: the model's loss of the replay is not finite.
        FisherError: the Fisher information is of another model or none of its parameters, or zero everywhere.
        ParameterError: the optimiser does not run here.
        DivergedError: steps were not finite, again and again.
        ProcessError: the processes were not called alike, or another one failed.
        StateError: the state belongs to another run.
        Interrupted: as the callback raised it.
    """
    start = time.monotonic()
    values = parameters.resolved()
    fingerprint = _fingerprint(model, conditions, surrogate, replay, fisher, values, seed)
    if state is not None and state.meta.get("fingerprint") != fingerprint:
        raise StateError("the state belongs to a run with another model, request, Fisher information or seed")
    processes.agree("model, request or seed", fingerprint)
    if device is None:
        device = next(cast(nn.Module, model).parameters()).device if processes.count == 1 else processes.device
    run = AmnesiaRun(model, conditions, surrogate, replay, fisher, values, seed, micro_batch, device, processes)
    step, attempts, before = 0, 0, 0.0
    history: list[dict[str, float]] = []
    promising = False
    if state is not None:
        run.restore(state.tensors, state.meta)
        step, attempts, promising = int(state.meta["step"]), int(state.meta["attempts"]), bool(state.meta["promising"])
        history, before = list(state.meta["history"]), float(state.meta["seconds"])

    def asked(*names: str | int) -> Check:
        def look() -> dict[str, Any]:
            found = criterion(cast(ConditionalModel, run.model), _seed(seed, *names))
            return {"met": found.met, "metrics": dict(found.metrics)}

        return Check(**processes.ask(look))

    with recomputing(run.model, recompute):
        while True:
            if promising or step >= cast(int, values.max_steps):
                check = asked("confirm", attempts)
                attempts += 1
                if check.met or step >= cast(int, values.max_steps):
                    break
            losses = run.step(step)
            step += 1
            metrics: dict[str, float] = {}
            promising = False
            if step % values.check_every == 0:
                found = asked("check", step)
                metrics, promising = dict(found.metrics), found.met
                run.keep_next()
            history.append({"step": float(step), **losses, **metrics})
            meta = {"fingerprint": fingerprint, "step": step, "attempts": attempts, "promising": promising}

            def capture(meta: dict[str, Any] = meta) -> State:
                seconds = before + time.monotonic() - start
                tensors = {name: value.detach().to("cpu", copy=True) for name, value in run.tensors().items()}
                return State(tensors, {**meta, **run.facts(), "history": list(history), "seconds": seconds})

            here = Step(PHASE, step, cast(int, values.max_steps), losses, metrics, capture)
            processes.ask(partial(_report, callback, here))
    return AmnesiaResult(
        model=run.model, met=check.met, steps=step, check=check, history=history, rollbacks=run.rollbacks,
        drift=run.drift(), seconds=before + time.monotonic() - start, parameters=values,
    )  # fmt: skip


def _report(callback: Callback | None, step: Step) -> None:
    if callback is not None:
        callback(step)


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
