"""What jobs of Selective Amnesia read from their request alike, whether they forget a condition or balance it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from models.conditional import GuidedConditional
from unlearning import AmnesiaParameters, Examples
from unlearning.amnesia_parameters import paper_settings
from unlearning.prompts import plain
from worker.runner.conditional_base import ConditionalBase
from worker.runner.conditions import Concepts
from worker.runner.own_samples import OwnSamples
from worker.runner.problems import UserError
from worker.runner.sets import SMALLEST_REMEMBER

__all__ = ["NOT_THE_AMNESIAS", "label_of", "parameters_for", "refused", "replay_of", "surrogates_of", "trained_by"]

NOT_THE_AMNESIAS = ("scope", "guidance_scale", "sampling_steps", "gradient_checkpointing")
"""Parameters of the job that say how the model is trained and drawn from."""
SURROGATES, DEAR_SURROGATES = 1000, 200
"""Samples of a replacement that the forgotten condition learns from; of a model that draws slowly."""
DEAR_BATCH, DEAR_CHECK = 32, 25
"""Examples in a step of a diffusion model, and steps between looks at its samples."""
SHARE_OF_A_WEIGHT = 0.01
"""Adam's rate for a diffusion model, in units of the root mean square of its weights: they differ by orders."""


TINIEST_RATE = 1e-8
"""Of a model whose weights are all zero."""


def label_of(named: Mapping[str, Any], base: ConditionalBase, pointer: str) -> int:
    """The job's label of a condition that the request names.

    Raises:
        UserError: the model has no such class, or takes the other kind of name.
    """
    conditions = base.conditions
    if isinstance(conditions, Concepts):
        own = [plain(name) for name in conditions.names]
        concept = named.get("concept")
        if isinstance(concept, str) and plain(concept) in own:
            return own.index(plain(concept))
        if isinstance(concept, str):  # a job's concepts are all that it names, but for what the first is called too
            raise refused(f"“{concept}” is another name of “{conditions.names[0]}” itself.", f"{pointer}/concept")
        raise refused("The model reads prompts and has no classes; name a concept.", f"{pointer}/class_label")
    label = named.get("class_label")
    if not isinstance(label, int) or isinstance(label, bool) or label not in base.labels:
        raise refused(
            f"The model has no class {label!r}; its labels run from 0 to {len(base.labels) - 1}.",
            f"{pointer}/class_label",
        )
    return label


def parameters_for(base: ConditionalBase, given: Mapping[str, Any]) -> AmnesiaParameters:
    """The method's own parameters, with what suits the family; as many replay examples as others in a step, as in the
    paper, unless told otherwise.
    """
    own = {name: value for name, value in given.items() if name not in NOT_THE_AMNESIAS and value is not None}
    suited: dict[str, Any] = {}
    if own.get("mode") == "paper":
        suited = dict(paper_settings(base.checkpointed.family))
    elif isinstance(base.model, GuidedConditional):
        suited = {"batch": DEAR_BATCH, "replay_batch": DEAR_BATCH, "check_every": DEAR_CHECK}
        suited["learning_rate"] = _rate(base)
    batch = {"replay_batch": own["batch"]} if "batch" in own else {}
    return AmnesiaParameters.from_dict({**suited, **batch, **own})


def _rate(base: ConditionalBase) -> float:
    """A learning rate that suits the size of a model's weights, to two digits."""
    weights = dict(base.module.named_parameters())
    trained = [weights[name].detach() for name in base.model.scopes()["all"]]
    square = sum(float(each.square().sum(dtype=torch.float64)) for each in trained)
    return float(f"{SHARE_OF_A_WEIGHT * math.sqrt(square / sum(each.numel() for each in trained)):.1e}") or TINIEST_RATE


def trained_by(base: ConditionalBase, scope: str) -> tuple[str, ...]:
    """Names of the parameters of a scope.

    Raises:
        UserError: the model has no such scope.
    """
    scopes = base.model.scopes()
    if scope not in scopes:
        detail = f"scope is one of {', '.join(sorted(scopes))} for a model of family {base.checkpointed.family!r}"
        title = "A parameter of the method is wrong"
        raise UserError("invalid-parameter", title, f"{detail}, not {scope!r}.", pointer="/parameters/scope")
    return tuple(scopes[scope])


def replay_of(job: Mapping[str, Any], base: ConditionalBase, own: OwnSamples, others: Sequence[int]) -> Examples:
    """Examples of what stays, each label as often as the others.

    Raises:
        UserError: there are too few.
    """
    count, needed = int(job["remember"].get("generated") or 0), max(SMALLEST_REMEMBER, len(others))
    given = [len(paths) for paths in (job["inputs"].get("remember_sets") or {}).values()]
    count = max(count, len(others) * max(given, default=0))  # each image of the caller's once, at least
    if count < needed:
        raise UserError(
            "remember-set-too-small",
            "Too few images are left to remember",
            f"{count} samples cannot stand for {len(others)} {'concepts' if base_reads(base) else 'classes'} that are "
            f"to stay; draw {needed} at least, and better thousands.",
            pointer="/remember/generated",
            left=count,
            needed=needed,
        )
    return own.examples(others, count, "replay")


def surrogates_of(base: ConditionalBase) -> int:
    """Samples of a replacement that the forgotten condition learns from."""
    return DEAR_SURROGATES if isinstance(base.model, GuidedConditional) else SURROGATES


def base_reads(base: ConditionalBase) -> bool:
    """Whether its conditions are prompts."""
    return isinstance(base.conditions, Concepts)


def refused(detail: str, pointer: str) -> UserError:
    """A request that makes no sense for this model, with the place."""
    return UserError("invalid-request", "The request cannot be met as it stands", detail, pointer=pointer)
