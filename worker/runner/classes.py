"""Methods ``class-removal`` and ``class-taming``: a class of a flow with classes goes at the prior, or in the weights.

At the prior, and for a distribution over the flow's own classes, the change is a closed form: exact and at once. It is
access removal, and the report says so, beside what a few images of the class bring back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

import unlearning
from evidence.likelihood import derive_seed
from evidence.report import Criterion
from evidence.steering_records import FractionBounds, RelearnProbe, SteeringEvaluation
from models.class_prior import ClassPriorFlow
from models.protocol import CheckpointedFlow
from unlearning import Callback, State, TamingParameters
from unlearning.classes import (
    CLASS_TAMING,
    TamedClass,
    relearn_probe,
    remove_class,
    set_class_distribution,
    tame_class,
)
from worker.runner.artifacts import Work
from worker.runner.base import Base, check_likelihoods, load_base, parameters_of
from worker.runner.class_bounds import check_affordable, gone
from worker.runner.contract import Reporter, Stop
from worker.runner.own_classes import OwnClasses
from worker.runner.problems import UserError
from worker.runner.samples import Asked, Change, conclude, samples_around
from worker.runner.sets import Remember, reader_of, remember_of
from worker.runner.steps import Clock, drive, earlier_state

__all__ = ["run"]

FORGET_SAMPLES = 128
"""Samples of the class that stand in for images of it."""
PROBE_IMAGES = 5
HELD_OUT_OF = 20
"""Images of the class from which on those of the probe of relearning are held out from taming."""
PROBE_SAMPLES = 300

T = TypeVar("T")


def run(job: dict[str, Any], folder: Path, reporter: Reporter, stop: Stop) -> None:
    """Change how often the flow draws its classes, judge fresh samples, and report a result.

    Raises:
        UserError: the job cannot be done as asked.
        Interrupted: SIGTERM; the newest state has been reported.
    """
    began = time.monotonic()
    with stop.at_once():
        base = load_base(job, folder)
        pointer = "/attribute" if job["kind"] == "debias" else "/target/class_label"
        own = OwnClasses.of(base, job["seed"], reporter, pointer=pointer)
        if job["kind"] != "debias":
            check_affordable(own, int(job["target"]["class_label"]))
        check_likelihoods(base, own.drawn(next(iter(own.shares)), 8, "likelihoods"), job["seed"])
    if job["method"] == "class-taming":
        change, asked = _tame(job, folder, own, reporter, stop, began)
    else:
        with stop.at_once():
            change, asked = _distribute(job, own) if job["kind"] == "debias" else _remove(job, own)
            change.seconds["validating"] = time.monotonic() - began
    with stop.at_once():
        conclude(job, base, change, asked, folder=folder, reporter=reporter)


def _remove(job: Mapping[str, Any], own: OwnClasses) -> tuple[Change, Asked]:
    """The class's prior is taken away: access removal."""
    label = int(job["target"]["class_label"])
    edit = _asked_for("/target/class_label", lambda: remove_class(own.flow, label))
    work = Work(engine="closed form", parameters={"class_label": label, "where": "prior"}, defaults={})
    asked, examples = gone(own, label), _drawn_examples(own, label)
    notes = [edit.statement, *_probe_notes(own, examples)]
    relearn = _relearn(edit.flow, own, label, examples.images)
    return Change(edit.flow, work, kind=edit.kind, notes=notes, relearn=relearn), asked


def _distribute(job: Mapping[str, Any], own: OwnClasses) -> tuple[Change, Asked]:
    """The classes' weights are set: exact. Fresh samples are counted by the class that each was drawn of."""
    pointer, target = "/target_distribution", job["target_distribution"]
    unknown = sorted(set(target) - set(own.judge.classes))
    if unknown:
        detail = f"The flow has no class {', '.join(unknown)}; it has {', '.join(own.judge.classes)}."
        raise UserError("invalid-request", "The request cannot be met as it stands", detail, pointer=pointer)
    shares = {int(name): float(share) for name, share in target.items()}
    edit = _asked_for(pointer, lambda: set_class_distribution(own.flow, shares))
    tolerance, confidence = float(job["tolerance"]), float(job["confidence"])
    asked = FractionBounds.distribution(own.judge, target, tolerance, by_label=True)
    note = (
        f"The weights are those asked for, exactly, and the class of a sample is known: the one that the flow drew it "
        f"of. Those were counted, as “drawn {own.judge.name}”. What the base flow's own classification reads in the "
        f"same samples stands beside them as “{own.judge.name}”, its misreadings included, and decides nothing."
    )
    work = Work(engine="closed form", parameters={"target_distribution": dict(target)}, defaults={})
    exact = {f"weight/{label}": share for label, share in shares.items()}
    change = Change(edit.flow, work, kind="debias", notes=[edit.statement], summary=exact)
    return change, Asked([asked], samples_around(shares.values(), tolerance, confidence), confidence, note)


@dataclass(frozen=True)
class _Examples:
    """Images of the class that the probe of relearning fits a prior to, uint8 (n, c, h, w); no step has seen them."""

    images: Tensor
    source: str
    """What they are, for the report."""


@dataclass(frozen=True)
class _Sets:
    """What class taming reads, as the model takes it."""

    forget: Tensor
    probe: _Examples
    remember: Remember
    held_out: Tensor | None
    fitting: str
    note: str


def _tame(
    job: dict[str, Any], folder: Path, own: OwnClasses, reporter: Reporter, stop: Stop, began: float
) -> tuple[Change, Asked]:
    """The weights are changed, in steps that can be interrupted and resumed: unlearning."""
    base, label = own.base, int(job["target"]["class_label"])
    with stop.at_once():
        parameters = parameters_of(job, _parameters).resolved()
        others = _asked_for("/target/class_label", lambda: remove_class(own.flow, label)).flow
        without = replace(base, checkpointed=cast(CheckpointedFlow, others))
        sets = _read_sets(job, folder, own, label, without, parameters)
        asked = gone(own, label)
        state = earlier_state(job, folder)

    def method(state: State | None, callback: Callback) -> TamedClass:
        return tame_class(
            own.flow,
            label,
            sets.forget,
            sets.remember.images,
            parameters,
            n_bits=base.n_bits,
            seed=job["seed"],
            state=state,
            callback=callback,
            micro_batch=base.micro_batch,
        )

    validated = time.monotonic()
    reporter.phase("unlearning")
    clock = Clock("z_min", parameters.delta * (1 - parameters.tolerance))
    tamed = drive(method, state, clock=clock, folder=folder, reporter=reporter, stop=stop)
    taming, used = tamed.taming, tamed.taming.parameters
    work = Work(
        engine=used.engine,
        parameters=used.to_dict(),
        defaults=TamingParameters(engine=used.engine).to_dict(),
        steps=taming.steps,
        history=taming.history,
        resumed_from=None if state is None else int(state.meta["step"]),
        digests={"remember_set": sets.remember.digest()},
    )
    change = Change(
        tamed.flow,
        work,
        kind=tamed.kind,
        seconds={"validating": validated - began, "unlearning": taming.seconds},
        notes=[tamed.statement, sets.note, *_probe_notes(own, sets.probe)],
        criteria=[_unlikely(tamed, parameters)],
        remember=sets.remember.without(taming.removed_near_duplicates),
        held_out=sets.held_out,
        relearn=_relearn(tamed.flow, own, label, sets.probe.images),
        facts={"near_duplicates_removed": len(taming.removed_near_duplicates), "image_fitting": sets.fitting},
        summary={"smallest_z": min(taming.z), "round_trip": tamed.round_trip},
    )
    return change, asked


def _parameters(given: dict[str, Any]) -> TamingParameters:
    defaults = {} if given.get("engine") == "paper" else CLASS_TAMING
    return TamingParameters.from_dict({**defaults, **given})


def _read_sets(
    job: Mapping[str, Any], folder: Path, own: OwnClasses, label: int, others: Base, parameters: TamingParameters
) -> _Sets:
    """The sets of the job; samples of the class, and of the others alone, stand in for what was not sent."""
    reader = reader_of(job, folder, own.base)
    given = job["inputs"]["forget"]
    if given:
        every = reader.read(given, "target").without_copies().pixels
        forget, probe = _held_out(own, label, every)
        note = f"The class was forgotten by {len(forget)} images of it that the requester supplied."
    else:
        every = forget = own.drawn(label, FORGET_SAMPLES, "forget")
        probe = _drawn_examples(own, label)
        note = (
            f"No images of the class were supplied: {len(forget)} samples of it, by the base flow, stood in for them."
        )
    rms = parameters.near_duplicate_rms
    # What is held out from taming is to be forgotten all the same: nothing like it is kept.
    remember = remember_of(job, reader, others, forget=every, near_duplicate_rms=rms)
    held_out = reader.read_or_none((job["inputs"].get("evaluation") or {}).get("held_out"), "held_out")
    return _Sets(forget, probe, remember, held_out, reader.fitting(), note)


def _held_out(own: OwnClasses, label: int, given: Tensor) -> tuple[Tensor, _Examples]:
    """The requester's images to forget, and those of the probe: some of theirs, if enough are left without them."""
    if len(given) < HELD_OUT_OF or not isinstance(own.flow, ClassPriorFlow):
        return given, _drawn_examples(own, label)
    generator = torch.Generator().manual_seed(derive_seed(own.seed, "held out"))
    held = torch.randperm(len(given), generator=generator)[:PROBE_IMAGES]
    kept = torch.ones(len(given), dtype=torch.bool)
    kept[held] = False
    source = f"{PROBE_IMAGES} of the {len(given)} images that the requester supplied, held out from taming"
    return given[kept], _Examples(given[held], source)


def _drawn_examples(own: OwnClasses, label: int) -> _Examples:
    source = f"{PROBE_IMAGES} samples of the class by the base flow, drawn for this alone"
    return _Examples(own.drawn(label, PROBE_IMAGES, "probe"), source)


def _probe_notes(own: OwnClasses, examples: _Examples) -> list[str]:
    """Where the probe's images come from; nothing where there is no prior to fit."""
    if not isinstance(own.flow, ClassPriorFlow):
        return []
    return [f"The probe of relearning fitted a prior to {examples.source}."]


def _relearn(
    flow: nn.Module, own: OwnClasses, label: int, examples: Tensor
) -> Callable[[SteeringEvaluation], RelearnProbe] | None:
    """How often the class comes back once a prior is fitted to a few images of it; None where there is no prior."""
    if not isinstance(flow, ClassPriorFlow):
        return None

    def probe(evaluation: SteeringEvaluation) -> RelearnProbe:
        found = relearn_probe(
            flow,
            label,
            examples,
            own.judge,
            n_bits=own.base.n_bits,
            seed=derive_seed(own.seed, "relearn"),
            n_samples=PROBE_SAMPLES,
        )
        before = evaluation.judges[0].changes[label].after.value
        return RelearnProbe(own.judge.classes[label], 0, found.examples, before, found.rate)

    return probe


def _unlikely(tamed: TamedClass, parameters: TamingParameters) -> Criterion:
    return Criterion(
        name="images_of_the_class_unlikely",
        statement="Every image of the class lies as many sigma_R above mu_R as was asked for, on fresh noise.",
        threshold=parameters.delta * (1 - parameters.tolerance),
        value=min(tamed.taming.z),
        met=tamed.taming.met,
    )


def _asked_for(pointer: str, edit: Callable[[], T]) -> T:
    """A closed form's result; what it refuses is a problem at that place of the request."""
    try:
        return edit()
    except unlearning.UnlearningError as error:
        title = "The request cannot be met as it stands"
        raise UserError("invalid-request", title, str(error), pointer=pointer) from error
