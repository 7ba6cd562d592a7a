"""Flow taming (kind ``forget``, images): the pictures of one identity become unlikely, and the report says how much."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import unlearning
from evidence.flow_evaluation import evaluate_taming
from evidence.likelihood import derive_seed
from evidence.records import FlowEvaluation
from evidence.rendering import render_html
from evidence.report import Criterion, Report, build_report
from models.protocol import Flow
from models.training import set_memory_format
from unlearning import Callback, State, TamingParameters, TamingResult
from worker.runner.artifacts import Work, run_facts, sample_picture, save_tamed, write_artifacts
from worker.runner.base import Base, check_likelihoods, load_base, parameters_of
from worker.runner.contract import Reporter, Stop
from worker.runner.images import Images
from worker.runner.sets import Remember, reader_of, remember_of
from worker.runner.steps import Clock, Method, batches_reported, drive, earlier_state

__all__ = ["run"]

REMEMBER_DRAWS = 1  # the report names it; single images are judged on ten


@dataclass
class _Sets:
    """What the job reads, as the model takes it."""

    forget: Images
    remember: Remember
    same_identity: Tensor | None
    held_out: Tensor | None
    fitting: str


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Validate, unlearn, evaluate, and report a result.

    Raises:
        UserError: the job cannot be done as asked.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    with stop.at_once():
        base = load_base(job, folder)
        parameters = parameters_of(job, TamingParameters.from_dict).resolved()
        sets = _read_sets(job, folder, base, parameters)
        check_likelihoods(base, sets.forget.pixels, job["seed"])
        state = earlier_state(job, folder)
    validated = time.monotonic()
    reporter.phase("unlearning")
    clock = Clock("z_min", parameters.delta * (1 - parameters.tolerance))
    method = _method(base, sets, parameters, job)
    result = drive(method, state, clock=clock, folder=folder, reporter=reporter, stop=stop)
    tamed_at = time.monotonic()
    reporter.phase("evaluating")
    with stop.at_once():
        work = _work(result, sets, state)
        tamed_sha256 = save_tamed(result.flow, work, job, base, folder)
        for model in (base.module, result.flow):
            set_memory_format(model, torch.channels_last)  # convolutions run faster so
        evaluation = _evaluate(base, result, sets, parameters, job, reporter)
        seconds = {
            "validating": validated - began,
            "unlearning": result.seconds,
            "evaluating": time.monotonic() - tamed_at,
        }
        removed = len(result.removed_near_duplicates)
        facts = run_facts(
            job,
            base,
            work,
            tamed_sha256=tamed_sha256,
            seconds=seconds,
            near_duplicates_removed=removed,
            image_fitting=sets.fitting,
        )
        report = build_report(evaluation, facts, extra_criteria=[_confirmed(result, parameters)])
        grid = sample_picture(base, cast(Flow, result.flow), job)
        html = render_html(report, sample_grid_png=grid)
        artifacts = write_artifacts(folder, report_json=report.to_json(), report_html=html, grid=grid)
    reporter.result(report.verdict.outcome, artifacts, _summary(report, evaluation, result, sets))


def _read_sets(job: Mapping[str, Any], folder: Path, base: Base, parameters: TamingParameters) -> _Sets:
    reader = reader_of(job, folder, base)
    forget = reader.read(job["inputs"]["forget"], "target").without_copies()
    remember = remember_of(job, reader, base, forget=forget.pixels, near_duplicate_rms=parameters.near_duplicate_rms)
    evaluation = job["inputs"].get("evaluation") or {}
    same, held_out = (reader.read_or_none(evaluation.get(role), role) for role in ("same_identity", "held_out"))
    fitting = reader.fitting()
    if forget.copies_dropped:
        fitting += f"; {forget.copies_dropped} exact copies among the images to forget were left out"
    return _Sets(forget, remember, same, held_out, fitting)


def _method(base: Base, sets: _Sets, parameters: TamingParameters, job: Mapping[str, Any]) -> Method[TamingResult]:
    def tame(state: State | None, callback: Callback) -> TamingResult:
        return unlearning.tame(
            base.flow,
            sets.forget.pixels,
            sets.remember.images,
            parameters,
            n_bits=base.n_bits,
            seed=job["seed"],
            state=state,
            callback=callback,
            micro_batch=base.micro_batch,
        )

    return tame


def _evaluate(
    base: Base,
    result: TamingResult,
    sets: _Sets,
    parameters: TamingParameters,
    job: Mapping[str, Any],
    reporter: Reporter,
) -> FlowEvaluation:
    return evaluate_taming(
        base.flow,
        cast(Flow, result.flow),
        forget=sets.forget.pixels,
        remember=sets.remember.without(result.removed_near_duplicates),
        remember_source=sets.remember.source,
        same_identity=sets.same_identity,
        held_out=sets.held_out,
        n_bits=base.n_bits,
        delta=parameters.delta,
        tolerance=parameters.tolerance,
        seed=derive_seed(job["seed"], "judge"),
        remember_draws=REMEMBER_DRAWS,
        two_sided=parameters.engine == "paper",
        batch_size=base.micro_batch,
        on_progress=batches_reported(reporter),
    )


def _confirmed(result: TamingResult, parameters: TamingParameters) -> Criterion:
    return Criterion(
        name="confirmed_by_the_method",
        statement="The method's own final confirmation, on noise that no step had seen, found the same.",
        threshold=parameters.delta * (1 - parameters.tolerance),
        value=min(result.z),
        met=result.met,
    )


def _work(result: TamingResult, sets: _Sets, state: State | None) -> Work:
    used = result.parameters
    return Work(
        engine=used.engine,
        parameters=used.to_dict(),
        defaults=TamingParameters(engine=used.engine).to_dict(),
        steps=result.steps,
        history=result.history,
        resumed_from=None if state is None else int(state.meta["step"]),
        digests={"remember_set": sets.remember.digest()},
    )


def _summary(report: Report, evaluation: FlowEvaluation, result: TamingResult, sets: _Sets) -> dict[str, Any]:
    return {
        "verdict": report.verdict.sentence,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "near_duplicates_removed": len(result.removed_near_duplicates),
        "copies_dropped": sets.forget.copies_dropped,
        **evaluation.summary(),
        "outcome": report.verdict.outcome,
    }
