"""The names and numbers that the bodies of jobs are written in, and what tells two concepts apart."""

from __future__ import annotations

import re
import unicodedata
from datetime import datetime
from typing import Annotated, Any

from pydantic import AfterValidator, AwareDatetime, BaseModel, BeforeValidator, ConfigDict, Field

from services.ids import ID_PATTERNS

__all__ = [
    "Aliases",
    "CheckpointId",
    "ClassLabel",
    "ClassName",
    "ClassifierId",
    "ConceptName",
    "Deadline",
    "ImageSetId",
    "Part",
    "escaped",
    "named_once",
    "plain",
]

CheckpointId = Annotated[str, Field(pattern=ID_PATTERNS["ckpt"], examples=["ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ClassifierId = Annotated[str, Field(pattern=ID_PATTERNS["clf"], examples=["clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ImageSetId = Annotated[str, Field(pattern=ID_PATTERNS["imgs"], examples=["imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ClassLabel = Annotated[int, Field(ge=0, le=100_000, strict=True)]
ClassName = Annotated[str, Field(min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")]


def _words(value: str) -> str:
    """Refuse what would not be read as words in the middle of a prompt."""
    if "{" in value or "}" in value:
        raise ValueError("a concept is put into templates: leave braces out")
    if not value.isprintable() or not value.strip():
        raise ValueError('a concept is a few printable words, such as "a red car"')
    return value


ConceptName = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_words)]
Aliases = Annotated[
    list[ConceptName], Field(min_length=1, max_length=50, description="other names of the concept; none of what stays")
]


RFC_3339 = re.compile(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d{1,9})?([Zz]|[+-]\d\d:\d\d)")


def _moment(value: Any) -> Any:
    """Refuse what pydantic would take for a time besides: numbers, dates, and times that are everybody's own."""
    if isinstance(value, datetime) or (isinstance(value, str) and RFC_3339.fullmatch(value)):
        return value
    raise ValueError("a deadline is a time with its offset, as in RFC 3339: 2026-12-31T18:00:00Z")


Deadline = Annotated[
    AwareDatetime,
    BeforeValidator(_moment),
    Field(
        description="by when the job must have succeeded, else it fails and publishes nothing; 90 days ahead at most",
        examples=["2026-12-31T18:00:00Z"],
    ),
]


class Part(BaseModel):
    """A part of a body: nothing unknown, nothing that changes."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def plain(concept: str) -> str:
    """What two spellings of a concept have in common: case, spaces and how accents are composed tell none apart (as
    ``unlearning.prompts``).
    """
    return " ".join(unicodedata.normalize("NFC", concept).split()).casefold()


def named_once(names: list[str]) -> None:
    """Refuse a concept that is named twice, in whatever spelling."""
    if len({plain(name) for name in names}) < len(names):
        raise ValueError("a concept is named twice; case and spaces tell none apart")


def escaped(name: str) -> str:
    """A name as a step of a JSON pointer (RFC 6901)."""
    return name.replace("~", "~0").replace("/", "~1")
