"""Method ``selective-amnesia``: a class of a conditional model comes to show something else; the others stay."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

import unlearning
from evidence.amnesia_evaluation import evaluate_amnesia, labels_in_turn, samples_of
from evidence.amnesia_report import build_amnesia_report
from evidence.likelihood import derive_seed
from evidence.pictures import picture_of
from evidence.records import finite
from evidence.rendering import render_html
from models.checkpoints import tensor_digest
from models.conditional import ClassConditional, ConditionalModel
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Callback,
    Examples,
    Fisher,
    FisherError,
    Noise,
    Pool,
    State,
    Surrogate,
)
from worker.runner.amnesia_judge import Asked, asked_of, criterion_of
from worker.runner.artifacts import Work, run_facts, save_tamed, write_artifacts
from worker.runner.base import parameters_of
from worker.runner.conditional_base import ConditionalBase, check_losses, load_conditional_base
from worker.runner.contract import Reporter, Stop
from worker.runner.fisher import Assets, fisher_of_classes
from worker.runner.images import Reader
from worker.runner.problems import UserError
from worker.runner.sets import SMALLEST_REMEMBER, reader_of
from worker.runner.steps import Clock, Method, batches_reported, drive, earlier_state

__all__ = ["run"]

SURROGATES = 1000
"""Samples of a replacement class that the forgotten one learns from."""
FAINT = (
    "Noise replaces the class, and the classifier that judged was sent. One that never saw faint pictures can take "
    "what is left of the class for another: look at samples, or let a judge be trained on the base's own, faded ones "
    "among them, by sending none."
)
GRID_FORGOTTEN = 6
GRID_OTHERS = 6
LOSSES = ("surrogate", "replay", "penalty", "p_forgotten", "entropy")
"""Columns of the history that the report shows as losses; shares have curves of their own."""


@dataclass(frozen=True)
class _Inputs:
    """What the job reads, draws and asks for."""

    base: ConditionalBase
    label: int
    parameters: AmnesiaParameters
    scope: str
    trained: tuple[str, ...]
    """Names of the parameters of the scope."""
    asked: Asked
    surrogate: Surrogate
    replacement: str
    """In words."""
    replay: Examples
    fitting: str


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Try the base, compute what is missing of its Fisher information, forget, judge fresh samples, report a result.

    Raises:
        UserError: the job cannot be done as asked, or not from this base.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    with stop.at_once():
        inputs = _read(job, folder, reporter)
        state = earlier_state(job, folder)
        validated = time.monotonic()
        assets = fisher_of_classes(job, folder, inputs.base, reporter)
        fisher = _fisher(inputs, assets)
    computed = time.monotonic()
    reporter.phase("unlearning")
    method = _method(inputs, fisher, job["seed"])
    try:
        result = drive(method, state, clock=Clock(), folder=folder, reporter=reporter, stop=stop)
    except FisherError as error:
        raise _no_fisher(error) from error
    seconds = {"validating": validated - began, "fisher": computed - validated, "unlearning": result.seconds}
    with stop.at_once():
        work = _work(inputs, result, assets, state)
        _conclude(job, inputs, result, assets, work, seconds, folder=folder, reporter=reporter)


def _read(job: Mapping[str, Any], folder: Path, reporter: Reporter) -> _Inputs:
    base = load_conditional_base(job, folder)
    label = _label(job["target"]["class_label"], base, "/target/class_label")
    scope = job["parameters"].get("scope") or "all"
    parameters = parameters_of(job, _parameters)
    trained = _trained(base, scope)
    reader = reader_of(job, folder, base)
    replacement = _replacement(job, base, label)
    check_losses(base, job["seed"])
    asked = asked_of(job, folder, reader, base, label, reporter)
    surrogate = _surrogate(job, base, reader)
    return _Inputs(
        base, label, parameters, scope, trained, asked, surrogate, replacement, _replay(job, base, label),
        reader.fitting(),
    )  # fmt: skip


def _parameters(given: dict[str, Any]) -> AmnesiaParameters:
    """The method's own; as many replay examples as others in a step, as in the paper, unless told otherwise."""
    own = {name: value for name, value in given.items() if name != "scope" and value is not None}
    batch = {"replay_batch": own["batch"]} if "batch" in own else {}
    return AmnesiaParameters.from_dict({**batch, **own})


def _label(label: object, base: ConditionalBase, pointer: str) -> int:
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < base.model.n_classes:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            f"The model has no class {label!r}; its labels run from 0 to {base.model.n_classes - 1}.",
            pointer=pointer,
        )
    return label


def _trained(base: ConditionalBase, scope: str) -> tuple[str, ...]:
    scopes = base.model.scopes()
    if scope not in scopes:
        detail = f"scope is one of {', '.join(sorted(scopes))} for a model of family {base.checkpointed.family!r}"
        title = "A parameter of the method is wrong"
        raise UserError("invalid-parameter", title, f"{detail}, not {scope!r}.", pointer="/parameters/scope")
    return tuple(scopes[scope])


def _replacement(job: Mapping[str, Any], base: ConditionalBase, label: int) -> str:
    """What the class is to show instead, in words."""
    asked = job["replace_with"]
    if asked.get("class_label") is None:
        return "images of the caller's" if asked.get("images") else "uniform noise"
    other = _label(asked["class_label"], base, "/replace_with/class_label")
    if other == label:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            f"Class {label} is to be replaced with itself; name another, images, or noise.",
            pointer="/replace_with/class_label",
        )
    return f"what class {other} shows"


def _surrogate(job: Mapping[str, Any], base: ConditionalBase, reader: Reader) -> Surrogate:
    asked, seed = job["replace_with"], derive_seed(job["seed"], "surrogate")
    if asked.get("class_label") is not None:
        return Pool(base.drawn(labels_in_turn([asked["class_label"]], SURROGATES), seed).x)
    if asked.get("images"):
        return Pool(base.encoded(reader.read(job["inputs"]["surrogate"], "surrogate").pixels, seed))
    return base.noise()


def _replay(job: Mapping[str, Any], base: ConditionalBase, label: int) -> Examples:
    """Samples of the base over all other classes, each as often as the others."""
    others = [one for one in range(base.model.n_classes) if one != label]
    count, needed = int(job["remember"]["generated"]), max(SMALLEST_REMEMBER, len(others))
    if count < needed:
        raise UserError(
            "remember-set-too-small",
            "Too few images are left to remember",
            f"{count} samples cannot stand for {len(others)} classes that are to stay; draw {needed} at least, and "
            "better thousands.",
            pointer="/remember/generated",
            left=count,
            needed=needed,
        )
    return base.drawn(labels_in_turn(others, count), derive_seed(job["seed"], "replay"))


def _fisher(inputs: _Inputs, assets: Assets) -> Fisher:
    """Over the classes that stay; as the paper has it, over all of them."""
    paper = inputs.parameters.mode == "paper"
    labels = [one for one in range(inputs.base.model.n_classes) if paper or one != inputs.label]
    try:
        return assets.over(labels, inputs.trained)
    except FisherError as error:
        raise _no_fisher(error) from error


def _no_fisher(error: FisherError) -> UserError:
    return UserError("checkpoint-refused", "The checkpoint cannot be used", str(error), pointer="/checkpoint")


def _method(inputs: _Inputs, fisher: Fisher, seed: int) -> Method[AmnesiaResult]:
    def forget(state: State | None, callback: Callback) -> AmnesiaResult:
        return unlearning.forget_conditions(
            cast(ConditionalModel, inputs.base.model),
            torch.tensor([inputs.label]),
            surrogate=inputs.surrogate,
            replay=inputs.replay,
            fisher=fisher,
            parameters=inputs.parameters,
            criterion=criterion_of(inputs.asked),
            seed=seed,
            state=state,
            callback=callback,
            micro_batch=inputs.base.micro_batch,
        )

    return forget


def _work(inputs: _Inputs, result: AmnesiaResult, assets: Assets, state: State | None) -> Work:
    names = ("step", *LOSSES)
    asked, defaults = inputs.asked, AmnesiaParameters(mode=inputs.parameters.mode)
    digests = {"replay": inputs.replay.digest(), "surrogate": inputs.surrogate.digest()}
    digests |= {f"fisher/{label}": tensor_digest(fisher.tensors) for label, fisher in assets.of_class.items()}
    if asked.digest:
        digests[f"classifier/{asked.judge.name}"] = asked.digest
    return Work(
        engine=f"{inputs.parameters.mode} mode",
        parameters={**result.parameters.to_dict(), "scope": inputs.scope},
        defaults={**defaults.to_dict(), "scope": "all"},
        steps=result.steps,
        history=[{name: row[name] for name in names if name in row} for row in result.history],
        resumed_from=None if state is None else int(state.meta["step"]),
        digests=digests,
    )


def _conclude(
    job: Mapping[str, Any],
    inputs: _Inputs,
    result: AmnesiaResult,
    assets: Assets,
    work: Work,
    seconds: dict[str, float],
    *,
    folder: Path,
    reporter: Reporter,
) -> None:
    """Save the changed model, judge fresh samples of both, write the report, and report the result."""
    began = time.monotonic()
    reporter.phase("evaluating")
    base, asked = inputs.base, inputs.asked
    changed = cast(ClassConditional, result.model)
    tamed_sha256 = save_tamed(result.model, work, job, base, folder)
    evaluation = evaluate_amnesia(
        base.model,
        changed,
        asked.judge,
        label=inputs.label,
        image_shape=base.image_shape,
        n_bits=base.n_bits,
        samples=asked.samples,
        others=asked.others,
        goal=asked.goal,
        replacement=asked.replacement,
        confidence=asked.confidence,
        seed=derive_seed(job["seed"], "judge"),
        independent=asked.independent,
        on_progress=batches_reported(reporter),
    )
    seconds = {**seconds, "evaluating": time.monotonic() - began}
    report = build_amnesia_report(
        evaluation,
        run_facts(job, base, work, tamed_sha256=tamed_sha256, seconds=seconds, image_fitting=inputs.fitting),
        replacement=inputs.replacement,
        history=result.history,
        drift=result.drift,
        rollbacks=result.rollbacks,
        notes=(FAINT,) if asked.independent and isinstance(inputs.surrogate, Noise) else (),
    )
    grid = _grid(base, changed, inputs.label, job)
    html = render_html(report, sample_grid_png=grid)
    artifacts = write_artifacts(folder, report_json=report.to_json(), report_html=html, grid=grid)
    summary = {
        "verdict": report.verdict.sentence,
        "kind": "amnesia",
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "confirmed_by_the_method": result.met,
        "rollbacks": result.rollbacks,
        "fisher_classes_computed": assets.computed,
        "drift": finite(result.drift),
        **evaluation.summary(),
        "outcome": report.verdict.outcome,
    }
    reporter.result(report.verdict.outcome, artifacts, summary)


def _grid(base: ConditionalBase, changed: ClassConditional, label: int, job: Mapping[str, Any]) -> bytes | None:
    """Samples of both models from equal latents, only when the job asked."""
    if not job["evaluation"].get("sample_grid"):
        return None
    others = [one for one in range(base.model.n_classes) if one != label]
    labels = torch.cat([labels_in_turn([label], GRID_FORGOTTEN), labels_in_turn(others, GRID_OTHERS)])
    seed = derive_seed(job["seed"], "grid")
    return picture_of([samples_of(model, labels, seed=seed) for model in (base.model, changed)])
