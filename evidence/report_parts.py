"""What every report is put together from: the facts of a run, figures as JSON holds them, a common criterion."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import JsonValue

from evidence import schema
from evidence.drift import Drift, KlEstimate, SampleHealth
from evidence.likelihood import FloatArray
from evidence.records import finite

__all__ = [
    "RunFacts",
    "estimate",
    "health",
    "losses",
    "provenance",
    "rounded",
    "samples_sound",
    "software_versions",
    "thinned",
    "verdict",
]

KEPT_VALUES = 1000
"""Likelihoods of a large set that the report keeps for its figures, evenly spaced in rank."""


@dataclass(frozen=True)
class RunFacts:
    """What the measures cannot know about a run; every field has a neutral default.

    Attributes:
        job: its id.
        method: the method and its engine.
        created_at: moment, as text; left out rather than taken from the clock, so that equal runs give equal bytes.
        attempt: how many attempts it took, from 1.
        resumed_from_step: step at which an earlier attempt was taken up; None if it was not.
        steps: optimisation steps in all.
        parameters: the method's parameters as used.
        defaults: the method's defaults; a parameter without one is shown as changed.
        seeds: by purpose. The evaluation's is added.
        digests: by object, such as base_checkpoint, tamed_checkpoint, remember_set; never of a forget image.
        software: name to version; None: `software_versions()`.
        device: in words.
        seconds: by phase.
        losses: by name, (step, value) pairs.
        near_duplicates_removed: images that left D_R for being too close to D_F.
        image_fitting: how images were brought to the model's size and channels, in a sentence.
    """

    job: str | None = None
    method: str = "flow-taming"
    created_at: str | None = None
    attempt: int = 1
    resumed_from_step: int | None = None
    steps: int | None = None
    parameters: Mapping[str, JsonValue] = field(default_factory=dict)
    defaults: Mapping[str, JsonValue] = field(default_factory=dict)
    seeds: Mapping[str, int] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    software: Mapping[str, str] | None = None
    device: str = "cpu"
    seconds: Mapping[str, float] = field(default_factory=dict)
    losses: Mapping[str, Sequence[tuple[int, float]]] = field(default_factory=dict)
    near_duplicates_removed: int = 0
    image_fitting: str = "images were used at the model's size as they came"


def software_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    versions = {"python": platform.python_version()}
    for name in ("forgetd", "numpy", "scipy", "torch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed as a package"
    return versions


def samples_sound(base: SampleHealth, after: SampleHealth, what: str) -> schema.Criterion:
    """The condition that samples did not break; `what` names the model after."""
    return schema.Criterion(
        name="samples_sound",
        statement=f"Samples of the {what} are as finite, invertible and in range as those of the base model.",
        threshold=rounded(base.finite_floor(after.n)),
        value=rounded(after.finite),
        met=after.as_good_as(base),
    )


def estimate(one: Drift | KlEstimate, unit: str) -> schema.Estimate:
    """An estimate with its error and unit."""
    return schema.Estimate(value=rounded(one.value), standard_error=rounded(one.standard_error), n=one.n, unit=unit)


def health(one: SampleHealth | None) -> schema.Health | None:
    """What was seen of a model's samples; None where none were drawn."""
    if one is None:
        return None
    return schema.Health(
        n=one.n,
        finite=rounded(one.finite),
        in_range=rounded(one.in_range),
        round_trip_error=rounded(one.round_trip_error),
    )


def verdict(sentence: str, criteria: Sequence[schema.Criterion]) -> schema.Verdict:
    """What all criteria together come to."""
    met = all(criterion.met for criterion in criteria)
    return schema.Verdict(
        outcome="succeeded" if met else "criteria_not_met", sentence=sentence, criteria=tuple(criteria)
    )


def provenance(run: RunFacts, evaluation_seed: int) -> schema.Provenance:
    """Where a report comes from."""
    software = software_versions() if run.software is None else run.software
    return schema.Provenance(
        job=run.job,
        method=run.method,
        created_at=run.created_at,
        attempt=run.attempt,
        resumed_from_step=run.resumed_from_step,
        steps=run.steps,
        seeds=dict(sorted({**run.seeds, "evaluation": evaluation_seed}.items())),
        digests=dict(sorted(run.digests.items())),
        software=dict(sorted(software.items())),
        device=run.device,
        seconds={name: rounded(value, 4) for name, value in run.seconds.items()},
        parameters=_parameters(run.parameters, run.defaults),
    )


def _parameters(used: Mapping[str, JsonValue], defaults: Mapping[str, JsonValue]) -> tuple[schema.Parameter, ...]:
    return tuple(
        schema.Parameter(
            name=name,
            value=used.get(name, defaults.get(name)),
            default=defaults.get(name),
            changed=used.get(name, defaults.get(name)) != defaults.get(name),
        )
        for name in sorted({*used, *defaults})
    )


def losses(run: RunFacts) -> dict[str, tuple[schema.LossPoint, ...]]:
    """Every loss against the step."""
    return {
        name: tuple(schema.LossPoint(step=step, value=rounded(value)) for step, value in points)
        for name, points in sorted(run.losses.items())
    }


def thinned(values: FloatArray) -> FloatArray:
    """The values (n,) rising; of more than KEPT_VALUES, evenly many of them."""
    ordered = np.sort(values)
    if len(ordered) <= KEPT_VALUES:
        return ordered
    kept = np.linspace(0, len(ordered) - 1, KEPT_VALUES).round().astype(np.int64)
    return np.take(ordered, kept)


def rounded(value: float | None, digits: int = 6) -> float | None:
    """Six significant digits; None for what is missing or not finite."""
    if value is None or finite(value) is None:
        return None
    return float(f"{value:.{digits}g}")
