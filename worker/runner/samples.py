"""How every job about samples ends: fresh samples of both flows are judged, and the report says how many show what."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from evidence.fractions import Bound, samples_for, samples_to_pass
from evidence.likelihood import derive_seed
from evidence.rendering import render_html
from evidence.report import Criterion
from evidence.steering_evaluation import evaluate_steering
from evidence.steering_records import FractionBounds, RelearnProbe, SteeringEvaluation
from evidence.steering_report import build_steering_report
from models.protocol import Flow
from unlearning.constraints import MOST_SAMPLES
from worker.runner.artifacts import Work, run_facts, sample_picture, save_tamed, write_artifacts
from worker.runner.base import Base
from worker.runner.contract import Reporter
from worker.runner.judges import refused_by_judge
from worker.runner.problems import UserError
from worker.runner.steps import batches_reported

__all__ = ["Asked", "Change", "conclude", "samples_around", "samples_below"]

SLACK = 0.2
"""Share of the tolerance by which a flow may miss its target and still pass."""
LEAST_SAMPLES = 500


@dataclass(frozen=True)
class Asked:
    """What samples have to show, and how many are judged."""

    constraints: Sequence[FractionBounds]
    samples: int
    confidence: float
    note: str = ""
    """How the bounds come about, where that is not plain."""


@dataclass(frozen=True)
class Change:
    """A changed flow and what is to be said of it."""

    flow: nn.Module
    work: Work
    kind: str
    """As `evidence.steering_evaluation.evaluate_steering` takes it."""
    seconds: dict[str, float] = field(default_factory=dict)
    notes: Sequence[str] = ()
    criteria: Sequence[Criterion] = ()
    remember: Tensor | None = None
    held_out: Tensor | None = None
    curves: Sequence[Mapping[str, float]] = ()
    """Rows of the run with the fraction of each class at their step."""
    curve_samples: int | None = None
    """Samples behind each of those fractions."""
    relearn: Callable[[SteeringEvaluation], RelearnProbe] | None = None
    """Tries to bring the class back, once it is known how often samples show it."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `evidence.report.RunFacts` that only this method knows."""
    summary: Mapping[str, Any] = field(default_factory=dict)


def samples_around(targets: Iterable[float], tolerance: float, confidence: float, *, slack: float = SLACK) -> int:
    """Samples with which a flow that misses its targets by a share of the tolerance shows that it keeps it.

    Raises:
        UserError: more than MOST_SAMPLES.
    """
    wanted = [min(1.0, max(0.0, one)) for one in targets]
    with refused_by_judge("/tolerance"):
        needed = samples_for(wanted, tolerance * (1 - slack), confidence)
    return _affordable(needed, f"a tolerance of {tolerance:g} at a confidence of {confidence:g}", "/tolerance")


def samples_below(rate: float, bound: Bound, *, confidence: float, classes: int, least: int = LEAST_SAMPLES) -> int:
    """Samples with which a model of this rate shows that it keeps a one-sided bound, at least `least`.

    Raises:
        UserError: more than MOST_SAMPLES.
    """
    comparisons = 1 if classes <= 2 else classes
    needed = samples_to_pass(rate, bound, level=1 - (1 - confidence) / comparisons)
    what = f"a rate of {rate:.4%} with bounds of {bound.low:.4%} to {bound.high:.4%}"
    return _affordable(needed, what, least=least)


def _affordable(needed: int | None, what: str, pointer: str | None = None, *, least: int = LEAST_SAMPLES) -> int:
    """The samples needed, at least so many; None is more than any number that can be named."""
    if needed is None or needed > MOST_SAMPLES:
        detail = (
            f"To show {what} takes {'more samples than can be named' if needed is None else f'{needed:,} samples'}, "
            f"and {MOST_SAMPLES:,} are the most. Allow more, or ask for less confidence."
        )
        title = "There is too little to judge from"
        raise UserError("insufficient-evidence", title, detail, pointer=pointer, given=MOST_SAMPLES, needed=needed)
    return max(least, needed)


def conclude(
    job: Mapping[str, Any], base: Base, change: Change, asked: Asked, *, folder: Path, reporter: Reporter
) -> None:
    """Save the changed flow, judge fresh samples of both, write the report, and report the result."""
    began = time.monotonic()
    reporter.phase("evaluating")
    tamed_sha256 = save_tamed(change.flow, change.work, job, base, folder)
    evaluation = evaluate_steering(
        base.flow,
        cast(Flow, change.flow),
        asked.constraints,
        n_bits=base.n_bits,
        samples=asked.samples,
        confidence=asked.confidence,
        seed=derive_seed(job["seed"], "judge"),
        remember=change.remember,
        held_out=change.held_out,
        batch_size=base.micro_batch,
        kind=change.kind,
        notes=[note for note in (*change.notes, asked.note) if note],
        on_progress=batches_reported(reporter),
    )
    if change.relearn is not None:
        evaluation = replace(evaluation, relearn=change.relearn(evaluation))
    seconds = {**change.seconds, "evaluating": time.monotonic() - began}
    facts = run_facts(job, base, change.work, tamed_sha256=tamed_sha256, seconds=seconds, **change.facts)
    report = build_steering_report(
        evaluation,
        facts,
        history=change.curves,
        history_samples=change.curve_samples,
        title="Debiasing report" if job["kind"] == "debias" else "Forgetting report",
        extra_criteria=change.criteria,
    )
    grid = sample_picture(base, cast(Flow, change.flow), job)
    html = render_html(report, sample_grid_png=grid)
    artifacts = write_artifacts(folder, report_json=report.to_json(), report_html=html, grid=grid)
    summary = {
        "verdict": report.verdict.sentence,
        "kind": change.kind,
        "steps": change.work.steps,
        "seconds": round(seconds.get("unlearning", 0.0), 3),
        **change.summary,
        **evaluation.summary(),
        "outcome": report.verdict.outcome,
    }
    reporter.result(report.verdict.outcome, artifacts, summary)
