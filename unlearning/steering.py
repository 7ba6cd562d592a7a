"""Steering: change how often a flow's samples show given classes, and leave what lies within each class as it was.

The flow taming paper (Malnick et al., WACV 2024, Sec. 4.2) lowers an attribute by forgetting the images that show it
until the fraction looks right. Here the target is exact: the nearest distribution to the base that keeps the bounds is
p_base(x) w(c(x)) (`unlearning.constraints`), so the likelihood of EVERY image, base sample or real, shall change by
log w(c(x)), known before the first step. The steps regress on that (the variance of log p_T - log p_B - log w over a
batch, as in Richter et al., "VarGrad", 2020), on samples of the base. A flow of finite size follows the target only so
far, so the fractions of fresh samples correct w by integral control; and an interval on samples that no step has seen
decides.

Tried and left: weighted maximum likelihood (on digits, slower, and every class moved beyond noise), score-function
updates on own samples (on blobs, no nearer and at 2.5 times the time), and tuning all scales instead of the last (on
digits, twice the time and no nearer).
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from models.protocol import Flow
from models.training import set_memory_format
from unlearning import micro_batch as micro
from unlearning.constraints import Constraint, Fractions, count, samples_needed
from unlearning.errors import DivergedError, InputError
from unlearning.optimiser import pack, unpack
from unlearning.progress import Callback, Step
from unlearning.randomness import stream
from unlearning.replay import generate_remember
from unlearning.state import State
from unlearning.steering_parameters import SteeringParameters
from unlearning.steering_plan import Plan, by_constraint, decide, fingerprint_of, recall
from unlearning.suffix import Cut, Suffix

PHASE = "unlearning"
BETAS = (0.9, 0.99)
"""Adam's decays; the second is short, since a run has some hundreds of steps."""
WARMUP = 10
"""Steps over which the learning rate rises."""
SMOOTHING = 0.5
"""Decay of the running fractions of the probes."""
LARGEST = 0.7
"""Largest correction of a log weight at one measurement."""
DOUBT = 0.1
"""Share of the doubt that the stated confidence leaves with which the intervals that end a run must lie inside."""
EXTREME = 12.0
"""Largest change of a log-likelihood, in nats, that is ever asked for."""


@dataclass(frozen=True)
class SteeringResult:
    """A steered flow and how it came about."""

    flow: nn.Module
    """The steered copy."""
    met: bool
    """Whether every interval of the final confirmation, on fresh samples, lies within its bounds."""
    steps: int
    fractions: list[Fractions]
    """Of that confirmation, one a constraint."""
    before: list[Fractions]
    """Of the base."""
    history: list[dict[str, float]]
    """Loss of each step with its number, from step 0, the base; where fractions were measured after it, also
    `<constraint>.<class>` for each class, and `n`, the samples they were measured on."""
    seconds: float
    """Wall time, over all attempts of a resumed run."""
    parameters: SteeringParameters


def measure_fractions(
    flow: Flow, constraints: Sequence[Constraint], n: int, n_bits: int, seed: int, confidence: float = 0.95
) -> list[Fractions]:
    """The fraction of each class among n fresh samples of a flow at temperature 1.

    Args:
        flow: any flow.
        constraints: whose judges and classes; their bounds are not read.
        n: samples, 2 or more; all constraints judge the same ones.
        n_bits: colour depth that samples are rounded to.
        seed: of the samples.
        confidence: of the intervals of each constraint together.
    """
    images = generate_remember(flow, n, n_bits, seed)
    return [count(constraint, constraint.labels(images), confidence) for constraint in constraints]


def steer(
    flow: Flow,
    constraints: Sequence[Constraint],
    parameters: SteeringParameters,
    *,
    n_bits: int,
    seed: int,
    remember: Tensor | None = None,
    state: State | None = None,
    callback: Callback | None = None,
    micro_batch: int = 128,
) -> SteeringResult:
    """Steer a copy of a flow until the fractions of its samples lie within all bounds, confirmed on fresh samples.

    Args:
        flow: the base, a module with `log_prob` and `sample`; it is not modified. Runs on the device it is on.
        constraints: one or more, to hold at once; the least change that keeps all of them is aimed at.
        parameters: see `SteeringParameters`.
        n_bits: colour depth that images are quantised to.
        seed: of every draw; equal seeds give equal bits on the CPU with the same number of threads.
        remember: real images, uint8 (m, c, h, w), that join the base's own samples where there are any.
        state: of an interrupted run with the same arguments; the result is that of a run never interrupted.
        callback: gets a `Step` at every boundary; may call its `snapshot()` and may raise `Interrupted`.
        micro_batch: most images that pass through the flow at once; no part of the method.

    Returns:
        The steered copy and the final confirmation; `met` is False where max_steps did not suffice. The first measured
        step whose intervals all lie inside with room to spare ends the run, if fresh samples confirm it. Several may
        be tried, so that `met` is no statement at that confidence: whoever makes one draws samples of their own.

    Raises:
        UnreachableError: before the first step, where the bounds contradict each other or what the base shows.
        InputError: the flow, the constraints, a judge's answers or the images cannot be used.
        DivergedError: a loss was not finite.
        StateError: the state belongs to another run.
        Interrupted: as the callback raised it.
    """
    start = time.monotonic()
    base = _checked(flow, constraints, remember)
    steered = copy.deepcopy(base).requires_grad_(True)
    sets = [generate_remember(cast(Flow, base), parameters.pool, n_bits, _seed(seed, "pool"))]
    if remember is not None and len(remember):
        sets.append(remember)
    fingerprint = fingerprint_of(base, constraints, parameters, remember, n_bits, seed)
    plan = (
        decide(constraints, sets, parameters.confidence)
        if state is None
        else recall(state, fingerprint, constraints, sets[0], parameters.confidence)
    )
    tuned = copy.deepcopy(steered)
    for module in (steered, tuned):
        set_memory_format(module, torch.channels_last)  # convolutions run faster so
    run = _Run(tuned, steered, list(constraints), parameters, plan, sets, n_bits, seed, micro_batch)
    step, attempts, before = 0, 0, 0.0
    history = [{"step": 0.0, **run.measure(0)}] if state is None else list[dict[str, float]]()
    if state is not None:
        run.restore(state.tensors)
        step, attempts = int(state.meta["step"]), int(state.meta["attempts"])
        history, before = list(state.meta["history"]), float(state.meta["seconds"])
    while True:
        if run.promising or step == parameters.max_steps:
            fractions = run.confirm(attempts)
            attempts += 1
            if run.surely_inside(fractions) or step == parameters.max_steps:
                break
            run.rejected(fractions, step)
        losses, metrics = run.step(step)
        step += 1
        if step % parameters.measure_every == 0:
            metrics.update(run.measure(step))
        history.append({"step": float(step), **losses, **metrics})
        if callback is not None:
            meta = {"fingerprint": fingerprint, "step": step, "attempts": attempts}

            def capture(meta: dict[str, Any] = meta) -> State:
                tensors = {name: value.detach().cpu().clone() for name, value in run.tensors().items()}
                seconds = before + time.monotonic() - start
                return State(tensors, {**meta, "history": list(history), "seconds": seconds})

            callback(Step(PHASE, step, parameters.max_steps, losses, metrics, capture))
    history[-1].update(_flat(fractions))
    set_memory_format(steered.eval(), torch.contiguous_format)
    return SteeringResult(
        flow=steered, met=run.inside(fractions), steps=step, fractions=fractions, before=plan.before, history=history,
        seconds=before + time.monotonic() - start, parameters=parameters,
    )  # fmt: skip


class _Run:
    """The pool, the weights of the classes, the optimiser; `steer` owns the loop and the state."""

    def __init__(
        self,
        tuned: nn.Module,
        steered: nn.Module,
        constraints: list[Constraint],
        values: SteeringParameters,
        plan: Plan,
        sets: list[Tensor],
        n_bits: int,
        seed: int,
        micro_batch: int,
    ) -> None:
        self._steered, self._constraints, self._values, self._plan = steered, constraints, values, plan
        self._n_bits, self._seed, self._micro_batch = n_bits, seed, micro_batch
        self._weights = list(plan.weights)
        self._samples = values.samples or samples_needed(constraints, values.confidence)
        self._smooth = [found.tensor() for found in plan.before]
        self._next = torch.zeros((), dtype=torch.int64)  # first step at which fresh samples may decide again
        self.promising = False
        """Whether fresh samples keep all bounds, so that a confirmation is worth its cost."""

        self._suffix = Suffix(tuned, n_bits=n_bits, micro_batch=micro_batch)
        self._parameters = self._suffix.parameters
        self._optimiser = torch.optim.Adam(self._parameters.values(), lr=values.learning_rate, fused=True, betas=BETAS)
        mean = dict(steered.named_parameters())
        self._mean = {name: mean[name] for name in self._parameters}  # running mean of the weights: the result
        named = zip(sets, ("pool", "remember"), strict=False)  # real images only where there are any
        self._cut = Cut.join([self._suffix.cut(images, seed, name) for images, name in named])
        self._sizes = [len(images) for images in sets]
        self._base_nll = self._suffix.nll(self._cut)  # nothing is tuned yet

    def measure(self, step: int) -> dict[str, float]:
        """Look at fresh samples: decide about a confirmation, else correct the weights, once; returns the fractions."""
        found = self._fractions(self._values.probe, "probe", step) if step else self._plan.before
        if step:
            self._smooth = [
                SMOOTHING * old + (1 - SMOOTHING) * now.tensor() for old, now in zip(self._smooth, found, strict=True)
            ]
        self.promising = False
        if step >= int(self._next) and self._plausible(self._smooth):
            found = self._fractions(self._samples, "check", step)
            self.promising = self.surely_inside(found)
            if not self.promising:
                self.rejected(found, step)
        elif step:
            self._correct(found)
        return _flat(found)

    def confirm(self, attempt: int) -> list[Fractions]:
        """Fractions of samples that nothing else looks at; every attempt has its own."""
        return self._fractions(self._samples, "confirm", attempt)

    def inside(self, found: list[Fractions]) -> bool:
        """Whether every interval lies within its bounds."""
        return all(one.inside(constraint) for one, constraint in zip(found, self._constraints, strict=True))

    def surely_inside(self, found: list[Fractions]) -> bool:
        """Whether they do with room to spare, so that the fresh samples of whoever judges next say so too."""
        sure = [replace(one, confidence=1 - (1 - one.confidence) * DOUBT) for one in found]
        return self.inside(sure)

    def rejected(self, found: list[Fractions], step: int) -> None:
        """Fresh samples missed a bound: take their fractions, which are the most exact, and wait two looks."""
        self.promising = False
        self._smooth = [one.tensor() for one in found]
        self._correct(found)
        self._next.fill_(step + 2 * self._values.measure_every)

    def step(self, step: int) -> tuple[dict[str, float], dict[str, float]]:
        """One Adam step: the change of each image's likelihood is regressed on the log weight of its classes."""
        values, generator = self._values, stream(self._seed, "step", step)
        rows = self._rows(generator)
        base, aim = self._base_nll[rows], self._targets(rows)
        parts: dict[str, Tensor] = {}

        def loss(nll: Tensor) -> Tensor:
            gap = base - nll - aim  # log p_T - log p_B - log w
            gap = gap - gap.mean()  # densities integrate to 1: the constant needs no teaching, and is noise
            parts["gap"] = gap.detach()
            return torch.nn.functional.huber_loss(gap, torch.zeros_like(gap), delta=values.huber)

        self._optimiser.zero_grad(set_to_none=True)
        cut = self._cut[rows]
        total = micro.backward(self._suffix.log_prob, (cut.h, cut.share), loss, self._micro_batch)
        norm = torch.nn.utils.clip_grad_norm_(list(self._parameters.values()), values.clip)
        if not bool(torch.isfinite(norm)) or not bool(torch.isfinite(total)):
            raise DivergedError(f"the loss or its gradient was not finite at step {step}; lower the learning rate")
        for group in self._optimiser.param_groups:
            group["lr"] = values.learning_rate * min(1.0, (step + 1) / WARMUP)
        self._optimiser.step()
        decay = min(values.average, (1 + step) / (10 + step))
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                self._mean[name].lerp_(parameter, 1 - decay)
        return {"loss": float(total)}, {"gap": float(parts["gap"].abs().mean())}

    def tensors(self) -> dict[str, Tensor]:
        """Tuned weights, Adam's moments, the plan, class weights, running fractions."""
        return {
            **pack(self._parameters, self._optimiser),
            **{f"mean.{name}": value.detach() for name, value in self._mean.items()},
            **self._plan.tensors(),
            "class_weights": torch.cat(self._weights),
            "smooth": torch.cat(self._smooth),
            "next": self._next,
            "promising": torch.tensor(self.promising),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """The reverse of `tensors`, but for what the plan holds."""
        unpack(tensors, self._parameters, self._optimiser)
        with torch.no_grad():
            for name, value in self._mean.items():
                value.copy_(tensors[f"mean.{name}"])
        self._smooth = by_constraint(self._constraints, tensors["smooth"])
        self._next = tensors["next"].clone()
        self.promising = bool(tensors["promising"])

    def _fractions(self, n: int, purpose: str, number: int) -> list[Fractions]:
        seed, confidence = _seed(self._seed, purpose, number), self._values.confidence
        return measure_fractions(cast(Flow, self._steered), self._constraints, n, self._n_bits, seed, confidence)

    def _plausible(self, fractions: list[Tensor]) -> bool:
        """Whether fractions lie within their bounds, intervals left aside."""
        boxes = [constraint.box() for constraint in self._constraints]
        return all(
            bool(((low <= now) & (now <= high)).all()) for now, (low, high) in zip(fractions, boxes, strict=True)
        )

    def _correct(self, found: list[Fractions]) -> None:
        """Integral control: raise the weight of a class by a share of what its fraction lacks, in logarithms.

        Near the aim an error is mostly chance, and to follow it would keep the flow moving for nothing: each is shrunk
        by the share of its square that the variance of the fraction's logarithm explains.
        """
        for j, (one, aim) in enumerate(zip(found, self._plan.aims, strict=True)):
            least = 0.5 / one.n  # of a class that was not seen
            now = one.tensor().clamp(min=least, max=1 - least)
            error = (aim.clamp(min=least) / now).log()
            chance = (1 - now) / (one.n * now)
            error = error * error.square() / (error.square() + chance)
            change = self._values.gain * error.clamp(-LARGEST, LARGEST)
            self._weights[j] = (self._weights[j] + change).clamp(-EXTREME, EXTREME)

    def _targets(self, rows: Tensor) -> Tensor:
        """log w of these images, (b,) nats."""
        parts = [weights[labels[rows]] for weights, labels in zip(self._weights, self._plan.labels, strict=True)]
        return torch.stack(parts).sum(0).clamp(-EXTREME, EXTREME).float()

    def _rows(self, generator: torch.Generator) -> Tensor:
        """Rows of one step: samples of the base, and half of them real images where there are any."""
        batch = self._values.batch
        shares = [batch] if len(self._sizes) == 1 else [batch - batch // 2, batch // 2]
        parts, first = [], 0
        for size, share in zip(self._sizes, shares, strict=True):
            parts.append(first + torch.randint(size, (share,), generator=generator))
            first += size
        return torch.cat(parts)


def _flat(found: list[Fractions]) -> dict[str, float]:
    values = {f"{one.name}.{name}": value for one in found for name, value in one.values.items()}
    return {**values, "n": float(found[0].n)}


def _seed(seed: int, *names: str | int) -> int:
    return stream(seed, *names).initial_seed()


def _checked(flow: Flow, constraints: Sequence[Constraint], remember: Tensor | None) -> nn.Module:
    if not isinstance(flow, nn.Module) or not callable(getattr(flow, "log_prob", None)):
        raise InputError(f"a flow to be steered is a torch module with log_prob; {type(flow).__name__} is not")
    if not callable(getattr(flow, "sample", None)):
        raise InputError(f"{type(flow).__name__} has no sample(n, generator=...): what is steered are its samples")
    if not any(parameter.is_floating_point() for parameter in flow.parameters()):
        raise InputError(f"{type(flow).__name__} has no parameters to steer")
    if not any(constraint.bounds for constraint in constraints):
        raise InputError("no fraction is bounded; there is nothing to steer")
    names = [constraint.name for constraint in constraints]
    if len(set(names)) < len(names):
        raise InputError(f"constraints need names of their own, not {', '.join(names)}")
    if remember is not None and (remember.dtype != torch.uint8 or remember.ndim != 4):
        raise InputError(f"remember images are uint8 (n, c, h, w), not {remember.dtype} {tuple(remember.shape)}")
    return flow
