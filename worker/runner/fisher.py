"""The Fisher information of a checkpoint, part by part: computed by the first job on it, read by all others.

F of a part depends on the weights and on nothing of the request but what the part stands for: its examples and draws
have seeds of their own. It is an asset of the checkpoint. A job averages the parts that it is to remember, so whichever
condition a later request names, nothing is left to compute. A part is a label, as long as F of every label fits into
memory; beyond, several labels share one. How far the one that is being computed has come is left to the next attempt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import nn

import unlearning
from evidence.likelihood import derive_seed
from models.checkpoints import tensor_digest
from models.conditional import GuidedConditional, PromptConditional, StratifiedConditional
from unlearning import Fisher, FisherError, State, StateError, Step
from unlearning.memory import MemoryPlan
from worker.runner.assets import AssetFolder
from worker.runner.conditional_base import ConditionalBase
from worker.runner.contract import Interrupted, Reporter
from worker.runner.fisher_precision import in_bfloat16
from worker.runner.memory import fit_fisher
from worker.runner.own_samples import OwnSamples
from worker.runner.pace import Pace
from worker.runner.problems import UserError
from worker.runner.steps import say

__all__ = ["Parts", "fisher_of_parts"]

KIND = "fisher"
VERSION = 3
"""Of what F is computed from: raised whenever examples or draws change."""
ALL_EXAMPLES = 5000
"""Over all classes, as many as the paper takes of its larger models (App. B); 50,000 say the same of its VAE."""
MOST_EXAMPLES = 500
FEWEST_EXAMPLES = 20
SLOW_EXAMPLES = 50
"""Of a label, where each takes many timesteps."""
POOLED_EXAMPLES = 500
"""Of all that is remembered, where labels share parts."""
TIMESTEPS = 20
"""Of an example, spread: more examples tell more than more timesteps of each."""
PUBLISHED_TIMESTEPS = 100
MOST_PARTS = 20
"""Beyond which labels share parts, of a model whose examples take long."""
MOST_BYTES = 4 * 2**30
"""Of all parts together, in memory; the supervisor fetches up to twice as much of what is finished, samples included,
and beside it how far a part is (`worker.assets`)."""


@dataclass(frozen=True)
class Parts:
    """The Fisher information of every part, and where it came from."""

    of: dict[tuple[int, ...], Fisher]
    """By the labels of a part."""
    computed: int
    """Parts that no file was given for."""

    def over(self, labels: Sequence[int], parameters: Sequence[str]) -> Fisher:
        """The average over the parts that these labels make up, of some parameters."""
        found = [fisher for part, fisher in self.of.items() if set(part) <= set(labels)]
        whole = unlearning.average_fisher(found) if len(found) > 1 else found[0]
        return replace(whole, tensors={name: whole.tensors[name] for name in parameters})

    def digests(self) -> dict[str, str]:
        """Of every part, by its labels."""
        named = {part: f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in self.of}
        return {f"fisher/{named[part]}": tensor_digest(fisher.tensors) for part, fisher in self.of.items()}


@dataclass(frozen=True)
class _Plan:
    """How F of one part is computed."""

    labels: tuple[int, ...]
    names: tuple[str, ...]
    """Of the parameters."""
    examples: int
    draws: int
    reduction: str
    precision: str
    seed: int
    name: str
    """Of the asset."""

    def check(self, fisher: Fisher, shapes: Mapping[str, torch.Size]) -> Fisher:
        """What was read, if its facts and values are what this plan gives; its weights were checked as it was read."""
        facts = (fisher.examples, fisher.draws, fisher.seed, fisher.reduction, fisher.precision)
        if facts != (self.examples, self.draws, self.seed, self.reduction, self.precision) or not all(
            value.shape == shapes[name] and bool((value.isfinite() & (value >= 0)).all())
            for name, value in fisher.tensors.items()
        ):
            raise FisherError("it is of other examples or draws, or its values are none")
        return fisher


def fisher_of_parts(
    base: ConditionalBase,
    own: OwnSamples,
    wanted: Sequence[int],
    assets: AssetFolder,
    reporter: Reporter,
    *,
    trained: Sequence[str] = (),
    published: bool = False,
) -> Parts:
    """Read what was given of this checkpoint, compute the rest, and announce that.

    A phase begins only if there is something to compute. Whoever stops the run loses what was computed since the newest
    state of a part: nothing at SIGTERM, and a minute otherwise.

    Args:
        base: the model.
        own: its samples.
        wanted: labels that F is to be over.
        assets: of the checkpoint, and of the job.
        reporter: told of phase and progress.
        trained: names of the parameters that the job trains; F is of all that can be trained, so that it serves any
            scope, unless that is too large: then of these.
        published: take more timesteps of an example, for a penalty that is in the published units: what F of a sum over
            few terms exceeds its share of all by is their variance, about 15 % at a hundred and half at twenty.

    Raises:
        UserError: the model's loss or its gradient is not finite, or F of it takes too much memory.
        Interrupted: SIGTERM; how far the part is has been announced.
    """
    plans = _plans(base, wanted, _names(base, trained), published)
    shapes = {name: value.shape for name, value in cast(nn.Module, base.model).named_parameters()}

    def load(plan: _Plan, path: Path) -> Fisher:
        return plan.check(unlearning.load_fisher(path, weights=base.weights, names=plan.names), shapes)

    found: dict[tuple[int, ...], Fisher] = {}
    for plan in plans:
        read = assets.found(plan.name, partial(load, plan), FisherError)
        if read is not None:
            found[plan.labels] = read
    missing = [plan for plan in plans if plan.labels not in found]
    examples = [own.drawn(plan.labels, plan.examples, f"fisher {plan.name}") for plan in missing]
    pace = Pace(reporter, sum(plan.examples for plan in missing))
    if missing:
        passes = fit_fisher(base, missing[0].names, examples[0])
        reporter.phase("fisher")
    for plan, these in zip(missing, examples, strict=True):
        with assets.stop.held():
            found[plan.labels] = fisher = _computed(plan, base, these, passes, assets, pace)
            private = bool(set(plan.labels) & set(base.conditions.private))
            assets.keep(plan.name, partial(unlearning.save_fisher, fisher), private=private)
    return Parts({plan.labels: found[plan.labels] for plan in plans}, len(missing))


def _plans(base: ConditionalBase, wanted: Sequence[int], names: tuple[str, ...], published: bool) -> list[_Plan]:
    each = _bytes(base, names)
    slow, count = isinstance(base.model, GuidedConditional), len(base.labels)
    room = MOST_BYTES // each
    if count <= (min(room, MOST_PARTS) if slow else room):
        examples = SLOW_EXAMPLES if slow else min(MOST_EXAMPLES, max(FEWEST_EXAMPLES, ALL_EXAMPLES // count))
        labels = [label for label in base.labels if label in wanted or label not in base.conditions.private]
        return [_plan(base, (label,), names, examples, published) for label in labels]
    if slow:  # one part in any case: whether that fits is found out as any pass is
        parts = _chunks(base, wanted, max(1, min(room, MOST_PARTS)))
        return [_plan(base, part, names, max(POOLED_EXAMPLES // len(parts), len(part)), published) for part in parts]
    raise UserError(
        "checkpoint-refused",
        "The checkpoint cannot be used",
        f"The Fisher information of its {len(base.labels):,} classes takes {each * len(base.labels) / 2**30:.1f} GiB; "
        f"the most is {MOST_BYTES / 2**30:g} GiB. Use a smaller model, or one of fewer classes.",
        pointer="/checkpoint",
    )


def _chunks(base: ConditionalBase, wanted: Sequence[int], most: int) -> list[tuple[int, ...]]:
    """At most so many parts of many labels, the same ones for the next request, as far as that can be.

    What a request adds as a replacement is in none. Classes are cut alike whichever of them is to change, and the part
    that holds it is left out; what a request on prompts remembers is its own.
    """
    kept = [label for label in wanted if label not in base.conditions.added]
    known = kept if isinstance(base.model, PromptConditional) else list(base.labels)
    size = -(-len(known) // most)
    parts = [tuple(known[start : start + size]) for start in range(0, len(known), size)]
    return [part for part in parts if set(part) <= set(kept)] or [tuple(kept)]


def _plan(
    base: ConditionalBase, labels: tuple[int, ...], names: tuple[str, ...], examples: int, published: bool
) -> _Plan:
    draws = 1
    if isinstance(base.model, StratifiedConditional):
        draws = min(base.model.terms, PUBLISHED_TIMESTEPS if published else TIMESTEPS)
    examples = -(-examples // len(labels)) * len(labels)
    sampling = [base.model.sampling.steps, base.model.sampling.guidance_scale] if isinstance(
        base.model, GuidedConditional
    ) else []  # fmt: skip
    rows = [tensor_digest({"condition": base.conditions.stored(label)}) for label in labels]
    facts = [VERSION, base.weights, rows, examples, draws, sampling]
    precision = "bfloat16" if in_bfloat16(base) else "float32"
    facts += [precision] * (precision != "float32") + [names] * (names != _everything(base))
    name = AssetFolder.name(KIND, facts)
    reduction = "mean" if isinstance(base.model, PromptConditional) else "sum"
    return _Plan(labels, names, examples, draws, reduction, precision, derive_seed(0, name), name)


def _computed(
    plan: _Plan, base: ConditionalBase, own: unlearning.Examples, passes: MemoryPlan, assets: AssetFolder, pace: Pace
) -> Fisher:
    """F of a part, from where an earlier attempt left it."""

    def computed(state: State | None) -> Fisher:
        return unlearning.fisher_information(
            base.model,
            own.x[: plan.examples],
            own.condition[: plan.examples],
            names=plan.names,
            seed=plan.seed,
            draws_per_example=plan.draws,
            reduction=plan.reduction,
            micro_batch=passes.micro_batch,
            bfloat16=plan.precision == "bfloat16",
            recompute=passes.recompute,
            state=state,
            callback=_Batches(plan, state, assets, pace),
        )

    try:
        try:
            return computed(assets.unfinished(KIND, plan.name))
        except StateError:
            say("the state belongs to another Fisher information, such as one of an older release, and is left out")
            return computed(None)
    except unlearning.Interrupted as error:
        raise Interrupted from error
    except (unlearning.DivergedError, unlearning.InputError) as error:
        title = "The checkpoint cannot be used"
        raise UserError("checkpoint-refused", title, str(error), pointer="/checkpoint") from error


def _names(base: ConditionalBase, trained: Sequence[str]) -> tuple[str, ...]:
    """All that can be trained, so that a file serves any scope; of a model too large for that, what is trained."""
    everything = _everything(base)
    return tuple(trained) if trained and _bytes(base, everything) > MOST_BYTES else everything


def _everything(base: ConditionalBase) -> tuple[str, ...]:
    return tuple(base.model.scopes()["all"])


def _bytes(base: ConditionalBase, names: Sequence[str]) -> int:
    parameters = dict(cast(nn.Module, base.model).named_parameters())
    return 4 * sum(parameters[name].numel() for name in names)


class _Batches:
    """Called after every batch of a part: reports it, saves how far the part is, and ends it at SIGTERM."""

    def __init__(self, plan: _Plan, state: State | None, assets: AssetFolder, pace: Pace) -> None:
        self._plan, self._state, self._assets, self._pace = plan, state, assets, pace

    def __call__(self, step: Step) -> None:
        """The states that are saved are those of parts that still lack something; a whole one is kept as it is."""
        if self._state is not None:
            self._pace.found(int(self._state.meta["done"]))
            self._state.tensors.clear()  # they have been taken up, and are as large as the weights
            self._state = None
        self._pace.at(step.step, step.losses)
        if step.step == step.total:
            self._pace.through(step.total)
        elif self._assets.stop.requested:
            self._assets.save(KIND, self._plan.name, step.snapshot)
            raise unlearning.Interrupted
        else:
            self._assets.offer(KIND, self._plan.name, step.snapshot)
