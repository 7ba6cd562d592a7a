"""The report as data: the versioned schema `forgetd.report/1`, which JSON carries and HTML is drawn from."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from evidence.records import Outcome, RememberSource, SetKey

__all__ = ["SCHEMA", "Report", "json_schema"]

SCHEMA: Literal["forgetd.report/1"] = "forgetd.report/1"


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Number = Annotated[
    Annotated[float, Field(allow_inf_nan=False)] | None,
    BeforeValidator(_finite_or_none),
    Field(description="null: missing, or not finite"),
]


class Part(BaseModel):
    """A part of the report: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Criterion(Part):
    """One condition of success."""

    name: str
    statement: str
    threshold: Number
    value: Number
    met: bool


class Verdict(Part):
    """The outcome, in one sentence that may be quoted."""

    outcome: Outcome
    sentence: str
    criteria: tuple[Criterion, ...]


class Interval(Part):
    """An estimate with its interval; low and high are null where there is too little evidence for one."""

    value: Number
    low: Number
    high: Number
    confidence: float


class SetRow(Part):
    """One row of the table: a set of images before and after."""

    key: SetKey
    symbol: str
    description: str
    n: int
    draws: int
    q_before: Number = Field(description="mean primary quantile under the base model, in [0, 1]")
    q_after: Number = Field(description="the same under the tamed model; low means forgotten")
    quantile_drop: Interval = Field(description="q_before - q_after, in [-1, 1]")
    q_before_gaussian: Number
    q_after_gaussian: Number
    q_before_empirical: Number
    q_after_empirical: Number
    bpd_before: Number = Field(description="bits per dimension; lower is more likely")
    bpd_after: Number


class ForgetImageRow(Part):
    """One forgotten image, known by its position only."""

    index: int
    z_before: Number
    z_after: Number = Field(description="distance from mu_R in sigma_R, tamed model; higher is less likely")
    z_after_base: Number = Field(description="the same with mu_R and sigma_R of the base model")
    q_gaussian_before: Number
    q_gaussian_after: Number
    q_empirical_before: Number
    q_empirical_after: Number
    no_more_likely: int = Field(description="images to remember that are no more likely under the tamed model")
    forgotten: bool


class NormalityTest(Part):
    """Kolmogorov-Smirnov test of the likelihoods to remember against the normal fitted to them."""

    statistic: Number
    p_value: Number = Field(description="Monte Carlo, the fit taken into account")
    p_value_naive: Number = Field(description="as usually quoted, the fit ignored; too large")
    skew: Number
    excess_kurtosis: Number
    rejected: bool | None = Field(description="null: too few values to tell")


class ReferenceFacts(Part):
    """The likelihoods to remember, which every quantile is taken among."""

    source: RememberSource
    source_sentence: str
    n: int
    draws: int
    mu_before: Number
    mu_after: Number
    sigma_before: Number
    sigma_after: Number
    normality_before: NormalityTest
    normality_after: NormalityTest
    primary_quantile: Literal["gaussian", "empirical"]
    primary_reason: str
    resolution: float = Field(description="smallest quantile that the images can show, 1 / (n + 1)")


class Estimate(Part):
    """An estimate with its standard error."""

    value: Number
    standard_error: Number
    n: int
    unit: str


class Health(Part):
    """Samples of one model at temperature 1."""

    n: int
    finite: Number
    in_range: Number
    round_trip_error: Number


class SideEffects(Part):
    """What happened to everything that was not to be forgotten."""

    drift_remember: Estimate
    drift_held_out: Estimate | None
    kl_per_dim: Estimate | None
    sigma_ratio: Number
    health_before: Health | None
    health_after: Health | None


class DataFacts(Part):
    """How the images came to be what the models saw."""

    image_shape: tuple[int, int, int]
    n_bits: int
    near_duplicates_removed: int
    image_fitting: str
    neighbours_method: str


class Parameter(Part):
    """One parameter of the method, with its default."""

    name: str
    value: JsonValue
    default: JsonValue
    changed: bool


class Provenance(Part):
    """Where the report comes from: what one needs to run it again."""

    job: str | None
    method: str
    created_at: str | None
    attempt: int
    resumed_from_step: int | None
    steps: int | None
    seeds: dict[str, int]
    digests: dict[str, str]
    software: dict[str, str]
    device: str
    seconds: dict[str, Number]
    parameters: tuple[Parameter, ...]


class LossPoint(Part):
    """A loss at a step."""

    step: int
    value: Number


class SetDistribution(Part):
    """Likelihoods of a set in bits per dimension, rising, thinned evenly where there are many."""

    before: tuple[Number, ...]
    after: tuple[Number, ...]


class Distributions(Part):
    """The numbers behind the figures. Of the forget images, `before` and `after` keep their order."""

    remember: SetDistribution
    forget: SetDistribution
    held_out: SetDistribution | None
    threshold_before: Number = Field(description="bits per dimension at the criterion's z, base model")
    threshold_after: Number


class Report(Part):
    """What was done, what was measured, and what that does not show."""

    schema_version: Literal["forgetd.report/1"] = Field(default=SCHEMA, alias="schema")
    title: str
    verdict: Verdict
    sets: tuple[SetRow, ...]
    forget_images: tuple[ForgetImageRow, ...]
    reference: ReferenceFacts
    side_effects: SideEffects
    data: DataFacts
    provenance: Provenance
    losses: dict[str, tuple[LossPoint, ...]]
    notes: tuple[str, ...]
    limitations: tuple[str, ...]
    distributions: Distributions

    def to_json(self) -> str:
        """The report as JSON: keys in the schema's order, mappings sorted, null for every value that is not finite."""
        document = self.model_dump(mode="json", by_alias=True)
        return json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """Read a report back; `pydantic.ValidationError` for anything that is none of this version."""
        return cls.model_validate_json(text)


def json_schema() -> dict[str, Any]:
    """JSON Schema of `forgetd.report/1`."""
    return Report.model_json_schema(by_alias=True, mode="serialization")
