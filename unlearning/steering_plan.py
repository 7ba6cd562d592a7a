"""What a steering run decides before its first step, once: a run that goes on reads it from its state, to the bit.

Another machine draws the same samples of the base with other last bits, and a judge may call one of them differently.
Neither the aims nor whether they can be reached may hang on where a run goes on.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.checkpoints import tensor_digest
from unlearning.constraints import Constraint, Fractions, aims, check_reachable, count
from unlearning.errors import StateError
from unlearning.state import State
from unlearning.steering_parameters import SteeringParameters

VERSION = 2
"""Of the states: raised whenever the steps or what they read change, so that no run goes on with another's."""
WITNESSES = 100
"""Samples of the base by which a judge is known again."""
SAME_JUDGE = 0.02
"""Share of these that a judge may call differently: they may have been drawn on another machine."""


@dataclass(frozen=True)
class Plan:
    """Labels and aims of a run."""

    before: list[Fractions]
    """Of the base, one a constraint."""
    labels: list[Tensor]
    """What each judge says of the images of all sets, (n,) int64 each."""
    weights: list[Tensor]
    """log w_j, (k_j,) float64 each; those of a state have been corrected since."""
    aims: list[Tensor]
    """Fractions under the target, (k_j,) float64 each."""

    def tensors(self) -> dict[str, Tensor]:
        """What `recall` reads; the weights, which change, are with the rest of the state."""
        return {"labels": torch.stack(self.labels), "aims": torch.cat(self.aims)}


def decide(constraints: Sequence[Constraint], sets: Sequence[Tensor], confidence: float) -> Plan:
    """Judge the images, and find the nearest distribution that keeps the bounds.

    Args:
        constraints: with their judges and bounds.
        sets: uint8 images (n, c, h, w): samples of the base, which tell its fractions, then real ones if there are any.
        confidence: of the intervals of each constraint together.

    Raises:
        UnreachableError: the bounds contradict each other or what the base shows.
        InputError: a judge's answers are no classes.
    """
    shown = [constraint.labels(sets[0]) for constraint in constraints]
    before = [count(*pair, confidence) for pair in zip(constraints, shown, strict=True)]
    check_reachable(constraints, before)
    weights = aims(constraints, shown, confidence)
    labels = [
        torch.cat([said, *(constraint.labels(images) for images in sets[1:])])
        for constraint, said in zip(constraints, shown, strict=True)
    ]
    return Plan(before, labels, weights, _marginals(weights, shown))


def recall(state: State, fingerprint: str, constraints: Sequence[Constraint], pool: Tensor, confidence: float) -> Plan:
    """What the attempt that left this state had decided; judges only say whether they are the same.

    Args:
        state: of an earlier attempt.
        fingerprint: of this run.
        constraints: as for `decide`.
        pool: the first of its sets.
        confidence: likewise.

    Raises:
        StateError: the state belongs to another run.
        InputError: a judge's answers are no classes.
    """
    said = state.tensors["labels"] if state.meta.get("fingerprint") == fingerprint else None
    if said is None or not _same_judges(constraints, pool[:WITNESSES], said):
        raise StateError(
            "the state belongs to a run with another base, other images, judges, parameters, bounds or seed"
        )
    return Plan(
        before=[
            count(constraint, labels[: len(pool)], confidence)
            for constraint, labels in zip(constraints, said, strict=True)
        ],
        labels=list(said),
        weights=by_constraint(constraints, state.tensors["class_weights"]),
        aims=by_constraint(constraints, state.tensors["aims"]),
    )


def fingerprint_of(
    base: nn.Module,
    constraints: Sequence[Constraint],
    values: SteeringParameters,
    remember: Tensor | None,
    n_bits: int,
    seed: int,
) -> str:
    """What a state must share with a run, to the bit; nothing that depends on the machine or a micro-batch."""
    bounds = [[c.name, c.classes, sorted(c.bounds.items())] for c in constraints]
    facts = [VERSION, values.to_dict(), bounds, n_bits, seed, tensor_digest(base.state_dict())]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    if remember is not None:
        digest.update(json.dumps(list(remember.shape)).encode())
        digest.update(remember.cpu().contiguous().numpy().data)
    return digest.hexdigest()


def by_constraint(constraints: Sequence[Constraint], values: Tensor) -> list[Tensor]:
    """One copy of its values, (k_j,), for each constraint, from those of all, one after the other."""
    return [part.clone() for part in torch.split(values, [len(constraint.classes) for constraint in constraints])]


def _same_judges(constraints: Sequence[Constraint], witnesses: Tensor, said: Tensor) -> bool:
    """Whether judges say of some images what they said, (j, n): by that a judge is known."""
    now = torch.stack([constraint.labels(witnesses) for constraint in constraints])
    return float((said[:, : len(witnesses)] != now).float().mean(1).max()) <= SAME_JUDGE


def _marginals(weights: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
    """Fractions of every class among samples weighted by prod_j w_j."""
    mass = torch.stack([weight[label] for weight, label in zip(weights, labels, strict=True)]).sum(0).softmax(0)
    return [torch.zeros_like(weight).index_add_(0, label, mass) for weight, label in zip(weights, labels, strict=True)]
