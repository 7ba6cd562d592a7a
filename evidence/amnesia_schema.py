"""The report on a forgotten condition as data: its schema, beside those of `evidence.schema`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evidence.schema import Curve, Document, FractionRow, Interval, JudgeFacts, KidRow, Number, Part, SampleFacts

__all__ = ["AMNESIA_SCHEMA", "BALANCE_SCHEMA", "AmnesiaReport", "BalanceReport", "ConditionReport"]

AMNESIA_SCHEMA: Literal["forgetd.amnesia-report/1"] = "forgetd.amnesia-report/1"
BALANCE_SCHEMA: Literal["forgetd.balance-report/1"] = "forgetd.balance-report/1"


class ShownPart(Part):
    """What a judge says of one model's samples under the forgotten condition."""

    probability: Interval | None = Field(description="mean P(y = forgotten); null: the judge tells labels alone")
    entropy: Interval | None = Field(description="mean entropy of the judge's answers, nats; null likewise")
    unrecognisable: Interval | None = Field(description="share without a class of probability 0.5 or more")


class KeptRow(Part):
    """How often samples of a class that stays are taken for what they are."""

    label: str
    shows: str | None = Field(
        default=None, description="the class of the judge that the base mostly shows; null: its own"
    )
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


class SpreadPart(Part):
    """What samples of the changed model cover of the base's, under the conditions that stay."""

    precision: Interval = Field(description="share of its samples that look like some of the base's")
    recall: Interval = Field(description="share of the base's that look like some of its")
    fid: Number = Field(description="Frechet distance; null: of too few samples. FID of Inception's features alone")
    n: int
    extractor: str


class AmnesiaJudge(JudgeFacts):
    """Who judged."""

    independent: bool = Field(description="false: it learned from the base's own samples")
    entropy_most: float = Field(description="log k, nats: the entropy of an answer that favours no class")


class ConditionReport(Document):
    """A conditional model one condition of which was changed, judged by a classifier on its samples."""

    shares: tuple[FractionRow, ...] = Field(description="of samples under the changed condition, by what they show")
    curves: tuple[Curve, ...]
    kept: tuple[KeptRow, ...]
    drop: DropPart
    kid: KidRow
    spread: SpreadPart
    drift: Number = Field(description="Fisher-weighted square of the weights' movement, relative to the weights")
    rollbacks: int = Field(description="times that a step was not finite and was undone")
    data: SampleFacts


class AmnesiaReport(ConditionReport):
    """A conditional model that forgot a condition."""

    schema_version: Literal["forgetd.amnesia-report/1"] = Field(default=AMNESIA_SCHEMA, alias="schema")
    forgotten: str
    replacement: str = Field(description="what is to be shown instead, in words")
    before: ShownPart
    after: ShownPart
    judge: AmnesiaJudge


class IngredientPart(Part):
    """A condition whose samples the balanced one learned from."""

    condition: str
    fraction: float = Field(description="share of what it learned from")
    shows: dict[str, Number] = Field(description="by class of the judge, its share of these samples")


class BalanceReport(ConditionReport):
    """A conditional model one condition of which was to show classes of a judge as often as asked."""

    schema_version: Literal["forgetd.balance-report/1"] = Field(default=BALANCE_SCHEMA, alias="schema")
    condition: str
    target: dict[str, float] = Field(description="by class of the judge, the share that was asked for")
    tolerance: float
    ingredients: tuple[IngredientPart, ...]
    expected: dict[str, Number] = Field(description="by class, its share of what the condition learned from")
    read_otherwise: Interval = Field(
        description="share of pairs of samples of the others, from equal latents, that are taken for another class"
    )
    judge: JudgeFacts
