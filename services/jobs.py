"""Jobs as their owner sees them: accepted, listed, read, cancelled."""

from __future__ import annotations

import secrets
from datetime import datetime
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from services import audit, checkpoints, image_sets
from services.errors import InvalidRequest, JobEnded, NotFound
from services.ids import new_id
from services.requests import ForgetRequest
from services.tables import Checkpoint, Job, JobEvent
from services.tenancy import Caller

__all__ = ["TERMINAL", "cancel", "create_forget", "create_import", "events", "get", "list_page", "version"]

TARGET = "/target/images"
TERMINAL = ("succeeded", "failed", "cancelled")
QUEUE_OF_FAMILY = {"glow": "gpu.flow"}
IMPORT_QUEUE = "cpu.convert"
METHOD_OF_FAMILY = {"glow": "flow-taming"}


def create_forget(session: Session, caller: Caller, request: ForgetRequest) -> Job:
    """Accept a job: row, event and audit event in the caller's transaction. No broker is involved.

    Raises:
        NotFound: the checkpoint or an image set is not the caller's.
        CheckpointNotReady: it is still validating, or was rejected.
        ImageSetErased: its images are gone.
        InvalidRequest: the method does not fit the family, or the target stands in another role too.
    """
    checkpoint = checkpoints.ready(session, caller.tenant_id, request.checkpoint)
    family = (checkpoint.manifest or {})["family"]
    method = METHOD_OF_FAMILY[family] if request.method == "auto" else request.method
    if method != METHOD_OF_FAMILY[family]:
        raise InvalidRequest(
            f"{method} does not work on a checkpoint of family {family}; use {METHOD_OF_FAMILY[family]} or auto.",
            errors=[{"pointer": "/method", "detail": "wrong method for this family"}],
        )
    for pointer, image_set_id in request.image_sets().items():
        if pointer != TARGET and image_set_id == request.target.images:
            raise InvalidRequest(
                "The images to forget cannot also be remembered or be the measure; use another image set.",
                errors=[{"pointer": pointer, "detail": f"the same image set as {TARGET}"}],
            )
        image_sets.live(session, caller.tenant_id, image_set_id, pointer=pointer)
    job = Job(
        id=new_id("job"),
        tenant_id=caller.tenant_id,
        kind="forget",
        queue=QUEUE_OF_FAMILY[family],
        priority=request.priority,
        checkpoint_id=checkpoint.id,
        request={**request.model_dump(mode="json", exclude_none=True), "method": method},
        seed=request.seed if request.seed is not None else secrets.randbelow(2**53),
    )
    _add(session, job, actor=caller.key_id)
    return job


def create_import(session: Session, checkpoint: Checkpoint, *, actor: str) -> Job:
    """Queue the validation of an uploaded checkpoint, in the transaction that makes its row."""
    job = Job(
        id=new_id("job"),
        tenant_id=checkpoint.tenant_id,
        kind="import",
        queue=IMPORT_QUEUE,
        checkpoint_id=checkpoint.id,
        request={"declared": checkpoint.declared},
        seed=0,
    )
    _add(session, job, actor=actor)
    return job


def _add(session: Session, job: Job, *, actor: str) -> None:
    session.add(job)
    session.flush()
    session.execute(insert(JobEvent).values(tenant_id=job.tenant_id, job_id=job.id, type="queued"))
    audit.record(session, job.tenant_id, actor=actor, action=f"job.accepted.{job.kind}", subject=job.id)
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
    job = session.scalar(
        select(Job).where(Job.tenant_id == caller.tenant_id, Job.id == job_id, Job.kind != "import").with_for_update()
    )
    if job is None:
        raise NotFound(f"There is no job {job_id}.")
    if job.status in ("cancelling", "cancelled"):
        return job
    if job.status in TERMINAL:
        raise JobEnded(f"The job has already {job.status}; nothing was changed.", status_of_job=job.status)
    change: dict[str, Any] = {"cancel_requested_at": func.clock_timestamp(), "version": Job.version + 1}
    event = "cancelled" if job.status == "queued" else "cancel_requested"
    if event == "cancelled":
        change |= {"status": "cancelled", "finished_at": func.clock_timestamp()}
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
