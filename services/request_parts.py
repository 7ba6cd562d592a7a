"""The parts that the bodies of jobs are made of, each checked on its own."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from services.ids import ID_PATTERNS

__all__ = [
    "Attribute",
    "CheckpointId",
    "ClassName",
    "Criteria",
    "EvaluationRequest",
    "ForgetCriteria",
    "Images",
    "Judge",
    "OwnClassesJudge",
    "Part",
    "Remember",
    "Replacement",
    "SampleEvaluation",
    "Target",
    "escaped",
    "small_metadata",
    "sums_to_one",
]

CheckpointId = Annotated[str, Field(pattern=ID_PATTERNS["ckpt"], examples=["ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ClassifierId = Annotated[str, Field(pattern=ID_PATTERNS["clf"], examples=["clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ImageSetId = Annotated[str, Field(pattern=ID_PATTERNS["imgs"], examples=["imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ClassLabel = Annotated[int, Field(ge=0, le=100_000, strict=True)]
ClassName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]
LabelledSets = Annotated[
    dict[ClassName, ImageSetId],
    Field(min_length=2, max_length=100, description="image sets by the class that they show, at least two"),
]

METADATA_CHARACTERS = 16_384
ATTRIBUTES = 16
ROUNDING = 1e-6  # fractions as people write them


class Part(BaseModel):
    """A part of a body: nothing unknown, nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(Part):
    """An uploaded image set."""

    images: ImageSetId


class Remember(Part):
    """What must stay: an image set, or ``generated`` samples of the base model (the default, 1,024 of them)."""

    images: ImageSetId | None = None
    generated: Annotated[int, Field(ge=64, le=20_000)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Remember:
        if (self.images is None) == (self.generated is None):
            raise ValueError("give either images or generated")
        return self


class Judge(Part):
    """Who says which class an image shows: a classifier from the store, or image sets to train one from."""

    classifier: ClassifierId | None = None
    sets: LabelledSets | None = None

    @model_validator(mode="after")
    def _one_judge(self) -> Judge:
        if (self.classifier is None) == (self.sets is None):
            raise ValueError('give either "classifier" or "sets"')
        return self

    @field_validator("sets")
    @classmethod
    def _each_set_once(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        if value is not None and len(set(value.values())) < len(value):
            raise ValueError("two classes have the same image set; an image shows one class of an attribute")
        return value

    def image_sets(self, pointer: str) -> dict[str, str]:
        """Its labelled sets, by JSON pointer."""
        return {f"{pointer}/sets/{escaped(name)}": images for name, images in (self.sets or {}).items()}

    def classifiers(self, pointer: str) -> dict[str, str]:
        """Its classifier, by JSON pointer."""
        return {f"{pointer}/classifier": self.classifier} if self.classifier else {}


class OwnClassesJudge(Judge):
    """Who says which class a sample shows; ``classes`` is the checkpoint's own classes, where it has a class prior."""

    classes: bool | None = Field(None, description="true: the classes of the checkpoint itself, exact, in closed form")

    @model_validator(mode="after")
    def _one_judge(self) -> OwnClassesJudge:
        if sum((self.classifier is not None, self.sets is not None, self.classes is True)) != 1:
            raise ValueError('give one of "classifier", "sets" and "classes": true')
        return self


class Attribute(Judge):
    """How often samples may show a class: at most, or at least, this fraction of them."""

    name: ClassName = Field(alias="class", description="one of the classifier's classes, or of the sets")
    at_most: float | None = Field(None, ge=0.001, lt=1)
    at_least: float | None = Field(None, gt=0, le=0.999)

    @model_validator(mode="after")
    def _one_bound(self) -> Attribute:
        if (self.at_most is None) == (self.at_least is None):
            raise ValueError("give either at_most or at_least")
        if self.sets is not None and self.name not in self.sets:
            raise ValueError(f'"class" is none of the sets; they are: {", ".join(self.sets)}')
        return self


class Target(Part):
    """What to forget: what images show, how often samples show attributes, or a class of a model that has classes.

    ``where`` says whether a class is taken out of the weights (unlearning, the default; send ``images`` of the class
    with it) or at the prior (its sampling is switched off: access removal, exact and at once).
    """

    images: ImageSetId | None = Field(None, description="of what is to be forgotten")
    attributes: Annotated[list[Attribute], Field(min_length=1, max_length=ATTRIBUTES)] | None = None
    class_label: ClassLabel | None = None
    where: Literal["weights", "prior"] | None = Field(
        None, validate_default=True, description="of a class_label; default weights"
    )

    @field_validator("where")
    @classmethod
    def _in_the_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        """The default of a class, spelled out."""
        return "weights" if value is None and info.data.get("class_label") is not None else value

    @model_validator(mode="after")
    def _one_target(self) -> Target:
        if self.class_label is None:
            if (self.images is None) == (self.attributes is None):
                raise ValueError('give one of "images", "attributes" and "class_label"')
            if self.where is not None:
                raise ValueError('"where" goes with a class_label')
        elif self.attributes is not None or (self.images is not None and self.at_prior):
            raise ValueError('a class_label stands alone, or in the weights with "images" of that class')
        return self

    @field_validator("attributes")
    @classmethod
    def _possible(cls, value: list[Attribute] | None) -> list[Attribute] | None:
        """No class twice, and no more asked for than there is."""
        seen: dict[tuple[Any, ...], dict[str, float]] = {}
        for attribute in value or []:
            judge = (attribute.classifier, tuple(sorted((attribute.sets or {}).items())))
            floors = seen.setdefault(judge, {})
            if attribute.name in floors:
                raise ValueError(f"the class {attribute.name} has two bounds of the same judge; give one")
            floors[attribute.name] = attribute.at_least or 0.0
            if math.fsum(floors.values()) > 1 + ROUNDING:
                raise ValueError("the fractions that the classes of one judge shall have at least sum to more than 1")
        return value

    @property
    def at_prior(self) -> bool:
        """Whether a class is to be taken out at the prior."""
        return self.where == "prior"

    def image_sets(self) -> dict[str, str]:
        """The image sets that it names, by JSON pointer."""
        sets = {"/target/images": self.images} if self.images else {}
        for number, attribute in enumerate(self.attributes or []):
            sets |= attribute.image_sets(f"/target/attributes/{number}")
        return sets


class Replacement(Part):
    """What a model of classes makes in place of the one it forgets: another of its classes, or what images show."""

    class_label: ClassLabel | None = None
    images: ImageSetId | None = None

    @model_validator(mode="after")
    def _one_replacement(self) -> Replacement:
        if (self.class_label is None) == (self.images is None):
            raise ValueError('give either class_label or images, or "noise"')
        return self


class Criteria(Part):
    """When the job may call itself succeeded."""

    release_weights: Literal["when_met", "always"] = Field(
        "when_met", description="always: a run that misses its criteria fails, yet its weights can be downloaded"
    )


class ForgetCriteria(Criteria):
    """When a job that forgets may call itself succeeded; the fractions are those of selective-amnesia."""

    forgotten_at_most: float | None = Field(
        None,
        ge=0.001,
        le=0.999,
        description="share of samples asked for the forgotten class that show it; default 0.05",
    )
    replaced_at_least: float | None = Field(
        None, ge=0.001, le=0.999, description="share of the same samples that show the replacing class; default 0.9"
    )
    others_within: float | None = Field(
        None, ge=0.001, lt=1, description="how far the other classes may fall in accuracy; default 0.02"
    )


class SampleEvaluation(Part):
    """What the report measures beyond what the job needs."""

    held_out: Images | None = Field(None, description="images of others that the model never saw (D_R^id)")
    sample_grid: bool = Field(False, description="show samples of both models in the report: may show faces")


class EvaluationRequest(SampleEvaluation):
    """What the report measures beyond the forget and remember sets."""

    same_identity: Images | None = Field(None, description="other images of what is forgotten (D'_F)")


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")


def small_metadata(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse metadata that is a document of its own."""
    if len(json.dumps(value)) > METADATA_CHARACTERS:
        raise ValueError(f"metadata takes at most {METADATA_CHARACTERS} characters of JSON")
    return value


def sums_to_one(fractions: dict[str, float]) -> dict[str, float]:
    """Refuse fractions that are no distribution."""
    total = math.fsum(fractions.values())
    if abs(total - 1) > ROUNDING:
        raise ValueError(f"the fractions sum to {total:.6g}; they must sum to 1")
    return fractions
