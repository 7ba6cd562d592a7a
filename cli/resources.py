"""The service's resources as typed values: what this client knows by name, and the rest in ``wire``.

A newer service may send more members than are named here: they are kept in ``wire`` and break nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

__all__ = ["Artifact", "Checkpoint", "Classifier", "Event", "ImageSet", "Job", "Progress"]

TERMINAL = ("succeeded", "failed", "cancelled")

Wire = Mapping[str, Any]


def _time(value: Any) -> datetime | None:
    return datetime.fromisoformat(value) if isinstance(value, str) else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a running job is. ``losses`` and ``metrics`` are the method's own names."""

    phase: str | None = None
    step: int | None = None
    total: int | None = None
    eta_seconds: float | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def from_wire(cls, wire: Wire | None) -> Self:
        """Read the ``progress`` member of a job; absent is empty."""
        wire = wire or {}
        return cls(
            wire.get("phase"),
            wire.get("step"),
            wire.get("total"),
            _number(wire.get("eta_seconds")),
            wire.get("losses") or {},
            wire.get("metrics") or {},
        )


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file that a job published."""

    name: str
    media_type: str
    bytes: int
    sha256: str

    @classmethod
    def from_wire(cls, wire: Wire) -> Self:
        """Read one artifact."""
        return cls(wire["name"], wire.get("media_type") or "", int(wire.get("bytes") or 0), wire.get("sha256") or "")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An uploaded model: ``validating``, then ``ready`` or ``rejected``."""

    id: str
    name: str
    status: str
    manifest: Mapping[str, Any] | None
    problem: Mapping[str, Any] | None
    created_at: datetime | None
    wire: Wire

    @classmethod
    def from_wire(cls, wire: Wire) -> Self:
        """Read a checkpoint."""
        return cls(
            wire["id"],
            wire.get("name") or "",
            wire["status"],
            wire.get("manifest"),
            wire.get("problem"),
            _time(wire.get("created_at")),
            wire,
        )

    @property
    def ready(self) -> bool:
        """Whether jobs can use it."""
        return self.status == "ready"


@dataclass(frozen=True, slots=True)
class Classifier:
    """An uploaded judge of attributes, loaded and tried once."""

    id: str
    name: str
    classes: tuple[str, ...]
    created_at: datetime | None
    erased_at: datetime | None
    wire: Wire

    @classmethod
    def from_wire(cls, wire: Wire) -> Self:
        """Read a classifier."""
        classes = tuple(wire.get("classes") or ())
        times = _time(wire.get("created_at")), _time(wire.get("erased_at"))
        return cls(wire["id"], wire.get("name") or "", classes, *times, wire)


@dataclass(frozen=True, slots=True)
class ImageSet:
    """Uploaded images, kept for a day at most and erased with the job whose target they were."""

    id: str
    count: int
    expires_at: datetime | None
    erased_at: datetime | None
    wire: Wire

    @classmethod
    def from_wire(cls, wire: Wire) -> Self:
        """Read an image set."""
        count = wire.get("count") or 0
        return cls(wire["id"], int(count), _time(wire.get("expires_at")), _time(wire.get("erased_at")), wire)


@dataclass(frozen=True, slots=True)
class Job:
    """A request to forget or to debias, and how it goes. ``succeeded`` means that its criteria were met."""

    id: str
    kind: str
    status: str
    phase: str | None
    progress: Progress
    checkpoint: str | None
    attempt: int
    reason: str | None
    problem: Mapping[str, Any] | None
    summary: Mapping[str, Any] | None
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    wire: Wire
    etag: str | None = None

    @classmethod
    def from_wire(cls, wire: Wire, *, etag: str | None = None) -> Self:
        """Read a job."""
        request = wire.get("request") or {}
        return cls(
            id=wire["id"],
            kind=wire.get("kind") or "forget",
            status=wire["status"],
            phase=wire.get("phase"),
            progress=Progress.from_wire(wire.get("progress")),
            checkpoint=wire.get("checkpoint") or request.get("checkpoint"),
            attempt=int(wire.get("attempt") or 0),
            reason=wire.get("reason"),
            problem=wire.get("problem"),
            summary=wire.get("summary"),
            created_at=_time(wire.get("created_at")),
            started_at=_time(wire.get("started_at")),
            finished_at=_time(wire.get("finished_at")),
            wire=wire,
            etag=etag,
        )

    @property
    def finished(self) -> bool:
        """Whether the status is terminal: it will never change again."""
        return self.status in TERMINAL

    @property
    def succeeded(self) -> bool:
        """Whether the job's criteria were met."""
        return self.status == "succeeded"

    @property
    def seconds(self) -> float | None:
        """From the first claim by a worker to the end."""
        if self.started_at is None or self.finished_at is None:
            return None
        return (self.finished_at - self.started_at).total_seconds()


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a job; ids grow."""

    id: int
    type: str
    data: Mapping[str, Any]
    created_at: datetime | None

    @classmethod
    def from_wire(cls, wire: Wire) -> Self:
        """Read one event."""
        return cls(int(wire["id"]), wire["type"], wire.get("data") or {}, _time(wire.get("created_at")))
