"""The reports as data: versioned schemas, which JSON carries and HTML is drawn from."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from evidence.fractions import Told
from evidence.records import Outcome, RememberSource, SetKey

__all__ = ["SCHEMA", "STEERING_SCHEMA", "Document", "Report", "SteeringReport", "json_schema"]

SCHEMA: Literal["forgetd.report/1"] = "forgetd.report/1"
STEERING_SCHEMA: Literal["forgetd.steering-report/1"] = "forgetd.steering-report/1"


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


class Document(Part):
    """What every report holds: what was done, what was decided, and what that does not show."""

    title: str
    verdict: Verdict
    provenance: Provenance
    losses: dict[str, tuple[LossPoint, ...]]
    notes: tuple[str, ...]
    limitations: tuple[str, ...]

    def to_json(self) -> str:
        """The report as JSON: keys in the schema's order, mappings sorted, null for every value that is not finite."""
        document = self.model_dump(mode="json", by_alias=True)
        version = {"schema": document.pop("schema")}
        return json.dumps(version | document, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a report back; `pydantic.ValidationError` for anything that is none of this version."""
        return cls.model_validate_json(text)


class Report(Document):
    """Images forgotten by a flow, judged by their likelihood."""

    schema_version: Literal["forgetd.report/1"] = Field(default=SCHEMA, alias="schema")
    sets: tuple[SetRow, ...]
    forget_images: tuple[ForgetImageRow, ...]
    reference: ReferenceFacts
    side_effects: SideEffects
    data: DataFacts
    distributions: Distributions


class FractionRow(Part):
    """How often samples show one class of one classifier."""

    judge: str
    label: str
    before: Interval
    after: Interval
    n: int = Field(description="samples of each flow")
    low: Number = Field(description="least fraction asked for; null: none")
    high: Number = Field(description="largest fraction asked for; null: none")
    told: Told | None = Field(description="whether the interval lies inside; null: nothing is asked")
    samples_needed: int | None = Field(description="samples that would do where evidence is insufficient, if known")


class KidRow(Part):
    """Distance of one class's samples, base to steered."""

    judge: str
    label: str
    value: Number = Field(description="squared maximum mean discrepancy; near 0: as they were; may be below 0")
    standard_error: Number
    floor: Number = Field(description="chance puts samples of one flow no further apart, at 95 % over all classes")
    within_noise: bool | None = Field(description="null: too few samples to tell")
    n_before: int
    n_after: int
    extractor: str


class JudgeFacts(Part):
    """One classifier."""

    name: str
    classes: tuple[str, ...]
    accuracy: Interval | None = Field(description="on unseen labelled images; null: not measured here")


class LikelihoodRow(Part):
    """Likelihoods of a set that steering was to leave alone."""

    key: Literal["remember", "held_out"]
    description: str
    n: int
    draws: int
    bpd_before: Number
    bpd_after: Number
    drift: Estimate


class CurvePoint(Part):
    """A fraction of samples at a step of the run."""

    step: int
    value: Number
    low: Number
    high: Number


class Curve(Part):
    """The fraction of one class against the step."""

    judge: str
    label: str
    points: tuple[CurvePoint, ...]


class Relearn(Part):
    """What a short re-training brought back."""

    label: str
    steps: int
    images: int
    before: Number = Field(description="fraction of samples in the class before the probe")
    after: Number


class SampleFacts(Part):
    """What was drawn, and of what."""

    image_shape: tuple[int, int, int]
    n_bits: int
    samples: int
    confidence: float
    image_fitting: str


class SteeringReport(Document):
    """A flow steered in what it draws, judged by classifiers on its samples."""

    schema_version: Literal["forgetd.steering-report/1"] = Field(default=STEERING_SCHEMA, alias="schema")
    kind: str
    fractions: tuple[FractionRow, ...]
    curves: tuple[Curve, ...]
    kid: tuple[KidRow, ...]
    judges: tuple[JudgeFacts, ...]
    likelihoods: tuple[LikelihoodRow, ...]
    health_before: Health | None
    health_after: Health | None
    relearn: Relearn | None
    data: SampleFacts
    distributions: Distributions | None = Field(description="null: no images were given to measure likelihoods of")


def json_schema(document: type[Document] = Report) -> dict[str, Any]:
    """JSON Schema of a kind of report, `forgetd.report/1` unless told otherwise."""
    return document.model_json_schema(by_alias=True, mode="serialization")
