"""The resources as they go over the wire."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, Field

from services import results
from services.lookups import JobView
from services.tables import Checkpoint, Classifier, ImageSet, Job
from services.uploads import Upload

__all__ = [
    "ArtifactList",
    "ArtifactResource",
    "CheckpointPage",
    "CheckpointResource",
    "ClassifierPage",
    "ClassifierResource",
    "DownloadLink",
    "EventPage",
    "EventResource",
    "ImageSetResource",
    "JobPage",
    "JobResource",
    "UploadPart",
    "UploadParts",
    "UploadResource",
]

Output = Literal["logits", "probabilities", "score"]
Status = Literal["queued", "running", "cancelling", "succeeded", "failed", "cancelled"]


Name = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[^\x00-\x1f\x7f]+$", description="yours, for lists")
]


class FileFacts(BaseModel):
    """Size and digest of a file."""

    bytes: int
    sha256: str


class CheckpointResource(BaseModel):
    """An uploaded model: ``validating``, then ``ready`` or ``rejected``."""

    id: str
    name: str
    status: Literal["validating", "ready", "rejected"]
    declared: dict[str, Any]
    manifest: dict[str, Any] | None = Field(description="what validation found; null before")
    problem: dict[str, Any] | None = Field(description="why it was rejected")
    source: FileFacts = Field(description="the file as uploaded")
    weights: FileFacts | None = Field(description="the validated safetensors file; null before")
    created_at: datetime

    @classmethod
    def of(cls, row: Checkpoint) -> Self:
        """From its row."""
        weights = None
        if row.weights_bytes is not None and row.weights_sha256 is not None:
            weights = FileFacts(bytes=row.weights_bytes, sha256=row.weights_sha256)
        return cls.model_validate(
            {
                "id": row.id,
                "name": row.name,
                "status": row.status,
                "declared": row.declared,
                "manifest": row.manifest,
                "problem": row.problem,
                "source": {"bytes": row.source_bytes, "sha256": row.source_sha256},
                "weights": weights,
                "created_at": row.created_at,
            }
        )


class UploadResource(BaseModel):
    """A large model on its way to the store, in parts."""

    id: str = Field(description="the checkpoint's, once the upload is complete")
    bytes: int = Field(description="of the whole file")
    part_bytes: int = Field(description="of every part but the last")
    expires_at: datetime

    @classmethod
    def of(cls, upload: Upload) -> Self:
        """From its record."""
        return cls.model_validate({name: getattr(upload, name) for name in UploadResource.model_fields})


class UploadPart(BaseModel):
    """A part that has not arrived."""

    number: int
    first: int = Field(description="byte of the file")
    bytes: int
    url: str = Field(description="takes the part by PUT, for a while; give it no API key")


class UploadParts(UploadResource):
    """An upload and what is missing of it."""

    missing: list[UploadPart] = Field(description="empty: complete it")


class ClassifierResource(FileFacts):
    """A judge of attributes: an ONNX file that was loaded and tried once."""

    id: str
    name: str
    classes: list[str] = Field(description="in the order of the output")
    output: Output
    threshold: float = Field(description="from which value on an image is of the second of two classes")
    scale: Literal["unit"] | dict[str, list[float]] = Field(
        description='what it is given: "unit" is pixel / 255, mean and std are (pixel / 255 - mean) / std'
    )
    channels: int | None = Field(description="of the images it takes; null: any")
    size: int | None = Field(description="side of the images it takes, in pixels; null: any")
    created_at: datetime
    erased_at: datetime | None

    @classmethod
    def of(cls, row: Classifier) -> Self:
        """From its row."""
        names = (*FileFacts.model_fields, "id", "name", "classes", "output", "threshold", "channels", "size")
        times = ("created_at", "erased_at")
        return cls.model_validate(
            {name: getattr(row, name) for name in (*names, *times)} | {"scale": row.scale or "unit"}
        )


class ImageSetResource(BaseModel):
    """Uploaded images, kept until ``expires_at`` at the latest."""

    id: str
    count: int
    total_bytes: int = Field(description="of the stored PNGs")
    modes: dict[str, int] = Field(description="how many are grey (L) and how many RGB; empty once erased")
    smallest: tuple[int, int] | None = Field(description="least width and height; null once erased")
    largest: tuple[int, int] | None = Field(description="greatest width and height; null once erased")
    duplicates_dropped: int | None = Field(None, description="at upload: images with the pixels of an earlier one")
    created_at: datetime
    expires_at: datetime
    erased_at: datetime | None

    @classmethod
    def of(cls, row: ImageSet, *, duplicates_dropped: int | None = None) -> Self:
        """From its row."""
        widths = [image["width"] for image in row.images]
        heights = [image["height"] for image in row.images]
        modes = [image["mode"] for image in row.images]
        return cls(
            id=row.id,
            count=row.count,
            total_bytes=row.total_bytes,
            modes={mode: modes.count(mode) for mode in sorted(set(modes))},
            smallest=(min(widths), min(heights)) if widths else None,
            largest=(max(widths), max(heights)) if widths else None,
            duplicates_dropped=duplicates_dropped,
            created_at=row.created_at,
            expires_at=row.expires_at,
            erased_at=row.erased_at,
        )


class ArtifactResource(FileFacts):
    """A file that a job published."""

    name: str
    media_type: str


class JobResource(BaseModel):
    """A job. ``succeeded`` means that its criteria were met."""

    id: str
    kind: Literal["forget", "debias"]
    status: Status
    phase: str | None = Field(
        description="of the running attempt: validating, fisher, unlearning, evaluating, publishing"
    )
    checkpoint: str
    request: dict[str, Any] = Field(description="as accepted, with defaults")
    seed: int
    attempt: int
    progress: dict[str, Any] | None = Field(description="phase, step, total, eta_seconds, losses, metrics")
    reason: str | None = Field(
        description="of a failure, for programs: criteria_not_met, user_error, out_of_memory, attempts_exhausted, "
        "deadline_exceeded, internal"
    )
    problem: dict[str, Any] | None = Field(description="of a failure, for people")
    summary: dict[str, Any] | None = Field(description="headline figures of the report")
    artifacts: list[ArtifactResource]
    metadata: dict[str, Any]
    cancel_requested_at: datetime | None
    deadline_at: datetime | None = Field(description="by when it must have succeeded; null: whenever")
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    @classmethod
    def of(cls, row: Job | JobView) -> Self:
        """From its row."""
        own = ("id", "kind", "status", "phase", "seed", "attempt", "progress", "reason", "problem", "summary")
        times = ("cancel_requested_at", "deadline_at", "created_at", "started_at", "finished_at")
        return cls.model_validate(
            {name: getattr(row, name) for name in (*own, *times)}
            | {
                "checkpoint": row.checkpoint_id,
                "request": {name: value for name, value in row.request.items() if name != "metadata"},
                "metadata": row.request.get("metadata", {}),
                "artifacts": results.published(row),
            }
        )


class EventResource(BaseModel):
    """Something that happened to a job; ids grow."""

    id: int
    type: str
    data: dict[str, Any]
    created_at: datetime


class DownloadLink(FileFacts):
    """A link that gives one file to whoever holds it, for a while."""

    name: str
    media_type: str
    url: str
    expires_at: datetime


Cursor = Annotated[str | None, Field(description="send it as ?after= for the next page; null on the last one")]


class CheckpointPage(BaseModel):
    """Checkpoints, newest first."""

    items: list[CheckpointResource]
    has_more: bool
    next_cursor: Cursor


class ClassifierPage(BaseModel):
    """Classifiers, newest first."""

    items: list[ClassifierResource]
    has_more: bool
    next_cursor: Cursor


class JobPage(BaseModel):
    """Jobs, newest first."""

    items: list[JobResource]
    has_more: bool
    next_cursor: Cursor


class EventPage(BaseModel):
    """Events, oldest first."""

    items: list[EventResource]
    has_more: bool
    next_cursor: Cursor


class ArtifactList(BaseModel):
    """What a job published."""

    items: list[ArtifactResource]
