"""The parameters of each method, as a caller may set them; what is left out takes the method's own default.

Symbols, ranges and defaults are those of the methods in ``unlearning``, which this room may not import; a test holds
the two together.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from services.errors import InvalidRequest
from services.request_names import escaped

__all__ = [
    "AmnesiaOptions",
    "ClassRemovalOptions",
    "FlowTamingOptions",
    "Method",
    "Options",
    "SteeringOptions",
    "UndecidedOptions",
    "decided_options",
    "options_of",
]

Method = Literal["flow-taming", "steering", "class-removal", "class-taming", "selective-amnesia"]
LossTerm = Literal["forget", "remember", "nll", "kl_forward", "kl_reverse"]
METHODS: tuple[str, ...] = get_args(Method)

MicroBatch = Annotated[int | None, Field(ge=1, le=4096, description="images in one forward pass, bounds the memory")]
Fit = Annotated[
    Literal["crop", "squash", "exact"],
    Field(description="images of another size than the checkpoint's: centre crop, squash, or refuse"),
]


class _Options(BaseModel):
    # strict as the methods: no "4" or true for a number, no 4.0 for a whole one
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FlowTamingOptions(_Options):
    """Parameters of flow taming (arXiv 2211.16488, eq. 8-12): ``unlearning.taming_parameters``."""

    engine: Literal["fast", "paper"] | None = Field(
        None, description="fast: soonest verdict; paper: the published loop; default fast"
    )
    delta: float | None = Field(
        None, gt=0, le=20, description="how many sigma_R past mu_R a forgotten image lies; usual are 2 to 4; default 4"
    )
    tolerance: float | None = Field(
        None, ge=0, le=0.999, description="epsilon / delta: forgotten from delta (1 - tolerance); default 0.15"
    )
    max_steps: int | None = Field(None, ge=1, le=100_000, description="step budget; default 400, paper 800")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Adam's; default 0.004, paper 5e-05")
    without: list[LossTerm] | None = Field(
        None, description="paper: terms of the objective to leave out, each once (Table 2); default none"
    )
    micro_batch: MicroBatch = None
    fit: Fit = "crop"

    @model_validator(mode="after")
    def _something_is_learned(self) -> FlowTamingOptions:
        left_out = self.without or []
        if left_out and self.engine != "paper":
            raise ValueError('without leaves out terms of the published objective; it asks for engine "paper"')
        if len(set(left_out)) < len(left_out):
            raise ValueError("without names a term twice")
        if "forget" in left_out and ("remember" in left_out or set(get_args(LossTerm)) - {"remember"} <= set(left_out)):
            raise ValueError("without leaves out every loss; nothing would be learned")
        return self


class SteeringOptions(_Options):
    """Parameters of steering: ``unlearning.steering_parameters``."""

    max_steps: int | None = Field(None, ge=1, le=100_000, description="step budget; default 600")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Adam's; default 0.001")
    pool: int | None = Field(
        None, ge=64, le=100_000, description="samples of the base model that the steps learn from; default 4096"
    )
    samples: int | None = Field(
        None, ge=100, le=1_000_000, description="fresh samples that decide; default as many as the bounds ask for"
    )
    micro_batch: MicroBatch = None
    fit: Fit = "crop"


class ClassRemovalOptions(_Options):
    """Parameters of removing a class at the prior: it is a closed form, and there is nothing to tune."""

    micro_batch: MicroBatch = None
    fit: Fit = "crop"


class AmnesiaOptions(_Options):
    """Parameters of Selective Amnesia (arXiv 2305.10120, eq. 4): ``unlearning.amnesia_parameters``."""

    mode: Literal["default", "paper"] | None = Field(
        None, description="default: a dimensionless penalty; paper: as published; default default"
    )
    strength: float | None = Field(
        None, ge=0, le=1e9, description="how hard the weights are held where F is large; default 10, paper 100"
    )
    max_steps: int | None = Field(None, ge=1, le=1_000_000, description="step budget; default 2000, paper 10000")
    learning_rate: float | None = Field(None, gt=0, le=1, description="Adam's; default 0.001, paper 0.0001")
    batch: int | None = Field(None, ge=1, le=4096, description="surrogate examples in a step; default 256")
    without: list[Literal["replay", "penalty"]] | None = Field(
        None, description="terms of the objective to leave out, each once; default none"
    )
    scope: Literal["all", "decoder", "cross-attention", "all-but-cross-attention"] | None = Field(
        None,
        description="what is trained: all of the model; of a vae also the decoder alone, of a model of prompts also "
        "the cross-attention or all but it; default all",
    )
    null_share: float | None = Field(
        None,
        ge=0,
        le=0.9,
        description="of a guided model: share of replay examples whose condition is dropped; default 0.1, paper 0",
    )
    guidance_scale: float | None = Field(
        None, gt=0, le=100, description="of a guided model: how samples are drawn; default the checkpoint's"
    )
    sampling_steps: int | None = Field(
        None, ge=1, le=1000, description="of a diffusion model: steps of a sample; default the checkpoint's"
    )
    optimiser: Literal["adam", "adam-8bit"] | None = Field(
        None, description="adam-8bit keeps its moments in a quarter of the memory; default adam"
    )
    gradient_checkpointing: bool | None = Field(
        None,
        description="of a diffusion model: recompute activations, less memory for more time; default false, and where "
        "memory asks for it",
    )
    micro_batch: MicroBatch = None
    fit: Fit = "crop"

    @field_validator("guidance_scale", mode="before")
    @classmethod
    def _guided(cls, value: Any) -> Any:
        if value == 0 and not isinstance(value, bool):
            raise ValueError("at a guidance scale of 0 the condition does not count: 1 is without guidance, 7.5 usual")
        return value

    @model_validator(mode="after")
    def _each_term_once(self) -> AmnesiaOptions:
        if len(set(self.without or [])) < len(self.without or []):
            raise ValueError("without names a term twice")
        return self


class UndecidedOptions(BaseModel):
    """Parameters as sent, until the checkpoint has said which method they are for."""

    model_config = ConfigDict(extra="allow", frozen=True)


Options = FlowTamingOptions | SteeringOptions | ClassRemovalOptions | AmnesiaOptions

OPTIONS: dict[str, type[Options]] = {
    "flow-taming": FlowTamingOptions,
    "class-taming": FlowTamingOptions,
    "steering": SteeringOptions,
    "class-removal": ClassRemovalOptions,
    "selective-amnesia": AmnesiaOptions,
}


def options_of(method: str, values: Any) -> Options:
    """The options of a method from JSON values.

    Raises:
        ValidationError: a value is wrong, or an option is another method's.
    """
    options = OPTIONS[method]
    if isinstance(values, dict):
        unknown = [name for name in values if name not in options.model_fields]
        if unknown:
            known = ", ".join(sorted(options.model_fields))
            wrong = PydanticCustomError("unknown_option", f"no option of {method}, which has: {known}")
            errors = [InitErrorDetails(type=wrong, loc=(name,), input=None) for name in unknown]
            raise ValidationError.from_exception_data("parameters", errors)
    return options.model_validate(values)


def decided_options(method: str, options: Options | UndecidedOptions) -> Options:
    """The options once the method is known.

    Raises:
        InvalidRequest: a value is wrong, or an option is another method's.
    """
    if not isinstance(options, UndecidedOptions):
        return options
    try:
        return options_of(method, options.model_extra)
    except ValidationError as error:
        errors = [
            {
                "pointer": "".join(f"/{escaped(str(step))}" for step in ("parameters", *item["loc"])),
                "detail": item["msg"].removeprefix("Value error, "),
            }
            for item in error.errors(include_url=False, include_input=False, include_context=False)
        ]
        detail = "; ".join(f"{item['pointer']}: {item['detail']}" for item in errors[:3])
        raise InvalidRequest(detail, errors=errors) from None
