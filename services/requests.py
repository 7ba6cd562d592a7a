"""What a caller may ask for: the typed body of a job, checked at the door and stored with the job."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Final, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from services.condition_parts import GENERATED, ConceptJudge, Condition, Remember, Replacement, Shown
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
from services.request_names import CheckpointId, ClassName, Deadline, Part
from services.request_parts import (
    Attribute,
    Criteria,
    DebiasCriteria,
    EvaluationRequest,
    ForgetCriteria,
    Images,
    Judge,
    OwnClassesJudge,
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
    "ConceptJudge",
    "Condition",
    "Criteria",
    "DebiasCriteria",
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
    "Shown",
    "SteeringOptions",
    "Target",
]

AskedMethod = Literal["auto", "flow-taming", "steering", "class-removal", "class-taming", "selective-amnesia"]
Fraction = Annotated[float, Field(ge=0, le=1)]

AMNESIA: Final = "selective-amnesia"
FORGOTTEN_AT_MOST, REPLACED_AT_LEAST, OTHERS_WITHIN = 0.05, 0.9, 0.02


def _nothing() -> Any:
    return {}


class JobRequest(Part, ABC):
    """What the bodies of all jobs have in common.

    A body adds what it asks for, then ``method`` and ``parameters``, in this order: each is judged by those before it,
    and ``method`` becomes the method that ``auto`` stands for; where families differ in it, once the checkpoint is
    known (``decided``).
    """

    checkpoint: CheckpointId
    remember: Remember = Remember(generated=GENERATED)
    criteria: Criteria = Criteria()
    evaluation: SampleEvaluation = SampleEvaluation()
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = Field(None, description="unset: drawn, and reported")
    priority: Annotated[int, Field(ge=-100, le=100, description="higher first, among your own jobs alone")] = 0
    deadline: Deadline | None = None
    metadata: dict[str, Any] = Field(default_factory=dict, description="yours; returned as sent, never interpreted")

    AMNESIA_TAKES: ClassVar[str]  # in words, what of such a body selective-amnesia can do

    _metadata = field_validator("metadata")(small_metadata)

    @classmethod
    @abstractmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        """The methods for what is asked, from the fields before ``method``, and what that is; None: they are wrong."""

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
            told += f"; {AMNESIA} takes {cls.AMNESIA_TAKES}"
        raise PydanticCustomError("wrong_method", cast(Any, told))

    @field_validator("parameters", mode="wrap", check_fields=False)
    @classmethod
    def _parameters(cls, value: Any, _handler: Any, info: ValidationInfo) -> Options | UndecidedOptions:
        """Judged as the method's options, once it is known; whatever else is wrong with the request is said first."""
        method = info.data.get("method", "auto")
        return UndecidedOptions.model_validate(value) if method == "auto" else options_of(method, value)

    def decided(self, known: Collection[str]) -> Self:
        """The request with the method that ``auto`` stands for in a family that has these, and with its defaults.

        Raises:
            InvalidRequest: ``parameters`` are not the method's.
        """
        method: str = getattr(self, "method")  # noqa: B009 every body declares it, after what it is judged by
        fitting = self._fitting(dict(self)) if method == "auto" else None
        if fitting is not None:
            method = next((it for it in fitting[0] if it in known), fitting[0][0])
        changes = {"method": method, "parameters": decided_options(method, getattr(self, "parameters"))}  # noqa: B009
        return self.model_copy(update=changes | (self._amnesia_defaults() if method == AMNESIA else {}))

    @abstractmethod
    def _amnesia_defaults(self) -> dict[str, Any]:
        """What selective-amnesia assumes where nothing is said, by member."""

    def _criteria_with(self, **defaults: float) -> Criteria:
        left_out = {name: value for name, value in defaults.items() if getattr(self.criteria, name) is None}
        return self.criteria.model_copy(update=left_out)

    def image_sets(self) -> dict[str, str]:
        """The image sets that the job reads, by JSON pointer: first what is to be changed, then the rest."""
        sets = self.subjects() | self.remember.image_sets()
        for role in ("same_identity", "held_out"):
            images = getattr(self.evaluation, role, None)
            if images:
                sets[f"/evaluation/{role}/images"] = images.images
        return sets

    @abstractmethod
    def subjects(self) -> dict[str, str]:
        """The image sets that say what is to be changed, by JSON pointer."""

    @abstractmethod
    def judges(self) -> dict[str, Judge]:
        """Who says what an image shows, by JSON pointer."""

    def stored(self) -> dict[str, Any]:
        """The request as it is kept with the job: as it came, with defaults."""
        return self.model_dump(mode="json", exclude_none=True, by_alias=True)


class ForgetRequest(JobRequest):
    """The body of ``POST /jobs/forget``."""

    AMNESIA_TAKES = "a class_label, in the weights, or a concept"

    target: Target
    method: AskedMethod = Field("auto", validate_default=True)
    parameters: Options | SkipJsonSchema[UndecidedOptions] = Field(
        default_factory=_nothing, validate_default=True, description="of the method; see its options"
    )
    replace_with: Literal["noise", "others"] | Replacement | None = Field(
        None,
        description="of selective-amnesia: what the class or concept becomes; others is what the remembered ones show, "
        "evenly; default noise for a class, others for a concept",
    )
    judge: ConceptJudge | None = Field(
        None,
        description="of selective-amnesia: who tells what samples show. Of a class: one class of the judge for every "
        "label, in their order; sets are named by labels. Of a concept: see shows. Left out: one is trained on samples "
        "of the model",
    )
    criteria: ForgetCriteria = ForgetCriteria()
    evaluation: EvaluationRequest = EvaluationRequest()

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        target: Target | None = given.get("target")
        if target is None:
            return None
        if target.concept is not None:
            return (AMNESIA,), "a concept takes"
        if target.attributes is not None:
            return ("steering",), "attributes take"
        if target.class_label is None:
            return ("flow-taming",), "images take"
        if target.at_prior:
            return ("class-removal",), "a class at the prior takes"
        return ("class-taming", AMNESIA), "a class in the weights takes"

    @field_validator("replace_with", mode="wrap")
    @classmethod
    def _word_or_more(cls, value: Any, _handler: Any) -> Any:
        """The word or the object: what is wrong with one is not said of both."""
        if value is None or value in ("noise", "others"):
            return value
        if not isinstance(value, dict | Replacement):
            raise ValueError(
                'give "noise", "others", {"class_label": 1}, {"concept": "a dog"} or {"images": "imgs_..."}'
            )
        return Replacement.model_validate(value)

    @model_validator(mode="after")
    def _of_one_person(self) -> ForgetRequest:
        if self.target.attributes is not None and self.evaluation.same_identity is not None:
            raise ValueError("evaluation.same_identity is about images to forget, and an attribute has none")
        return self

    def _amnesia_defaults(self) -> dict[str, Any]:
        bounds = {"forgotten_at_most": FORGOTTEN_AT_MOST, "others_within": OTHERS_WITHIN}
        if self.replacement is not None and self.replacement.class_label is not None:
            bounds["replaced_at_least"] = REPLACED_AT_LEAST
        word = "noise" if self.target.concept is None else "others"
        return {"replace_with": self.replace_with or word, "criteria": self._criteria_with(**bounds)}

    @property
    def replacement(self) -> Replacement | None:
        """What takes the forgotten one's place, where that is not told by a word."""
        return self.replace_with if isinstance(self.replace_with, Replacement) else None

    def subjects(self) -> dict[str, str]:
        """The image sets of its target, of what replaces it and of its judge, by JSON pointer."""
        sets = self.target.image_sets()
        if self.replacement is not None and self.replacement.images:
            sets["/replace_with/images"] = self.replacement.images
        return sets | (self.judge.image_sets("/judge") if self.judge else {})

    def judges(self) -> dict[str, Judge]:
        """Its judge and those of its attributes, by JSON pointer."""
        own: dict[str, Judge] = {} if self.judge is None else {"/judge": self.judge}
        return own | {f"/target/attributes/{number}": it for number, it in enumerate(self.target.attributes or [])}


class DebiasRequest(JobRequest):
    """The body of ``POST /jobs/debias``."""

    AMNESIA_TAKES = "a condition"

    attribute: OwnClassesJudge
    target_distribution: Annotated[
        dict[ClassName, Fraction],
        Field(min_length=2, max_length=100, description="the fraction of samples of every class; 0 for none of it"),
    ]
    tolerance: Annotated[float, Field(ge=0.01, le=0.5, description="how far off each fraction may be")] = 0.03
    confidence: Annotated[float, Field(ge=0.5, le=0.9999, description="of the intervals that must lie inside")] = 0.95
    condition: Condition | None = Field(
        None, description="of a conditional model: what it is asked for where its samples are to be spread"
    )
    replacements: Annotated[dict[ClassName, Shown], Field(min_length=1, max_length=100)] | None = Field(
        None,
        validate_default=True,
        description="with a condition: by class of the judge the condition whose samples show it, for every class with "
        "a fraction above 0",
    )
    method: AskedMethod = Field("auto", validate_default=True)
    parameters: Options = Field(
        default_factory=_nothing, validate_default=True, description="of the method; see its options"
    )
    criteria: DebiasCriteria = DebiasCriteria()

    _distribution = field_validator("target_distribution")(sums_to_one)

    @field_validator("replacements")
    @classmethod
    def _of_a_condition(cls, value: dict[str, Shown] | None, info: ValidationInfo) -> dict[str, Shown] | None:
        if "condition" in info.data and (value is None) != (info.data["condition"] is None):
            raise ValueError("condition and replacements go together: by class of the judge, what shows it")
        return value

    @classmethod
    def _fitting(cls, given: dict[str, Any]) -> tuple[tuple[Method, ...], str] | None:
        attribute: OwnClassesJudge | None = given.get("attribute")
        if attribute is None or "condition" not in given:
            return None
        if given["condition"] is not None:
            return (AMNESIA,), "a condition takes"
        if attribute.classes:
            return ("class-removal",), "the checkpoint's own classes take"
        return ("steering",), "an attribute takes"

    def _amnesia_defaults(self) -> dict[str, Any]:
        return {"criteria": self._criteria_with(others_within=OTHERS_WITHIN)}

    def subjects(self) -> dict[str, str]:
        """The labelled sets of its attribute, by JSON pointer."""
        return self.attribute.image_sets("/attribute")

    def judges(self) -> dict[str, Judge]:
        """The judge of its attribute, by JSON pointer."""
        return {"/attribute": self.attribute}
