"""What a caller may ask for: the typed body of a job, checked at the door and stored with the job."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, Any, Final, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from services.method_options import (
    AmnesiaOptions,
    ClassRemovalOptions,
    FlowTamingOptions,
    Method,
    Options,
    SteeringOptions,
    UndecidedOptions,
    decided_options,
    options_of,
)
from services.request_parts import (
    Attribute,
    CheckpointId,
    ClassName,
    Criteria,
    EvaluationRequest,
    ForgetCriteria,
    Images,
    Judge,
    OwnClassesJudge,
    Part,
    Remember,
    Replacement,
    SampleEvaluation,
    Target,
    small_metadata,
    sums_to_one,
)

__all__ = [
    "AMNESIA",
    "AmnesiaOptions",
    "AskedMethod",
    "Attribute",
    "ClassRemovalOptions",
    "Criteria",
    "DebiasRequest",
    "EvaluationRequest",
    "FlowTamingOptions",
    "ForgetCriteria",
    "ForgetRequest",
    "Images",
    "JobRequest",
    "Judge",
    "OwnClassesJudge",
    "Remember",
    "Replacement",
    "SampleEvaluation",
    "SteeringOptions",
    "Target",
]

AskedMethod = Literal["auto", "flow-taming", "steering", "class-removal", "class-taming", "selective-amnesia"]
Fraction = Annotated[float, Field(ge=0, le=1)]

AMNESIA: Final = "selective-amnesia"
FORGOTTEN_AT_MOST, REPLACED_AT_LEAST, OTHERS_WITHIN = 0.05, 0.9, 0.02


def _nothing() -> Any:
    return {}


class JobRequest(Part):
    """What the bodies of all jobs have in common.

    A body adds what it asks for, then ``method`` and ``parameters``, in this order: each is judged by those before it,
    and ``method`` becomes the method that ``auto`` stands for; where families differ in it, once the checkpoint is
    known (``decided``).
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
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        """The methods for what is asked, from the fields before ``method``, and what that is; None: they are wrong."""
        raise NotImplementedError

    @field_validator("method", check_fields=False)
    @classmethod
    def _method(cls, value: str, info: ValidationInfo) -> str:
        fitting = cls._fitting(info.data)
        if fitting is None:
            return value
        methods, what = fitting
        if value in methods or value == "auto":
            return methods[0] if len(methods) == 1 else value
        told = f"{value} does not do this: {what} {' or '.join(methods)}; say that, or auto"
        if value == AMNESIA:
            told += f"; {AMNESIA} takes a class_label, in the weights"
        raise PydanticCustomError("wrong_method", cast(Any, told))

    @field_validator("parameters", mode="wrap", check_fields=False)
    @classmethod
    def _parameters(cls, value: Any, _handler: Any, info: ValidationInfo) -> Options | UndecidedOptions:
        """Judged as the method's options, once it is known; whatever else is wrong with the request is said first."""
        method = info.data.get("method", "auto")
        return UndecidedOptions.model_validate(value) if method == "auto" else options_of(method, value)

    def decided(self, known: Collection[str]) -> Self:  # noqa: ARG002 for bodies whose method hangs on the family
        """The request for a checkpoint of a family that has these methods: none is left open.

        Raises:
            InvalidRequest: ``parameters`` are not the method's.
        """
        return self

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
    parameters: Options | SkipJsonSchema[UndecidedOptions] = Field(
        default_factory=_nothing, validate_default=True, description="of the method; see its options"
    )
    replace_with: Literal["noise"] | Replacement | None = Field(
        None, description="of selective-amnesia: what the class becomes; default noise"
    )
    judge: Judge | None = Field(
        None,
        description="of selective-amnesia: who tells the classes of samples: one for every label, in their order; "
        "sets are named by labels. Left out: one is trained on samples of the model",
    )
    criteria: ForgetCriteria = ForgetCriteria()
    evaluation: EvaluationRequest = EvaluationRequest()

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        target: Target | None = given.get("target")
        if target is None:
            return None
        if target.attributes is not None:
            return ("steering",), "attributes take"
        if target.class_label is None:
            return ("flow-taming",), "images take"
        if target.at_prior:
            return ("class-removal",), "a class at the prior takes"
        return ("class-taming", AMNESIA), "a class in the weights takes"

    @field_validator("replace_with", mode="wrap")
    @classmethod
    def _noise_or_more(cls, value: Any, _handler: Any) -> Any:
        """The word or the object: what is wrong with one is not said of both."""
        if value is None or value == "noise":
            return value
        if not isinstance(value, dict | Replacement):
            raise ValueError('give "noise", {"class_label": 1} or {"images": "imgs_..."}')
        return Replacement.model_validate(value)

    @model_validator(mode="after")
    def _of_one_person(self) -> ForgetRequest:
        if self.target.attributes is not None and self.evaluation.same_identity is not None:
            raise ValueError("evaluation.same_identity is about images to forget, and an attribute has none")
        return self

    def decided(self, known: Collection[str]) -> Self:
        """The request with the method that ``auto`` stands for in a family that has these, and with its defaults.

        Raises:
            InvalidRequest: ``parameters`` are not the method's.
        """
        method = self.method
        if method == "auto" and (fitting := self._fitting({"target": self.target})) is not None:
            method = next((it for it in fitting[0] if it in known), fitting[0][0])
        changes: dict[str, Any] = {"method": method, "parameters": decided_options(method, self.parameters)}
        if method == AMNESIA:
            changes |= {"replace_with": self.replace_with or "noise", "criteria": self._amnesia_criteria()}
        return self.model_copy(update=changes)

    def _amnesia_criteria(self) -> ForgetCriteria:
        defaults = {"forgotten_at_most": FORGOTTEN_AT_MOST, "others_within": OTHERS_WITHIN}
        if self.replacing_class is not None:
            defaults["replaced_at_least"] = REPLACED_AT_LEAST
        return self.criteria.model_copy(
            update={name: value for name, value in defaults.items() if getattr(self.criteria, name) is None}
        )

    @property
    def replacing_class(self) -> int | None:
        """The class that takes the forgotten one's place, where one does."""
        return self.replace_with.class_label if isinstance(self.replace_with, Replacement) else None

    def subjects(self) -> dict[str, str]:
        """The image sets of its target, of what replaces it and of its judge, by JSON pointer."""
        sets = self.target.image_sets()
        if isinstance(self.replace_with, Replacement) and self.replace_with.images:
            sets["/replace_with/images"] = self.replace_with.images
        return sets | (self.judge.image_sets("/judge") if self.judge else {})

    def judges(self) -> dict[str, Judge]:
        """Its judge and those of its attributes, by JSON pointer."""
        own = {} if self.judge is None else {"/judge": self.judge}
        return own | {f"/target/attributes/{number}": it for number, it in enumerate(self.target.attributes or [])}


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
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        attribute: OwnClassesJudge | None = given.get("attribute")
        if attribute is None:
            return None
        if attribute.classes:
            return ("class-removal",), "the checkpoint's own classes take"
        return ("steering",), "an attribute takes"

    def subjects(self) -> dict[str, str]:
        """The labelled sets of its attribute, by JSON pointer."""
        return self.attribute.image_sets("/attribute")

    def judges(self) -> dict[str, Judge]:
        """The judge of its attribute, by JSON pointer."""
        return {"/attribute": self.attribute}
