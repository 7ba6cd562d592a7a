"""The Fisher information of a checkpoint, class by class: computed by the first job on it, read by all others.

F of a class depends on the weights and on nothing of the request: its examples and draws have a seed of their own. It
is an asset of the checkpoint, a file whose name is a digest of all that it depends on. A job averages those of the
classes that it is to remember, so whichever class a later request names, nothing is left to compute.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

import unlearning
from evidence.likelihood import derive_seed
from models.conditional import ConditionalModel, StratifiedConditional
from unlearning import Fisher, FisherError, Step
from worker.runner.conditional_base import ConditionalBase
from worker.runner.contract import Reporter
from worker.runner.problems import UserError

__all__ = ["Assets", "fisher_of_classes"]

VERSION = 1
"""Of what F is computed from: raised whenever examples or draws change."""
ALL_EXAMPLES = 5000
"""Over all classes, as many as the paper takes of its larger models (App. B); 50,000 say the same of its VAE."""
MOST_EXAMPLES = 500
FEWEST_EXAMPLES = 20
TIMESTEPS = 50
"""Draws an example, of a model that spreads them: a hundred rank weights as a thousand do, and fifty nearly so."""
MOST_BYTES = 4 * 2**30
"""Of all classes together, in memory; the supervisor fetches twice as much of a checkpoint's assets."""
FOLDER = "assets"


@dataclass(frozen=True)
class Assets:
    """The Fisher information of every class, and where it came from."""

    of_class: Mapping[int, Fisher]
    computed: int
    """Classes that no file was given for."""

    def over(self, labels: Sequence[int], parameters: Sequence[str]) -> Fisher:
        """The average over some classes, of some parameters."""
        whole = unlearning.average_fisher([self.of_class[label] for label in labels])
        return replace(whole, tensors={name: whole.tensors[name] for name in parameters})


@dataclass(frozen=True)
class _Plan:
    """How F of one class is computed."""

    label: int
    examples: int
    draws: int
    seed: int
    weights: str

    @property
    def name(self) -> str:
        """Of the asset: a digest of all that F depends on."""
        facts = [VERSION, self.weights, self.label, self.examples, self.draws, self.seed]
        return f"fisher-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:40]}"

    def fits(self, fisher: Fisher, shapes: Mapping[str, torch.Size]) -> bool:
        """Whether a file's facts and values are what this plan gives; its weights were checked as it was read."""
        facts = (fisher.examples, fisher.draws, fisher.seed, fisher.reduction, fisher.precision)
        return facts == (self.examples, self.draws, self.seed, "sum", "float32") and all(
            value.shape == shapes[name] and bool((value.isfinite() & (value >= 0)).all())
            for name, value in fisher.tensors.items()
        )


def fisher_of_classes(job: Mapping[str, Any], folder: Path, base: ConditionalBase, reporter: Reporter) -> Assets:
    """Read what was given of this checkpoint, compute the rest, and announce that.

    A phase begins only if there is something to compute. A class is done at once and quickly: whoever stops the run
    loses the one that is being computed.

    Raises:
        UserError: the model's loss or its gradient is not finite.
    """
    _check_size(base)
    plans = [_plan(base, label) for label in range(base.model.n_classes)]
    given = job["inputs"].get("fisher") or {}
    found: dict[int, Fisher] = {}
    for plan in plans:
        if plan.name in given and (fisher := _read(folder / given[plan.name], plan, base)) is not None:
            found[plan.label] = fisher
    missing = [plan for plan in plans if plan.label not in found]
    if missing:
        reporter.phase("fisher")
    progress = _Progress(reporter, sum(plan.examples for plan in missing))
    for plan in missing:
        found[plan.label] = _computed(plan, base, progress)
        path = folder / FOLDER / f"{plan.name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        unlearning.save_fisher(found[plan.label], path)
        reporter.asset(path, folder, name=plan.name)
    return Assets(found, len(missing))


def _check_size(base: ConditionalBase) -> None:
    """Every class has as many values as the model has weights, and all are held at once."""
    parameters = dict(cast(nn.Module, base.model).named_parameters())
    needed = 4 * base.model.n_classes * sum(parameters[name].numel() for name in _parameters(base))
    if needed > MOST_BYTES:
        raise UserError(
            "checkpoint-refused",
            "The checkpoint cannot be used",
            f"The Fisher information of its {base.model.n_classes:,} classes takes {needed / 2**30:.1f} GiB; the most "
            f"is {MOST_BYTES / 2**30:g} GiB. Use a smaller model, or one of fewer classes.",
            pointer="/checkpoint",
        )


def _plan(base: ConditionalBase, label: int) -> _Plan:
    examples = min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, ALL_EXAMPLES // base.model.n_classes))
    draws = TIMESTEPS if isinstance(base.model, StratifiedConditional) else 1
    return _Plan(label, examples, draws, derive_seed(0, "fisher", label), base.weights)


def _read(path: Path, plan: _Plan, base: ConditionalBase) -> Fisher | None:
    """The file's, where it is of these weights and this class; one that is not costs its computation, not the job."""
    try:
        fisher = unlearning.load_fisher(path, weights=base.weights, names=_parameters(base))
    except FisherError as error:
        _left_out(plan, str(error))
        return None
    shapes = {name: value.shape for name, value in cast(nn.Module, base.model).named_parameters()}
    if not plan.fits(fisher, shapes):
        _left_out(plan, "it is of other examples or draws, or its values are none")
        return None
    return fisher


def _left_out(plan: _Plan, why: str) -> None:
    sys.stderr.write(f"the Fisher information of class {plan.label} is computed anew: {why}\n")


def _computed(plan: _Plan, base: ConditionalBase, progress: _Progress) -> Fisher:
    own = base.drawn(torch.full((plan.examples,), plan.label, dtype=torch.int64), plan.seed)
    try:
        fisher = unlearning.fisher_information(
            cast(ConditionalModel, base.model),
            own.x,
            own.condition,
            names=_parameters(base),
            seed=plan.seed,
            draws_per_example=plan.draws,
            micro_batch=base.micro_batch,
            callback=progress,
        )
    except (unlearning.DivergedError, unlearning.InputError) as error:
        title = "The checkpoint cannot be used"
        raise UserError("checkpoint-refused", title, str(error), pointer="/checkpoint") from error
    progress.done += plan.examples
    return fisher


def _parameters(base: ConditionalBase) -> list[str]:
    """All that can be trained, so that a file serves any scope."""
    return list(base.model.scopes()["all"])


class _Progress:
    """Examples done over all classes that are computed."""

    def __init__(self, reporter: Reporter, total: int) -> None:
        self._reporter, self._total, self._began = reporter, total, time.monotonic()
        self.done = 0

    def __call__(self, step: Step) -> None:
        """After every batch of a class."""
        done = self.done + step.step
        left = (time.monotonic() - self._began) * (self._total - done) / max(1, done)
        self._reporter.progress(step=done, total=self._total, eta_seconds=left, losses=step.losses)
