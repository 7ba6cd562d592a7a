"""The report on a forgotten condition as data: its schema, beside those of `evidence.schema`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evidence.schema import Curve, Document, FractionRow, Interval, JudgeFacts, KidRow, Number, Part, SampleFacts

__all__ = ["AMNESIA_SCHEMA", "AmnesiaReport"]

AMNESIA_SCHEMA: Literal["forgetd.amnesia-report/1"] = "forgetd.amnesia-report/1"


class ShownPart(Part):
    """What a judge says of one model's samples under the forgotten condition."""

    probability: Interval | None = Field(description="mean P(y = forgotten); null: the judge tells labels alone")
    entropy: Interval | None = Field(description="mean entropy of the judge's answers, nats; null likewise")
    unrecognisable: Interval | None = Field(description="share without a class of probability 0.5 or more")


class KeptRow(Part):
    """How often samples of a class that stays are taken for what they are."""

    label: str
    before: Interval
    after: Interval
    n: int


class DropPart(Part):
    """By how much fewer samples of what stays are recognised, over pairs from equal latents."""

    value: Number
    upper: Number = Field(description="of its one-sided interval")
    allowed: float
    lost: int
    gained: int
    n: int
    confidence: float


class AmnesiaJudge(JudgeFacts):
    """Who judged."""

    independent: bool = Field(description="false: it learned from the base's own samples")
    entropy_most: float = Field(description="log k, nats: the entropy of an answer that favours no class")


class AmnesiaReport(Document):
    """A conditional model that forgot a condition, judged by a classifier on its samples."""

    schema_version: Literal["forgetd.amnesia-report/1"] = Field(default=AMNESIA_SCHEMA, alias="schema")
    forgotten: str
    replacement: str = Field(description="what is to be shown instead, in words")
    shares: tuple[FractionRow, ...] = Field(description="of samples under the forgotten condition, by what they show")
    before: ShownPart
    after: ShownPart
    curves: tuple[Curve, ...]
    kept: tuple[KeptRow, ...]
    drop: DropPart
    kid: KidRow
    judge: AmnesiaJudge
    drift: Number = Field(description="Fisher-weighted square of the weights' movement, relative to the weights")
    rollbacks: int = Field(description="times that a step was not finite and was undone")
    data: SampleFacts
