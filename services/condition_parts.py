"""The parts of bodies that are about conditional models: what they are asked for, and what stays or stands in."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator, model_validator

from services.request_names import (
    Aliases,
    ClassLabel,
    ClassName,
    ConceptName,
    ImageSetId,
    Part,
    escaped,
    named_once,
    plain,
)
from services.request_parts import Judge, exactly_one, shown_apart

__all__ = ["ConceptJudge", "Condition", "Remember", "Replacement", "Shown"]

GENERATED = 1024


class Remember(Part):
    """What must stay: an image set, or ``generated`` samples of the base model (the default, 1,024 of them).

    Of a model of prompts: ``generated`` samples of ``concepts``, or ``sets`` of images by the concept that they show.
    """

    images: ImageSetId | None = None
    concepts: Annotated[list[ConceptName], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="of a model of prompts: what the generated samples show, each as often"
    )
    sets: Annotated[dict[ConceptName, ImageSetId], Field(min_length=1, max_length=100)] | None = Field(
        None, description="of a model of prompts: image sets by the concept that they show"
    )
    generated: Annotated[int, Field(ge=64, le=20_000)] | None = Field(
        None, validate_default=True, description="samples; with concepts 1024 where unset"
    )

    @field_validator("concepts")
    @classmethod
    def _each_concept_once(cls, value: list[str] | None) -> list[str] | None:
        named_once(value or [])
        return value

    @field_validator("sets")
    @classmethod
    def _each_set_once(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        named_once(list(value or {}))
        shown_apart("two concepts have the same image set; send each its own", value)
        return value

    @field_validator("generated")
    @classmethod
    def _enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        concepts = info.data.get("concepts")
        if concepts is None:
            return value
        if value is not None and value < len(concepts):
            raise ValueError(
                f"{value} samples cannot show {len(concepts)} concepts; draw {len(concepts)} at least, better thousands"
            )
        return GENERATED if value is None else value

    @model_validator(mode="after")
    def _one_of_them(self) -> Remember:
        sentence = "give one of images, generated (with concepts, of a model of prompts) and sets"
        exactly_one(sentence, self.images, self.sets, self.generated)
        return self

    @property
    def named(self) -> dict[str, str]:
        """The concepts that are to stay, by JSON pointer."""
        if self.sets is not None:
            return {f"/remember/sets/{escaped(name)}": name for name in self.sets}
        return {f"/remember/concepts/{number}": name for number, name in enumerate(self.concepts or [])}

    def image_sets(self) -> dict[str, str]:
        """The image sets that it names, by JSON pointer."""
        sets = {"/remember/images": self.images} if self.images else {}
        return sets | {f"/remember/sets/{escaped(name)}": images for name, images in (self.sets or {}).items()}


class Shown(Part):
    """What a conditional model is asked for: a class, or a concept where it takes prompts."""

    class_label: ClassLabel | None = None
    concept: ConceptName | None = None

    @model_validator(mode="after")
    def _one_condition(self) -> Shown:
        exactly_one("give either class_label or concept", self.class_label, self.concept)
        return self

    @property
    def identity(self) -> int | str:
        """What tells it from others."""
        return plain(self.concept) if self.concept is not None else int(self.class_label or 0)


class Condition(Shown):
    """What a conditional model is asked for, by every name that it has."""

    aliases: Aliases | None = Field(None, description="of a concept")

    @model_validator(mode="after")
    def _of_a_concept(self) -> Condition:
        if self.aliases and self.concept is None:
            raise ValueError("aliases go with a concept")
        named_once([name for name in (self.concept, *(self.aliases or [])) if name is not None])
        return self


class Replacement(Part):
    """What a conditional model makes in place of what it forgets: another condition, or what images show."""

    class_label: ClassLabel | None = None
    concept: ConceptName | None = None
    images: ImageSetId | None = None

    @model_validator(mode="after")
    def _one_replacement(self) -> Replacement:
        sentence = 'give one of class_label, concept and images, or "noise", or "others"'
        exactly_one(sentence, self.class_label, self.concept, self.images)
        return self


class ConceptJudge(Judge):
    """Who says what an image shows; of a model of prompts also which of its classes shows which concept."""

    shows: Annotated[dict[ConceptName, ClassName], Field(min_length=1, max_length=1000)] | None = Field(
        None, description="of a concept: the judge's class by concept; default the class of the same name"
    )

    @field_validator("shows")
    @classmethod
    def _each_concept_once(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        named_once(list(value or {}))
        return value
