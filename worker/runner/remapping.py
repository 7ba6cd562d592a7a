"""What jobs of Selective Amnesia do alike, whatever a condition comes to show: read, remember, remap, judge, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from evidence.amnesia_evaluation import Progress, labels_in_turn, samples_of
from evidence.likelihood import derive_seed
from evidence.pictures import picture_of
from evidence.records import finite
from evidence.rendering import render_html
from evidence.report import RunFacts
from evidence.schema import Document
from models.conditional import ConditionalModel, LabelledSampler
from unlearning import (
    AmnesiaParameters,
    AmnesiaResult,
    Callback,
    Criterion,
    Examples,
    Fisher,
    FisherError,
    State,
    Surrogate,
)
from unlearning.memory import MemoryPlan
from worker.runner.amnesia_inputs import label_of, parameters_for, replay_of, trained_by
from worker.runner.artifacts import Work, run_facts, save_tamed, write_artifacts
from worker.runner.assets import AssetFolder
from worker.runner.base import parameters_of
from worker.runner.conditional_base import ConditionalBase, check_losses, load_conditional_base
from worker.runner.contract import Reporter, Stop
from worker.runner.crew import Training, processes_of, train
from worker.runner.fisher import Parts, fisher_of_parts
from worker.runner.images import Reader
from worker.runner.memory import fit_training
from worker.runner.own_samples import OwnSamples, own_samples
from worker.runner.problems import UserError, escaped
from worker.runner.sets import reader_of
from worker.runner.steps import Clock, Method, batches_reported, drive, earlier_state

__all__ = ["Changed", "Opened", "Remapping", "remap"]

GRID_CHANGED = 6
GRID_OTHERS = 6


@dataclass(frozen=True)
class Opened:
    """What every such job reads, before it looks at what the condition is to show."""

    job: Mapping[str, Any]
    folder: Path
    reporter: Reporter
    base: ConditionalBase
    label: int
    """Of the condition that is to change."""
    parameters: AmnesiaParameters
    scope: str
    trained: tuple[str, ...]
    """Names of the parameters of the scope."""
    reader: Reader
    sent: Mapping[int, Tensor]
    """The caller's images of what is remembered, by label: uint8 (n, c, h, w)."""
    assets: AssetFolder
    own: OwnSamples

    @property
    def seed(self) -> int:
        """Of all that the job draws."""
        return int(self.job["seed"])

    @property
    def others(self) -> list[int]:
        """The labels that stay."""
        return [one for one in self.base.labels if one != self.label]

    @cached_property
    def replay(self) -> Examples:
        """What stays, as the method replays it; drawn once something asks for it, which may take long."""
        return replay_of(self.job, self.base, self.own, self.others)


@dataclass(frozen=True)
class Changed:
    """The changed model, as it is handed over to be judged."""

    sampler: LabelledSampler
    result: AmnesiaResult
    on_progress: Progress
    facts: Callable[[], RunFacts]
    """Of the run; asked for once samples have been judged, so that it knows how long that took."""


class Remapping(Protocol):
    """What a condition is to show, and who says whether it does."""

    @property
    def kind(self) -> str:
        """As the summary calls it."""
        ...

    @property
    def surrogate(self) -> Surrogate:
        """What the condition learns from."""
        ...

    @property
    def criterion(self) -> Criterion:
        """What ends the run."""
        ...

    @property
    def digests(self) -> Mapping[str, str]:
        """Of what the job was given beside its checkpoint."""
        ...

    @property
    def losses(self) -> tuple[str, ...]:
        """Columns of the history that the report shows as losses; shares have curves of their own."""
        ...

    def judged(self, changed: Changed) -> tuple[Document, Mapping[str, Any]]:
        """The report on fresh samples, and the figures of its evaluation for the summary."""
        ...


def remap(
    job: Mapping[str, Any],
    folder: Path,
    reporter: Reporter,
    stop: Stop,
    *,
    named: str,
    planned: Callable[[Opened], Remapping],
) -> None:
    """Try the base, compute what is missing of its Fisher information, remap, judge fresh samples, report a result.

    Args:
        job: what is asked.
        folder: the job's.
        reporter: told of phases, steps and the result.
        stop: looked at after every step.
        named: the member of the job that names the condition.
        planned: looks at the rest of the job.

    Raises:
        UserError: the job cannot be done as asked, or not from this base.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    with stop.at_once():
        opened = _opened(job, folder, reporter, stop, named)
        remapping = planned(opened)
        replay = opened.replay  # drawn now, so that its time counts as that of reading
        passes = fit_training(opened.base, opened.trained, opened.parameters, replay, processes=processes_of(job))
        state = earlier_state(dict(job), folder)
        validated = time.monotonic()
        published = opened.parameters.mode == "paper"
        wanted = list(opened.base.labels) if published else opened.others
        parts = fisher_of_parts(
            opened.base, opened.own, wanted, opened.assets, reporter, trained=opened.trained, published=published
        )
        fisher, information = _fisher(parts, wanted, opened.trained), parts.digests()
        parts.of.clear()  # each as large as the weights
    computed = time.monotonic()
    reporter.phase("unlearning")
    method = _method(opened, remapping, fisher, passes)
    try:
        result = drive(method, state, clock=Clock(), folder=folder, reporter=reporter, stop=stop)
    except FisherError as error:
        raise _no_fisher(error) from error
    seconds = {"validating": validated - began, "fisher": computed - validated, "unlearning": result.seconds}
    with stop.at_once():
        work = _work(opened, remapping, result, information, state)
        _conclude(opened, remapping, result, parts.computed, work, seconds)


def _opened(job: Mapping[str, Any], folder: Path, reporter: Reporter, stop: Stop, named: str) -> Opened:
    base = load_conditional_base(job, folder)
    label = label_of(job[named], base, f"/{named}")
    scope = job["parameters"].get("scope") or "all"
    parameters = parameters_of(job, lambda given: parameters_for(base, given))
    trained = trained_by(base, scope)
    reader = reader_of(job, folder, base)
    check_losses(base, job["seed"])
    assets = AssetFolder(job, folder, reporter, stop)
    sent = _sent(job, base, reader)
    own = own_samples(base, assets, reporter, job["seed"], sent)
    return Opened(job, folder, reporter, base, label, parameters, scope, trained, reader, sent, assets, own)


def _sent(job: Mapping[str, Any], base: ConditionalBase, reader: Reader) -> dict[int, Tensor]:
    """The caller's images of what is remembered, by label."""
    sets = job["inputs"].get("remember_sets") or {}
    return {
        label_of({"concept": name}, base, "/remember/sets"): reader.read(
            paths, "remember", pointer=f"/remember/sets/{escaped(name)}"
        ).pixels
        for name, paths in sets.items()
    }


def _fisher(parts: Parts, wanted: list[int], trained: tuple[str, ...]) -> Fisher:
    """Over what stays; as the paper has it, over all."""
    try:
        return parts.over(wanted, trained)
    except FisherError as error:
        raise _no_fisher(error) from error


def _no_fisher(error: FisherError) -> UserError:
    return UserError("checkpoint-refused", "The checkpoint cannot be used", str(error), pointer="/checkpoint")


def _method(opened: Opened, remapping: Remapping, fisher: Fisher, passes: MemoryPlan) -> Method[AmnesiaResult]:
    def forget(state: State | None, callback: Callback) -> AmnesiaResult:
        training = Training(
            conditions=opened.base.conditions.trained(opened.label),
            surrogate=remapping.surrogate,
            replay=opened.replay,
            fisher=fisher,
            parameters=opened.parameters,
            seed=opened.seed,
            micro_batch=passes.micro_batch,
            recompute=passes.recompute,
            state=state,
        )
        return train(
            training,
            opened.base.model,
            job=opened.job,
            folder=opened.folder,
            criterion=remapping.criterion,
            callback=callback,
        )

    return forget


def _work(
    opened: Opened, remapping: Remapping, result: AmnesiaResult, information: Mapping[str, str], state: State | None
) -> Work:
    names = ("step", *remapping.losses)
    defaults = parameters_for(opened.base, {"mode": opened.parameters.mode})
    digests = {"replay": opened.replay.digest(), "surrogate": remapping.surrogate.digest()}
    return Work(
        engine=f"{opened.parameters.mode} mode",
        parameters={**result.parameters.to_dict(), "scope": opened.scope},
        defaults={**defaults.to_dict(), "scope": "all"},
        steps=result.steps,
        history=[{name: row[name] for name in names if name in row} for row in result.history],
        resumed_from=None if state is None else int(state.meta["step"]),
        digests={**digests, **information, **remapping.digests},
    )


def _conclude(
    opened: Opened,
    remapping: Remapping,
    result: AmnesiaResult,
    computed: int,
    work: Work,
    seconds: dict[str, float],
) -> None:
    """Save the changed model, judge fresh samples of both, write the report, and report the result."""
    began = time.monotonic()
    reporter, base, job = opened.reporter, opened.base, opened.job
    reporter.phase("evaluating")
    changed = base.conditions.sampler(cast(ConditionalModel, result.model))
    with base.drawing_as_stored(result.model):
        tamed_sha256 = save_tamed(result.model, work, job, base, opened.folder)

    def facts() -> RunFacts:
        took = {**seconds, "evaluating": time.monotonic() - began}
        fitting = opened.reader.fitting()
        return run_facts(job, base, work, tamed_sha256=tamed_sha256, seconds=took, image_fitting=fitting)

    report, figures = remapping.judged(Changed(changed, result, batches_reported(reporter), facts))
    grid = _grid(opened, changed)
    html = render_html(report, sample_grid_png=grid)
    artifacts = write_artifacts(opened.folder, report_json=report.to_json(), report_html=html, grid=grid)
    summary = {
        "verdict": report.verdict.sentence,
        "kind": remapping.kind,
        "steps": result.steps,
        "seconds": round(result.seconds, 3),
        "confirmed_by_the_method": result.met,
        "rollbacks": result.rollbacks,
        "fisher_parts_computed": computed,
        "drift": finite(result.drift),
        **figures,
        "outcome": report.verdict.outcome,
    }
    reporter.result(report.verdict.outcome, artifacts, summary)


def _grid(opened: Opened, changed: LabelledSampler) -> bytes | None:
    """Samples of both models from equal latents, only when the job asked."""
    if not opened.job["evaluation"].get("sample_grid"):
        return None
    labels = torch.cat([labels_in_turn([opened.label], GRID_CHANGED), labels_in_turn(opened.others, GRID_OTHERS)])
    seed = derive_seed(opened.seed, "grid")
    return picture_of([samples_of(model, labels, seed=seed) for model in (opened.base.sampler, changed)])
