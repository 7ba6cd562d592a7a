"""The parts that the bodies of jobs are made of, each checked on its own."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from services.request_names import (
    Aliases,
    ClassifierId,
    ClassLabel,
    ClassName,
    ConceptName,
    ImageSetId,
    Part,
    escaped,
    named_once,
)

__all__ = [
    "Attribute",
    "Criteria",
    "DebiasCriteria",
    "EvaluationRequest",
    "ForgetCriteria",
    "Images",
    "Judge",
    "OwnClassesJudge",
    "SampleEvaluation",
    "Target",
    "exactly_one",
    "shown_apart",
    "small_metadata",
    "sums_to_one",
]

LabelledSets = Annotated[
    dict[ClassName, ImageSetId],
    Field(min_length=2, max_length=100, description="image sets by the class that they show, at least two"),
]

METADATA_CHARACTERS = 16_384
ATTRIBUTES = 16
ROUNDING = 1e-6  # fractions as people write them


class Images(Part):
    """An uploaded image set."""

    images: ImageSetId


class Judge(Part):
    """Who says which class an image shows: a classifier from the store, or image sets to train one from."""

    classifier: ClassifierId | None = None
    sets: LabelledSets | None = None

    @model_validator(mode="after")
    def _one_judge(self) -> Judge:
        exactly_one('give either "classifier" or "sets"', self.classifier, self.sets)
        return self

    @field_validator("sets")
    @classmethod
    def _each_set_once(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        shown_apart("two classes have the same image set; an image shows one class of an attribute", value)
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
        own = self.classes or None  # false is no judge
        exactly_one('give one of "classifier", "sets" and "classes": true', self.classifier, self.sets, own)
        return self


class Attribute(Judge):
    """How often samples may show a class: at most, or at least, this fraction of them."""

    name: ClassName = Field(alias="class", description="one of the classifier's classes, or of the sets")
    at_most: float | None = Field(None, ge=0.001, lt=1)
    at_least: float | None = Field(None, gt=0, le=0.999)

    @model_validator(mode="after")
    def _one_bound(self) -> Attribute:
        exactly_one("give either at_most or at_least", self.at_most, self.at_least)
        if self.sets is not None and self.name not in self.sets:
            raise ValueError(f'"class" is none of the sets; they are: {", ".join(self.sets)}')
        return self


class Target(Part):
    """What to forget: what images show, how often samples show attributes, a class of a model, or a concept.

    ``where`` says whether a class is taken out of the weights (unlearning, the default; send ``images`` of the class
    with it) or at the prior (its sampling is switched off: access removal, exact and at once).
    """

    images: ImageSetId | None = Field(None, description="of what is to be forgotten")
    attributes: Annotated[list[Attribute], Field(min_length=1, max_length=ATTRIBUTES)] | None = None
    class_label: ClassLabel | None = None
    concept: ConceptName | None = Field(None, description="of a model of prompts")
    aliases: Aliases | None = None
    where: Literal["weights", "prior"] | None = Field(
        None, validate_default=True, description="of a class_label; default weights"
    )

    @field_validator("aliases")
    @classmethod
    def _of_a_concept(cls, value: list[str] | None, info: ValidationInfo) -> list[str] | None:
        concept = info.data.get("concept")
        if value is not None and concept is None and "concept" in info.data:
            raise ValueError("aliases go with a concept")
        named_once([*([concept] if concept else []), *(value or [])])
        return value

    @field_validator("where")
    @classmethod
    def _in_the_weights(cls, value: str | None, info: ValidationInfo) -> str | None:
        """The default of a class, spelled out."""
        return "weights" if value is None and info.data.get("class_label") is not None else value

    @model_validator(mode="after")
    def _one_target(self) -> Target:
        beside = (self.images, self.attributes, self.concept)
        if self.class_label is None:
            exactly_one('give one of "images", "attributes", "class_label" and "concept"', *beside)
            if self.where is not None:
                raise ValueError('"where" goes with a class_label')
        elif any(beside[1:]) or (self.images is not None and self.at_prior):
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


class Criteria(Part):
    """When the job may call itself succeeded."""

    release_weights: Literal["when_met", "always"] = Field(
        "when_met", description="always: a run that misses its criteria fails, yet its weights can be downloaded"
    )


class DebiasCriteria(Criteria):
    """When a job that debiases may call itself succeeded, beside the distribution that it is asked for."""

    others_within: float | None = Field(
        None, ge=0.001, lt=1, description="of selective-amnesia: how far what stays may fall in accuracy; default 0.02"
    )


class ForgetCriteria(Criteria):
    """When a job that forgets may call itself succeeded; the fractions are those of selective-amnesia."""

    forgotten_at_most: float | None = Field(
        None,
        ge=0.001,
        le=0.999,
        description="share of samples asked for what is forgotten that show it; default 0.05",
    )
    replaced_at_least: float | None = Field(
        None,
        ge=0.001,
        le=0.999,
        description="share of the same samples that show the replacing class or concept; default 0.9",
    )
    others_within: float | None = Field(
        None, ge=0.001, lt=1, description="how far what stays may fall in accuracy; default 0.02"
    )


class SampleEvaluation(Part):
    """What the report measures beyond what the job needs."""

    held_out: Images | None = Field(None, description="images of others that the model never saw (D_R^id)")
    sample_grid: bool = Field(False, description="show samples of both models in the report: may show faces")


class EvaluationRequest(SampleEvaluation):
    """What the report measures beyond the forget and remember sets."""

    same_identity: Images | None = Field(None, description="other images of what is forgotten (D'_F)")


def exactly_one(sentence: str, *given: object) -> None:
    """Refuse, in these words, a part that names none of what excludes each other, or more than one."""
    if sum(one is not None for one in given) != 1:
        raise ValueError(sentence)


def shown_apart(sentence: str, sets: Mapping[str, str] | None) -> None:
    """Refuse, in these words, image sets by what they show of which two are the same."""
    if sets is not None and len(set(sets.values())) < len(sets):
        raise ValueError(sentence)


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
