"""What a caller may ask for: the typed body of a job, checked at the door and stored with the job."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from services.ids import ID_PATTERNS

__all__ = ["Criteria", "EvaluationRequest", "FlowTamingOptions", "ForgetRequest", "Images", "Remember"]

CheckpointId = Annotated[str, Field(pattern=ID_PATTERNS["ckpt"], examples=["ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]
ImageSetId = Annotated[str, Field(pattern=ID_PATTERNS["imgs"], examples=["imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"])]

METADATA_CHARACTERS = 16_384


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Images(_Strict):
    """An uploaded image set."""

    images: ImageSetId


class Remember(_Strict):
    """What must stay: an image set, or ``generated`` samples of the base model (the default, 1,024 of them)."""

    images: ImageSetId | None = None
    generated: Annotated[int, Field(ge=64, le=20_000)] | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Remember:
        if (self.images is None) == (self.generated is None):
            raise ValueError("give either images or generated")
        return self


class FlowTamingOptions(_Strict):
    """Parameters of flow taming; what is left out takes the method's default and is spelled out in the report.

    Symbols, ranges and defaults are those of ``unlearning.taming_parameters`` (arXiv 2211.16488, eq. 8-12), which this
    room may not import; a test holds the two together.
    """

    model_config = ConfigDict(strict=True)  # as the method: no "4" or true for a number, no 4.0 for a whole one

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
    micro_batch: int | None = Field(None, ge=1, le=4096, description="images in one forward pass, bounds the memory")
    fit: Literal["crop", "squash", "exact"] = Field(
        "crop", description="images of another size than the checkpoint's: centre crop, squash, or refuse"
    )


class Criteria(_Strict):
    """When the job may call itself succeeded."""

    release_weights: Literal["when_met", "always"] = Field(
        "when_met", description="always: a run that misses its criteria fails, yet its weights can be downloaded"
    )


class EvaluationRequest(_Strict):
    """What the report measures beyond the forget and remember sets."""

    same_identity: Images | None = Field(None, description="other images of what is forgotten (D'_F)")
    held_out: Images | None = Field(None, description="images of others that the model never saw (D_R^id)")
    sample_grid: bool = Field(False, description="show samples of both models in the report: may show faces")


class ForgetRequest(_Strict):
    """The body of ``POST /jobs/forget``."""

    checkpoint: CheckpointId
    target: Images
    remember: Remember = Remember(generated=1024)
    method: Literal["auto", "flow-taming"] = "auto"
    parameters: FlowTamingOptions = FlowTamingOptions()
    criteria: Criteria = Criteria()
    evaluation: EvaluationRequest = EvaluationRequest()
    seed: Annotated[int, Field(ge=0, lt=2**53)] | None = Field(None, description="unset: drawn, and reported")
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    metadata: dict[str, Any] = Field(default_factory=dict, description="yours; returned as sent, never interpreted")

    @field_validator("metadata")
    @classmethod
    def _small(cls, value: dict[str, Any]) -> dict[str, Any]:
        if len(json.dumps(value)) > METADATA_CHARACTERS:
            raise ValueError(f"metadata takes at most {METADATA_CHARACTERS} characters of JSON")
        return value

    def image_sets(self) -> dict[str, str]:
        """The image sets that the job reads, by JSON pointer."""
        sets = {"/target/images": self.target.images}
        if self.remember.images:
            sets["/remember/images"] = self.remember.images
        if self.evaluation.same_identity:
            sets["/evaluation/same_identity/images"] = self.evaluation.same_identity.images
        if self.evaluation.held_out:
            sets["/evaluation/held_out/images"] = self.evaluation.held_out.images
        return sets
