"""What callers say beside a file that they upload: the queries of those routes, as they go over the wire."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from api.schemas import Name, Output
from services.classifiers import Facts
from services.request_names import ClassName

__all__ = ["ClassifierQuery", "Family", "UploadBody", "UploadQuery", "UploadWhole"]

Family = Literal[
    "glow", "realnvp", "maf", "iaf", "tarflow", "class-prior", "vae", "ddpm", "stable-diffusion", "stable-diffusion-xl"
]  # fmt: skip
Prediction = Literal["epsilon", "v_prediction"]
THRESHOLDS = {"logits": 0.5, "probabilities": 0.5, "score": 0.0}


class UploadQuery(BaseModel):
    """The query of ``POST /checkpoints``: what a checkpoint's owner says of it that its tensors' shapes do not tell."""

    model_config = ConfigDict(extra="forbid")

    name: Name = "checkpoint"
    image_size: Annotated[int, Field(ge=2, le=1024, description="side of the images in pixels")] | None = None
    n_bits: Annotated[int, Field(ge=1, le=8, description="bits per channel the model was trained on")] | None = None
    family: Family | None = None
    noise_std: (
        Annotated[
            float,
            Field(
                ge=0,
                le=1,
                description="of a TarFlow's noise on images in [-1, 1], as in the names of published files",
            ),
        ]
        | None
    ) = None
    prediction_type: (
        Annotated[
            Prediction,
            Field(description="what a diffusion model predicts, where its file does not say: noise, or velocity"),
        ]
        | None
    ) = None

    def declared(self) -> dict[str, Any]:
        """What is said about the model."""
        return self.model_dump(exclude_none=True, exclude={"name", "bytes"})


class UploadBody(UploadQuery):
    """The body of ``POST /checkpoints/uploads``."""

    bytes: Annotated[int, Field(ge=1, description="of the whole file")]


class UploadWhole(BaseModel):
    """The body of ``POST /checkpoints/uploads/{id}/complete``."""

    model_config = ConfigDict(extra="forbid")

    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="of the whole file, in hexadecimal")]


def _split(value: Any) -> Any:
    """``a,b`` and ``c`` as three members: one parameter with commas, or the parameter again and again."""
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list):
        return value
    return [part.strip() for text in value for part in str(text).split(",")]


Figures = Annotated[
    list[Annotated[float, Field(allow_inf_nan=False)]],
    BeforeValidator(_split),
    Field(max_length=3, description="one value, or one for each channel, separated by commas"),
]


class ClassifierQuery(BaseModel):
    """The query of ``POST /classifiers``."""

    model_config = ConfigDict(extra="forbid")

    name: Name = "classifier"
    classes: Annotated[
        list[ClassName],
        BeforeValidator(_split),
        Field(
            min_length=2,
            max_length=1000,
            description="names in the order of the output, separated by commas; of a single figure the second is the "
            "one that it speaks for",
        ),
    ]
    output: Annotated[Output, Field(description="what a row of the output is")] = "logits"
    threshold: Annotated[
        float | None,
        Field(
            allow_inf_nan=False,
            description="from which value on an image is of the second of two classes: a probability (default 0.5), or "
            "of a score its own figure (default 0)",
        ),
    ] = None
    mean: Figures = []
    std: Figures = []

    @field_validator("classes")
    @classmethod
    def _once_each(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("two classes have the same name")
        return value

    @field_validator("std")
    @classmethod
    def _positive(cls, value: list[float]) -> list[float]:
        if any(figure <= 0 for figure in value):
            raise ValueError("a standard deviation is greater than 0")
        return value

    @model_validator(mode="after")
    def _agreeing(self) -> Self:
        if len(self.mean) != len(self.std) or len(self.mean) == 2:
            raise _wrong("mean", "mean and std go together: one value each, or one for each of three channels")
        if self.output == "score" and len(self.classes) != 2:
            raise _wrong("output", "a score tells two classes apart; name two")
        if self.threshold is not None and len(self.classes) != 2:
            raise _wrong("threshold", "it parts two classes; of more the largest figure decides")
        if self.threshold is not None and self.output != "score" and not 0 < self.threshold < 1:
            raise _wrong("threshold", "it is a probability between 0 and 1 where output is not score")
        return self

    def facts(self) -> Facts:
        """What is said about the classifier."""
        threshold = THRESHOLDS[self.output] if self.threshold is None else self.threshold
        scale = {"mean": self.mean, "std": self.std} if self.mean else None
        return Facts(self.name, self.classes, self.output, threshold, scale)


def _wrong(parameter: str, told: str) -> ValidationError:
    fault = PydanticCustomError("parameters_disagree", "{told}", {"told": told})
    return ValidationError.from_exception_data("query", [InitErrorDetails(type=fault, loc=(parameter,), input=None)])
