"""Jobs as their owner sees them: accepted, listed, read, cancelled."""

from __future__ import annotations

import secrets
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from services import audit, checkpoints, job_checks, quotas, tracing
from services.conditional_checks import PROMPTED
from services.counted import note
from services.errors import InvalidRequest, JobEnded, NotFound
from services.ids import new_id
from services.requests import DebiasRequest, ForgetRequest
from services.tables import Checkpoint, Job, JobEvent
from services.tenancy import Caller

__all__ = ["TERMINAL", "cancel", "create", "create_import", "events", "get", "list_page", "version"]

TERMINAL = ("succeeded", "failed", "cancelled")
# What a worker must be able to do: flows and the VAE fit into any GPU, or none; diffusion models ask for a large one.
QUEUE_OF_FAMILY = dict.fromkeys(job_checks.METHODS_OF_FAMILY, "gpu.flow") | dict.fromkeys(
    ("ddpm", *PROMPTED), "gpu.diffusion"
)
IMPORT_QUEUE = "cpu"
LATEST_DEADLINE = timedelta(days=90)


def create(session: Session, caller: Caller, request: ForgetRequest | DebiasRequest, *, open_jobs: int) -> Job:
    """Accept a job: row, event and audit event in the caller's transaction. No broker is involved.

    Args:
        session: The transaction.
        caller: Whose job.
        request: What is asked.
        open_jobs: How many jobs a tenant may have that have not ended, where it has no limit of its own.

    Raises:
        QuotaExceeded: The caller has as many.
        NotFound: the checkpoint, an image set or a classifier is not the caller's.
        CheckpointNotReady: it is still validating, or was rejected.
        ImageSetErased: its images are gone.
        ClassifierErased: its file is gone.
        InvalidRequest: what is asked does not fit the checkpoint, or its parts do not fit each other.
    """
    checkpoint = checkpoints.ready(session, caller.tenant_id, request.checkpoint)
    manifest = checkpoint.manifest or {}
    request = request.decided(job_checks.METHODS_OF_FAMILY[manifest["family"]])
    request = job_checks.check(session, caller, request, manifest)
    job = Job(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        kind="debias" if isinstance(request, DebiasRequest) else "forget",
        queue=QUEUE_OF_FAMILY[manifest["family"]],
        priority=request.priority,
        deadline_at=_deadline(session, request.deadline),
        checkpoint_id=checkpoint.id,
        request=request.stored(),
        seed=request.seed if request.seed is not None else secrets.randbelow(2**53),
    )
    _add(session, job, actor=caller.key_id, open_jobs=open_jobs)
    return job


def _deadline(session: Session, asked: datetime | None) -> datetime | None:
    """The deadline, where it can still be kept by the clock that will judge it, the database's."""
    if asked is None:
        return None
    now = session.execute(select(func.clock_timestamp())).scalar_one()
    if now < asked <= now + LATEST_DEADLINE:
        return asked
    fault = "has passed" if asked <= now else f"is more than {LATEST_DEADLINE.days} days ahead"
    raise InvalidRequest(
        f"The deadline {fault}: the service's clock says {now:%Y-%m-%dT%H:%M:%SZ}. Send a later time within "
        f"{LATEST_DEADLINE.days} days, or leave it out.",
        errors=[{"pointer": "/deadline", "detail": fault}],
    )


def create_import(session: Session, checkpoint: Checkpoint, *, actor: str, open_jobs: int | None) -> Job:
    """Queue the validation of an uploaded checkpoint, in the transaction that makes its row.

    Raises:
        QuotaExceeded: as ``create``.
    """
    job = Job(
        id=new_id("job"),
        tenant_id=checkpoint.tenant_id,
        kind="import",
        queue=IMPORT_QUEUE,
        checkpoint_id=checkpoint.id,
        request={"declared": checkpoint.declared},
        seed=0,
    )
    _add(session, job, actor=actor, open_jobs=open_jobs)
    return job


def _add(session: Session, job: Job, *, actor: str, open_jobs: int | None) -> None:
    # Last before the row, since it locks the tenant until the transaction ends.
    quotas.admit(session, job.tenant_id, open_jobs=open_jobs)
    job.traceparent = tracing.current()
    session.add(job)
    session.flush()
    session.execute(insert(JobEvent).values(tenant_id=job.tenant_id, job_id=job.id, type="queued"))
    audit.record(session, job.tenant_id, actor=actor, action=f"job.accepted.{job.kind}", subject=job.id)
    note(session, "jobs_accepted", kind=job.kind)
    session.refresh(job)


def get(session: Session, tenant_id: str, job_id: str) -> Job:
    """A caller's job; raises ``NotFound``."""
    job = session.scalar(select(Job).where(Job.tenant_id == tenant_id, Job.id == job_id, Job.kind != "import"))
    if job is None:
        raise NotFound(f"There is no job {job_id}.")
    return job


def version(session: Session, tenant_id: str, job_id: str) -> tuple[int, str] | None:
    """A job's version and status, for the callers that wait for a change."""
    row = session.execute(
        select(Job.version, Job.status).where(Job.tenant_id == tenant_id, Job.id == job_id)
    ).one_or_none()
    return None if row is None else (row.version, row.status)


def list_page(
    session: Session, tenant_id: str, *, after: str | None, limit: int, status: str | None, checkpoint: str | None
) -> tuple[list[Job], bool]:
    """Jobs, newest first, after the cursor (a job's id); and whether more follow."""
    query = select(Job).where(Job.tenant_id == tenant_id, Job.kind != "import").order_by(Job.id.desc()).limit(limit + 1)
    if after is not None:
        query = query.where(Job.id < after)
    if status is not None:
        query = query.where(Job.status == status)
    if checkpoint is not None:
        query = query.where(Job.checkpoint_id == checkpoint)
    rows = list(session.scalars(query))
    return rows[:limit], len(rows) > limit


def cancel(session: Session, caller: Caller, job_id: str) -> Job:
    """Ask a job to end: a queued one is cancelled at once, a running one is told. Twice is as once.

    Raises:
        NotFound: not the caller's.
        JobEnded: it ended before.
    """
    job = get(session, caller.tenant_id, job_id)
    if job.status not in TERMINAL:  # an end is final: whoever has that row locked is not waited for
        session.refresh(job, with_for_update=True)
    if job.status in ("cancelling", "cancelled"):
        return job
    if job.status in TERMINAL:
        raise JobEnded(f"The job has already {job.status}; nothing was changed.", status_of_job=job.status)
    change: dict[str, Any] = {"cancel_requested_at": func.clock_timestamp(), "version": Job.version + 1}
    event = "cancelled" if job.status == "queued" else "cancel_requested"
    if event == "cancelled":
        change |= {"status": "cancelled", "finished_at": func.clock_timestamp()}
        note(session, "jobs_ended", kind=job.kind, status="cancelled", reason="")
    else:
        change |= {"status": "cancelling"}
    session.execute(update(Job).where(Job.id == job_id).values(**change))
    session.execute(insert(JobEvent).values(tenant_id=job.tenant_id, job_id=job.id, type=event))
    audit.record(session, job.tenant_id, actor=caller.key_id, action=f"job.{event}", subject=job.id)
    session.refresh(job)
    return job


def events(
    session: Session, tenant_id: str, job_id: str, *, after: int, limit: int
) -> list[tuple[int, str, dict[str, Any], datetime]]:
    """A job's events after an event id, oldest first, as (id, type, data, time)."""
    rows = session.execute(
        select(JobEvent.id, JobEvent.type, JobEvent.data, JobEvent.created_at)
        .where(JobEvent.tenant_id == tenant_id, JobEvent.job_id == job_id, JobEvent.id > after)
        .order_by(JobEvent.id)
        .limit(limit)
    )
    return [(row.id, row.type, row.data, row.created_at) for row in rows]
