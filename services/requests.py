"""What a caller may ask for: the typed body of a job, checked at the door and stored with the job."""

from __future__ import annotations

from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from services.method_options import (
    ClassRemovalOptions,
    FlowTamingOptions,
    Method,
    Options,
    SteeringOptions,
    options_of,
)
from services.request_parts import (
    Attribute,
    CheckpointId,
    ClassName,
    Criteria,
    EvaluationRequest,
    Images,
    Judge,
    OwnClassesJudge,
    Part,
    Remember,
    SampleEvaluation,
    Target,
    small_metadata,
    sums_to_one,
)

__all__ = [
    "AskedMethod",
    "Attribute",
    "ClassRemovalOptions",
    "Criteria",
    "DebiasRequest",
    "EvaluationRequest",
    "FlowTamingOptions",
    "ForgetRequest",
    "Images",
    "JobRequest",
    "Judge",
    "OwnClassesJudge",
    "Remember",
    "SampleEvaluation",
    "SteeringOptions",
    "Target",
]

AskedMethod = Literal["auto", "flow-taming", "steering", "class-removal", "class-taming"]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _nothing() -> Any:
    return {}


class JobRequest(Part):
    """What the bodies of all jobs have in common.

    A body adds what it asks for, then ``method`` and ``parameters``, in this order: each is judged by those before it,
    and ``method`` becomes the method that ``auto`` stands for.
    """

    checkpoint: CheckpointId
    remember: Remember = Remember(generated=1024)
    criteria: Criteria = Criteria()
    evaluation: SampleEvaluation = SampleEvaluation()
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = Field(None, description="unset: drawn, and reported")
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    metadata: dict[str, Any] = Field(default_factory=dict, description="yours; returned as sent, never interpreted")

    _metadata = field_validator("metadata")(small_metadata)

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[Method, str] | None:
        """The method for what is asked, from the fields before ``method``, and what that is; None: they are wrong."""
        raise NotImplementedError

    @field_validator("method", check_fields=False)
    @classmethod
    def _method(cls, value: str, info: ValidationInfo) -> str:
        fitting = cls._fitting(info.data)
        if fitting is None or value in ("auto", fitting[0]):
            return fitting[0] if fitting else value
        told = f"{value} does not do this: {fitting[1]} {fitting[0]}; say that, or auto"
        raise PydanticCustomError("wrong_method", cast(Any, told))

    @field_validator("parameters", mode="wrap", check_fields=False)
    @classmethod
    def _parameters(cls, value: Any, _handler: Any, info: ValidationInfo) -> Options:
        """Judged as the method's options; whatever else is wrong with the request is said first."""
        method = info.data.get("method", "auto")
        return FlowTamingOptions() if method == "auto" else options_of(method, value)

    def image_sets(self) -> dict[str, str]:
        """The image sets that the job reads, by JSON pointer: first what is to be changed, then the rest."""
        sets = self.subjects()
        if self.remember.images:
            sets["/remember/images"] = self.remember.images
        for role in ("same_identity", "held_out"):
            images = getattr(self.evaluation, role, None)
            if images:
                sets[f"/evaluation/{role}/images"] = images.images
        return sets

    def subjects(self) -> dict[str, str]:
        """The image sets that say what is to be changed, by JSON pointer."""
        raise NotImplementedError

    def judges(self) -> dict[str, Judge]:
        """Who says what an image shows, by JSON pointer."""
        raise NotImplementedError

    def stored(self) -> dict[str, Any]:
        """The request as it is kept with the job: as it came, with defaults."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)


class ForgetRequest(JobRequest):
    """The body of ``POST /jobs/forget``."""

    target: Target
    method: AskedMethod = Field("auto", validate_default=True)
    parameters: Options = Field(
        default_factory=_nothing, validate_default=True, description="of the method; see its options"
    )
    evaluation: EvaluationRequest = EvaluationRequest()

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[Method, str] | None:
        target: Target | None = given.get("target")
        if target is None:
            return None
        if target.attributes is not None:
            return "steering", "attributes take"
        if target.class_label is None:
            return "flow-taming", "images take"
        if target.at_prior:
            return "class-removal", "a class at the prior takes"
        return "class-taming", "a class in the weights takes"

    @model_validator(mode="after")
    def _of_one_person(self) -> ForgetRequest:
        if self.target.attributes is not None and self.evaluation.same_identity is not None:
            raise ValueError("evaluation.same_identity is about images to forget, and an attribute has none")
        return self

    def subjects(self) -> dict[str, str]:
        """The target's image sets, by JSON pointer."""
        return self.target.image_sets()

    def judges(self) -> dict[str, Judge]:
        """The judges of its attributes, by JSON pointer."""
        return {f"/target/attributes/{number}": it for number, it in enumerate(self.target.attributes or [])}


class DebiasRequest(JobRequest):
    """The body of ``POST /jobs/debias``."""

    attribute: OwnClassesJudge
    target_distribution: Annotated[
        dict[ClassName, Fraction],
        Field(min_length=2, max_length=100, description="the fraction of samples of every class; 0 for none of it"),
    ]
    tolerance: Annotated[float, Field(ge=0.01, le=0.5, description="how far off each fraction may be")] = 0.03
    confidence: Annotated[float, Field(ge=0.5, le=0.9999, description="of the intervals that must lie inside")] = 0.95
    method: AskedMethod = Field("auto", validate_default=True)
    parameters: Options = Field(
        default_factory=_nothing, validate_default=True, description="of the method; see its options"
    )

    _distribution = field_validator("target_distribution")(sums_to_one)

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[Method, str] | None:
        attribute: OwnClassesJudge | None = given.get("attribute")
        if attribute is None:
            return None
        if attribute.classes:
            return "class-removal", "the checkpoint's own classes take"
        return "steering", "an attribute takes"

    def subjects(self) -> dict[str, str]:
        """The labelled sets of its attribute, by JSON pointer."""
        return self.attribute.image_sets("/attribute")

    def judges(self) -> dict[str, Judge]:
        """The judge of its attribute, by JSON pointer."""
        return {"/attribute": self.attribute}
