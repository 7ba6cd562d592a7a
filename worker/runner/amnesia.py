"""Method ``selective-amnesia``: a class of a conditional model comes to show something else; the others stay."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import unlearning
from evidence.amnesia_evaluation import evaluate_amnesia, labels_in_turn, samples_of
from evidence.amnesia_report import build_amnesia_report
from evidence.likelihood import derive_seed
from evidence.pictures import picture_of
from evidence.records import finite
from evidence.rendering import render_html
from models.conditional import ConditionalModel, LabelledSampler
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
from worker.runner.amnesia_inputs import label_of, parameters_for, replay_of, surrogates_of, trained_by
from worker.runner.amnesia_judge import Asked, asked_of, criterion_of
from worker.runner.artifacts import Work, run_facts, save_tamed, write_artifacts
from worker.runner.assets import AssetFolder
from worker.runner.base import parameters_of
from worker.runner.conditional_base import ConditionalBase, check_losses, load_conditional_base
from worker.runner.conditions import Concepts
from worker.runner.contract import Reporter, Stop
from worker.runner.fisher import Parts, fisher_of_parts
from worker.runner.images import Reader
from worker.runner.own_samples import OwnSamples, own_samples
from worker.runner.problems import UserError
from worker.runner.sets import reader_of
from worker.runner.steps import Clock, Method, batches_reported, drive, earlier_state

__all__ = ["run"]

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
    own: OwnSamples
    assets: AssetFolder
    label: int
    """Of what is forgotten."""
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

    @property
    def others(self) -> list[int]:
        """The labels that stay."""
        return [one for one in self.base.labels if one != self.label]


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
        parts = fisher_of_parts(inputs.base, inputs.own, inputs.others, inputs.assets, reporter)
        fisher = _fisher(inputs, parts)
    computed = time.monotonic()
    reporter.phase("unlearning")
    method = _method(inputs, fisher, job["seed"])
    try:
        result = drive(method, state, clock=Clock(), folder=folder, reporter=reporter, stop=stop)
    except FisherError as error:
        raise _no_fisher(error) from error
    seconds = {"validating": validated - began, "fisher": computed - validated, "unlearning": result.seconds}
    with stop.at_once():
        work = _work(inputs, result, parts, state)
        _conclude(job, inputs, result, parts, work, seconds, folder=folder, reporter=reporter)


def _read(job: Mapping[str, Any], folder: Path, reporter: Reporter) -> _Inputs:
    base = load_conditional_base(job, folder)
    label = label_of(job["target"], base, "/target")
    scope = job["parameters"].get("scope") or "all"
    parameters = parameters_of(job, lambda given: parameters_for(base, given))
    trained = trained_by(base, scope)
    reader = reader_of(job, folder, base)
    replacement = _replacement(job, base, label)
    check_losses(base, job["seed"])
    assets = AssetFolder(job, folder, reporter)
    own = own_samples(base, assets, reporter, job["seed"], _captioned(job, base, reader))
    asked = asked_of(job, folder, reader, base, own, label=label, replacement=replacement, reporter=reporter)
    replay = replay_of(job, base, own, [one for one in base.labels if one != label])
    return _Inputs(
        base=base,
        own=own,
        assets=assets,
        label=label,
        parameters=parameters,
        scope=scope,
        trained=trained,
        asked=asked,
        surrogate=_surrogate(job, base, own, replay, reader, replacement),
        replacement=_in_words(job, base, replacement),
        replay=replay,
        fitting=reader.fitting(),
    )


def _replacement(job: Mapping[str, Any], base: ConditionalBase, label: int) -> int | None:
    """The label that the forgotten one is to show instead, where there is one."""
    asked = job["replace_with"]
    if asked.get("class_label") is None and asked.get("concept") is None:
        return None
    other = label_of(asked, base, "/replace_with")
    if other == label:
        raise UserError(
            "invalid-request",
            "The request cannot be met as it stands",
            f"“{base.conditions.names[label]}” is to be replaced with itself; name another, images, or noise.",
            pointer=f"/replace_with/{'concept' if asked.get('concept') else 'class_label'}",
        )
    return other


def _in_words(job: Mapping[str, Any], base: ConditionalBase, replacement: int | None) -> str:
    """What the condition is to show instead."""
    asked = job["replace_with"]
    if replacement is not None:
        name = base.conditions.names[replacement]
        return f"what “{name}” shows" if asked.get("concept") else f"what class {name} shows"
    if asked.get("others"):
        return "what the others show, evenly"
    return "images of the caller's" if asked.get("images") else "uniform noise"


def _captioned(job: Mapping[str, Any], base: ConditionalBase, reader: Reader) -> dict[int, Tensor]:
    """The caller's images of what is remembered, by label."""
    sets = job["inputs"].get("remember_sets") or {}
    return {
        label_of({"concept": name}, base, "/remember/sets"): reader.read(
            paths, "remember", pointer=f"/remember/sets/{name}"
        ).pixels
        for name, paths in sets.items()
    }


def _surrogate(
    job: Mapping[str, Any],
    base: ConditionalBase,
    own: OwnSamples,
    replay: Examples,
    reader: Reader,
    replacement: int | None,
) -> Surrogate:
    asked = job["replace_with"]
    if replacement is not None:
        return Pool(own.examples([replacement], surrogates_of(base), "surrogate").x)
    if asked.get("images"):
        seed = derive_seed(job["seed"], "surrogate")
        return Pool(base.encoded(reader.read(job["inputs"]["surrogate"], "surrogate").pixels, seed))
    return Pool(replay.x) if asked.get("others") else base.noise()


def _fisher(inputs: _Inputs, parts: Parts) -> Fisher:
    """Over what stays; as the paper has it, over all."""
    labels = list(inputs.base.labels) if inputs.parameters.mode == "paper" else inputs.others
    try:
        return parts.over(labels, inputs.trained)
    except FisherError as error:
        raise _no_fisher(error) from error


def _no_fisher(error: FisherError) -> UserError:
    return UserError("checkpoint-refused", "The checkpoint cannot be used", str(error), pointer="/checkpoint")


def _method(inputs: _Inputs, fisher: Fisher, seed: int) -> Method[AmnesiaResult]:
    def forget(state: State | None, callback: Callback) -> AmnesiaResult:
        return unlearning.forget_conditions(
            inputs.base.model,
            inputs.base.conditions.trained(inputs.label),
            surrogate=inputs.surrogate,
            replay=inputs.replay,
            fisher=fisher,
            parameters=inputs.parameters,
            criterion=criterion_of(inputs.asked, inputs.base),
            seed=seed,
            state=state,
            callback=callback,
            micro_batch=inputs.base.micro_batch,
        )

    return forget


def _work(inputs: _Inputs, result: AmnesiaResult, parts: Parts, state: State | None) -> Work:
    names = ("step", *LOSSES)
    asked, defaults = inputs.asked, parameters_for(inputs.base, {"mode": inputs.parameters.mode})
    digests = {"replay": inputs.replay.digest(), "surrogate": inputs.surrogate.digest(), **parts.digests()}
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
    parts: Parts,
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
    changed = base.conditions.sampler(cast(ConditionalModel, result.model))
    tamed_sha256 = save_tamed(result.model, work, job, base, folder)
    evaluation = evaluate_amnesia(
        base.sampler,
        changed,
        asked.judge,
        label=inputs.label,
        shows=asked.shows,
        names=base.conditions.names if isinstance(base.conditions, Concepts) else None,
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
    grid = _grid(base, changed, inputs, job)
    html = render_html(report, sample_grid_png=grid)
    artifacts = write_artifacts(folder, report_json=report.to_json(), report_html=html, grid=grid)
    summary = {
        "verdict": report.verdict.sentence,
        "kind": "amnesia",
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "confirmed_by_the_method": result.met,
        "rollbacks": result.rollbacks,
        "fisher_parts_computed": parts.computed,
        "drift": finite(result.drift),
        **evaluation.summary(),
        "outcome": report.verdict.outcome,
    }
    reporter.result(report.verdict.outcome, artifacts, summary)


def _grid(base: ConditionalBase, changed: LabelledSampler, inputs: _Inputs, job: Mapping[str, Any]) -> bytes | None:
    """Samples of both models from equal latents, only when the job asked."""
    if not job["evaluation"].get("sample_grid"):
        return None
    labels = torch.cat([labels_in_turn([inputs.label], GRID_FORGOTTEN), labels_in_turn(inputs.others, GRID_OTHERS)])
    seed = derive_seed(job["seed"], "grid")
    return picture_of([samples_of(model, labels, seed=seed) for model in (base.sampler, changed)])
