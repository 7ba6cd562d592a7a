"""Method ``steering``: how often samples show attributes is bounded, or spread as asked; judged on fresh samples."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

import unlearning
from evidence.fractions import CONFIDENCE
from unlearning import (
    Callback,
    Constraint,
    ParameterError,
    State,
    SteeringParameters,
    SteeringResult,
    Step,
    UnreachableError,
)
from unlearning.constraints import samples_needed
from worker.runner.artifacts import Work
from worker.runner.base import Base, check_likelihoods, first_samples, load_base, parameters_of
from worker.runner.contract import Reporter, Stop
from worker.runner.judges import Wanted, wanted_of
from worker.runner.problems import UserError
from worker.runner.samples import Asked, Change, conclude, samples_around
from worker.runner.sets import images_to_remember, reader_of
from worker.runner.steps import Clock, Method, drive, earlier_state

__all__ = ["run"]

NOT_FRACTIONS = ("step", "loss", "gap", "n")
"""Columns of the method's history that are no fraction of a class."""


@dataclass(frozen=True)
class _Inputs:
    """What the job reads."""

    wanted: Sequence[Wanted]
    remember: Tensor | None
    held_out: Tensor | None
    fitting: str


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Build the judges, steer, judge fresh samples, and report a result.

    Raises:
        UserError: the job cannot be done as asked, or not from this base.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    with stop.at_once():
        base = load_base(job, folder)
        confidence = float(job.get("confidence") or CONFIDENCE)
        parameters = parameters_of(job, lambda given: SteeringParameters.from_dict({"confidence": confidence, **given}))
        inputs = _read(job, folder, base, reporter)
        check_likelihoods(base, first_samples(base, job["seed"]), job["seed"])
        constraints = [_constraint(one) for one in inputs.wanted]
        samples = parameters.samples or _samples(job, constraints, confidence)
        state = earlier_state(job, folder)
    validated = time.monotonic()
    method = _method(base, constraints, inputs, parameters, job)
    try:
        # The method measures the base before its first step: until then the job still is being validated.
        result = drive(method, state, clock=Clock(), folder=folder, reporter=reporter, stop=stop, opens="unlearning")
    except UnreachableError as error:
        raise _unreachable(inputs.wanted, error) from error
    with stop.at_once():
        change = _change(job, result, inputs, state, {"validating": validated - began, "unlearning": result.seconds})
        asked = Asked([one.asked() for one in inputs.wanted], samples, confidence)
        conclude(job, base, change, asked, folder=folder, reporter=reporter)


def _read(job: Mapping[str, Any], folder: Path, base: Base, reporter: Reporter) -> _Inputs:
    reader = reader_of(job, folder, base)
    wanted = wanted_of(job, folder, reader, base, on_batch=reporter.alive)
    remember = images_to_remember(job, reader)
    held_out = reader.read_or_none((job["inputs"].get("evaluation") or {}).get("held_out"), "held_out")
    return _Inputs(wanted, remember, held_out, reader.fitting())


def _constraint(wanted: Wanted) -> Constraint:
    bounds = {name: (bound.low, bound.high) for name, bound in wanted.bounds.items()}
    return Constraint(wanted.judge.classes, wanted.judge, bounds, wanted.judge.name)


def _method(
    base: Base,
    constraints: Sequence[Constraint],
    inputs: _Inputs,
    parameters: SteeringParameters,
    job: Mapping[str, Any],
) -> Method[SteeringResult]:
    def steer(state: State | None, callback: Callback) -> SteeringResult:
        known: dict[str, float] = {}

        def with_fractions(step: Step) -> None:
            """Fractions are measured every few steps; a watcher sees the newest at each."""
            known.update({name: value for name, value in step.metrics.items() if name not in NOT_FRACTIONS})
            callback(replace(step, metrics={**known, **step.metrics}))

        return unlearning.steer(
            base.flow,
            constraints,
            parameters,
            n_bits=base.n_bits,
            seed=job["seed"],
            remember=inputs.remember,
            state=state,
            callback=with_fractions,
            micro_batch=base.micro_batch,
        )

    return steer


def _samples(job: Mapping[str, Any], constraints: Sequence[Constraint], confidence: float) -> int:
    """Fresh samples with which a flow as near to its target as steering aims at shows that it keeps it.

    Raises:
        UserError: more than a job draws unasked.
    """
    try:
        needed = samples_needed(constraints, confidence)
    except ParameterError as error:
        title = "There is too little to judge from"
        raise UserError("insufficient-evidence", title, str(error)) from error
    if job["kind"] == "debias":
        needed = max(needed, samples_around(job["target_distribution"].values(), float(job["tolerance"]), confidence))
    return needed


def _change(
    job: Mapping[str, Any],
    result: SteeringResult,
    inputs: _Inputs,
    state: State | None,
    seconds: dict[str, float],
) -> Change:
    used = result.parameters
    work = Work(
        engine="regression on class weights",
        parameters=used.to_dict(),
        defaults=SteeringParameters().to_dict(),
        steps=result.steps,
        history=[{name: row[name] for name in ("step", "loss", "gap") if name in row} for row in result.history],
        resumed_from=None if state is None else int(state.meta["step"]),
        digests={f"classifier/{one.judge.name}": one.digest for one in inputs.wanted if one.digest},
    )
    return Change(
        result.flow,
        work,
        kind="debias" if job["kind"] == "debias" else "attribute",
        seconds=seconds,
        remember=inputs.remember,
        held_out=inputs.held_out,
        curves=_curves(result, inputs.wanted),
        curve_samples=used.probe,
        facts={"image_fitting": inputs.fitting},
        summary={
            "confirmed_by_the_method": result.met,
            **{name: value for one in inputs.wanted for name, value in one.summary().items()},
        },
    )


def _curves(result: SteeringResult, wanted: Sequence[Wanted]) -> list[dict[str, float]]:
    """The measured rows of the history; the method and the report name a class of a judge alike."""
    names = {f"{one.judge.name}.{label}" for one in wanted for label in one.judge.classes}
    measured = [row for row in result.history if not names.isdisjoint(row)]
    return [{name: value for name, value in row.items() if name in names or name in ("step", "n")} for row in measured]


def _unreachable(wanted: Sequence[Wanted], error: UnreachableError) -> UserError:
    """The problem, at the class that is to blame; at all that its judge was asked for, or all judges, where none is."""
    blamed = [one for one in wanted if one.judge.name == error.constraint] or wanted
    asked = [(name, place) for one in blamed for name, place in one.pointers.items()]
    exact = [place for name, place in asked if name == error.class_name and len(blamed) == 1]
    places = exact or [place for _, place in asked]
    measured = {"class": error.class_name, "measured": error.measured, "samples": error.n, "upper": error.upper}
    return UserError(
        "target-unreachable",
        "The target cannot be reached from this checkpoint",
        str(error),
        pointer=None,
        errors=[{"pointer": place, "detail": str(error)} for place in dict.fromkeys(places)],
        **{name: value for name, value in measured.items() if value is not None},
    )
