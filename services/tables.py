"""The database tables. Every row carries its tenant; references across tables carry it too."""

# Annotations stay as they are: SQLAlchemy would evaluate each of their strings, at every import of the gateway.

from datetime import datetime
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Sequence,
    Text,
    UniqueConstraint,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = [
    "FENCING_TOKENS",
    "ApiKey",
    "AuditEvent",
    "Base",
    "Checkpoint",
    "Classifier",
    "IdempotencyRecord",
    "ImageSet",
    "Job",
    "JobEvent",
    "ProcessCounters",
    "Tenant",
    "WorkerSlot",
]

Json = dict[str, Any]


class Base(DeclarativeBase):
    """Declarative base with named constraints, so that migrations can address them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 the declarative API asks for a plain class attribute
        datetime: DateTime(timezone=True),
        Json: JSONB(none_as_null=True),
        list[Json]: JSONB(none_as_null=True),
        str: Text,
    }


# One sequence for every job: a token is larger than every token handed out before it.
FENCING_TOKENS = Sequence("fencing_tokens", metadata=Base.metadata)


class Tenant(Base):
    """Who owns rows and objects."""

    __tablename__ = "tenants"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    max_running_jobs: Mapped[int | None]  # held at once; null: Settings.tenant_running_jobs
    max_open_jobs: Mapped[int | None]  # queued or held at once; null: Settings.tenant_open_jobs
    last_served_at: Mapped[datetime | None]  # when a doorbell last rang for one of its jobs


class ApiKey(Base):
    """A bearer credential; the secret itself is never stored."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    secret_sha256: Mapped[bytes]  # of the 256-bit random secret: no salt or stretching is needed at that entropy
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    revoked_at: Mapped[datetime | None]


class Checkpoint(Base):
    """An uploaded model. ``weights_key`` is set when validation published the safetensors file."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        CheckConstraint("status IN ('validating', 'ready', 'rejected')", name="status"),
        CheckConstraint("(status = 'ready') = (weights_key IS NOT NULL)", name="ready_has_weights"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    status: Mapped[str] = mapped_column(server_default="validating")
    version: Mapped[int] = mapped_column(Integer, server_default="1")
    declared: Mapped[Json]  # what the caller said at upload: family, image_size, n_bits, noise_std, prediction_type
    manifest: Mapped[Json | None]  # what validation found, see models.checkpoints
    problem: Mapped[Json | None]  # why it was rejected
    source_key: Mapped[str | None]  # null once a foreign file was converted and deleted
    source_bytes: Mapped[int] = mapped_column(BigInteger)
    source_sha256: Mapped[str]
    weights_key: Mapped[str | None]
    weights_bytes: Mapped[int | None] = mapped_column(BigInteger)
    weights_sha256: Mapped[str | None]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ImageSet(Base):
    """Uploaded images, decoded and re-encoded at the door. Personal data: ``expires_at`` is a hard cap."""

    __tablename__ = "image_sets"
    __table_args__ = (UniqueConstraint("tenant_id", "id"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    count: Mapped[int]
    total_bytes: Mapped[int] = mapped_column(BigInteger)
    images: Mapped[list[Json]]  # [{index, width, height, mode, bytes, sha256}]; emptied when erased
    version: Mapped[int] = mapped_column(Integer, server_default="1")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    expires_at: Mapped[datetime]
    erased_at: Mapped[datetime | None]


class Classifier(Base):
    """An uploaded judge of attributes: an ONNX file that was tried once at the door."""

    __tablename__ = "classifiers"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        CheckConstraint("output IN ('logits', 'probabilities', 'score')", name="output"),
        CheckConstraint("(key IS NULL) = (erased_at IS NOT NULL)", name="erased_has_no_file"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    name: Mapped[str]
    classes: Mapped[list[str]] = mapped_column(JSONB)  # names, in the order of the output
    output: Mapped[str]  # what a row of the output is: logits, probabilities, or one score
    threshold: Mapped[float]  # of a score or a probability: from it on lies the second class
    scale: Mapped[Json | None]  # {"mean": [...], "std": [...]} of pixels in [0, 1]; null: those pixels as they are
    channels: Mapped[int | None]  # of its images; null: any
    size: Mapped[int | None]  # side of its images in pixels; null: any
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str]
    key: Mapped[str | None]  # null once erased
    version: Mapped[int] = mapped_column(Integer, server_default="1")
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    erased_at: Mapped[datetime | None]


class Job(Base):
    """A request, its lease and its outcome in one row: ownership is never asked of the broker."""

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("tenant_id", "id"),
        ForeignKeyConstraint(["tenant_id", "checkpoint_id"], ["checkpoints.tenant_id", "checkpoints.id"]),
        CheckConstraint(
            "status IN ('queued', 'running', 'cancelling', 'succeeded', 'failed', 'cancelled')", name="status"
        ),
        CheckConstraint("kind IN ('forget', 'debias', 'import')", name="kind"),
        CheckConstraint(
            "(status IN ('running', 'cancelling')) = (lease_until IS NOT NULL)", name="held_exactly_while_leased"
        ),
        CheckConstraint(
            "(status IN ('succeeded', 'failed', 'cancelled')) = (finished_at IS NOT NULL)", name="finished"
        ),
        CheckConstraint("status <> 'succeeded' OR published_prefix IS NOT NULL", name="succeeded_is_published"),
        CheckConstraint("status <> 'succeeded' OR finished_at <= deadline_at", name="succeeded_in_time"),
        Index("ix_jobs_listing", "tenant_id", "kind", "id"),
        # The control loop's questions, each answered from a small partial index however long the history is. None
        # names lease_until, phase or progress, so that renewals and progress are heap-only updates.
        Index(
            "ix_jobs_queued",
            "queue",
            "tenant_id",
            text("priority DESC"),
            "id",
            postgresql_where=text("status = 'queued'"),
        ),
        Index(
            "ix_jobs_rung",
            "dispatched_at",
            postgresql_where=text("status = 'queued' AND dispatched_at IS NOT NULL"),
        ),
        Index(  # whose turn has not come yet, the oldest first: the age that a scrape shows
            "ix_jobs_unstarted",
            "queue",
            "created_at",
            postgresql_where=text("status = 'queued' AND started_at IS NULL"),
        ),
        Index("ix_jobs_held", "tenant_id", postgresql_where=text("status IN ('running', 'cancelling')")),
        # Not in the words of a status: it would be taken for ix_jobs_queued, and walked through for a queue's tenants.
        Index("ix_jobs_open", "tenant_id", postgresql_where=text("finished_at IS NULL")),
        Index(
            "ix_jobs_deadline",
            "deadline_at",
            postgresql_where=text("status = 'queued' AND deadline_at IS NOT NULL"),
        ),
        Index("ix_jobs_finished", "tenant_id", "finished_at", postgresql_where=text("finished_at IS NOT NULL")),
        Index("ix_jobs_unswept", "finished_at", postgresql_where=text("finished_at IS NOT NULL AND swept_at IS NULL")),
        Index(
            "ix_jobs_swept_early", "finished_at", postgresql_where=text("swept_at - finished_at < interval '2 days'")
        ),
        {"postgresql_with": {"fillfactor": 85}},  # room on the page for the next version of a row that is renewed
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    kind: Mapped[str]  # 'import' validates a checkpoint and is not listed to callers
    status: Mapped[str] = mapped_column(server_default="queued")
    phase: Mapped[str | None]  # of the running attempt
    version: Mapped[int] = mapped_column(Integer, server_default="1")  # the ETag; one up at every visible change
    queue: Mapped[str]  # capability: gpu.flow, gpu.diffusion, cpu
    priority: Mapped[int] = mapped_column(Integer, server_default="0")  # higher first, among its tenant's jobs
    checkpoint_id: Mapped[str]
    request: Mapped[Json]  # as accepted, with defaults
    seed: Mapped[int] = mapped_column(BigInteger)
    traceparent: Mapped[str | None]  # W3C Trace Context of the request that asked for it; null: it had none

    # The lease. Written by claim, renew and whatever ends the attempt (services.leases) and by nothing else.
    attempt: Mapped[int] = mapped_column(Integer, server_default="0")  # claims, less those given back by a drain
    fencing_token: Mapped[int | None] = mapped_column(BigInteger)  # of the newest claim
    worker: Mapped[str | None]
    lease_until: Mapped[datetime | None]  # the database's clock
    dispatched_at: Mapped[datetime | None]  # when the doorbell was last rung; null: never since queued
    not_before: Mapped[datetime | None]  # back-off of a runner that keeps dying; null: at once
    infrastructure_losses: Mapped[int] = mapped_column(Integer, server_default="0")
    out_of_memory_losses: Mapped[int] = mapped_column(Integer, server_default="0")
    cancel_requested_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]  # by when it must have succeeded, else it fails; null: whenever

    progress: Mapped[Json | None]  # {phase, step, total, eta_seconds, losses, metrics}
    resume: Mapped[Json | None]  # {key, step, token, bytes, sha256} of the newest state in the store
    problem: Mapped[Json | None]  # why it failed
    reason: Mapped[str | None]  # criteria_not_met, user_error, attempts_exhausted, out_of_memory, ...
    summary: Mapped[Json | None]  # the runner's headline figures
    published_prefix: Mapped[str | None]  # the one attempt whose artifacts count
    artifacts: Mapped[list[Json] | None]  # [{name, media_type, bytes, sha256}]

    created_at: Mapped[datetime] = mapped_column(server_default=func.now())
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    swept_at: Mapped[datetime | None]  # states, stale attempts and personal inputs removed from the store


class JobEvent(Base):
    """What happened to a job, for its owner. Append-only."""

    __tablename__ = "job_events"
    __table_args__ = (
        ForeignKeyConstraint(["tenant_id", "job_id"], ["jobs.tenant_id", "jobs.id"]),
        Index("ix_job_events_job", "job_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    tenant_id: Mapped[str]
    job_id: Mapped[str]
    type: Mapped[str]
    data: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class AuditEvent(Base):
    """Who did what, without personal data. A trigger refuses UPDATE and DELETE."""

    __tablename__ = "audit_events"
    __table_args__ = (Index("ix_audit_events_subject", "tenant_id", "subject"),)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=True)
    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"))
    actor: Mapped[str]  # an API key's id, or the name of the process
    action: Mapped[str]
    subject: Mapped[str]
    data: Mapped[Json] = mapped_column(server_default=text("'{}'::jsonb"))
    created_at: Mapped[datetime] = mapped_column(server_default=func.clock_timestamp())


class IdempotencyRecord(Base):
    """A stored answer; inserted in the transaction of the thing it answers for."""

    __tablename__ = "idempotency_records"

    tenant_id: Mapped[str] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    route: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]  # SHA-256 of the canonical request
    status: Mapped[int]
    headers: Mapped[Json]
    body: Mapped[Json]
    created_at: Mapped[datetime] = mapped_column(server_default=func.now())


class WorkerSlot(Base):
    """A worker process that listens, and how many jobs it can hold; the control loop rings only for free slots."""

    __tablename__ = "worker_slots"

    id: Mapped[str] = mapped_column(primary_key=True)
    queue: Mapped[str] = mapped_column(primary_key=True)
    slots: Mapped[int]
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())


class ProcessCounters(Base):
    """What one process has counted since it began (``services.metrics``); ``gone`` holds what ended ones had."""

    __tablename__ = "process_counters"

    process: Mapped[str] = mapped_column(primary_key=True)  # host, process id and a random part
    kind: Mapped[str]  # gateway, control, worker, gone
    seen_at: Mapped[datetime] = mapped_column(server_default=func.now())
    samples: Mapped[dict[str, float]] = mapped_column(JSONB)  # value by name and labels, as Prometheus writes them
