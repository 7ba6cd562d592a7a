"""Jobs whose attempt was lost or whose time is over: back to the queue within the budget, else to their end."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from sqlalchemy import func, insert, select, update
from sqlalchemy.orm import Session

from services import audit, leases
from services.counted import note
from services.leases import DEADLINE_EXCEEDED, Claim
from services.statuses import is_held, is_queued
from services.tables import Job, JobEvent

__all__ = ["expire_queued", "expired_leases", "lose", "move_queued", "reap"]

MAX_BACKOFF_SECONDS = 60
QUEUES_RENAMED = {"cpu.convert": "cpu"}


def lose(session: Session, claim: Claim, *, why: str, budget: int) -> str | None:
    """The runner died without a word: back to the queue within the budget, sooner than the reaper would.

    Returns the new status (queued, failed, cancelled), or None when the token is stale. ``why`` is shown to the job's
    owner and kept as long as the job: no word of a caller's belongs in it.
    """
    row = session.scalar(select(Job).where(leases.fenced(claim.job_id, claim.token)).with_for_update())
    if row is None:
        return None
    note(session, "lease_losses", cause="runner")
    losses = row.infrastructure_losses + 1
    # At once the first time; a runner that keeps dying must not burn its budget in a second.
    backoff = min(2.0 ** (losses - 1), MAX_BACKOFF_SECONDS) if losses > 1 else 0.0
    return _give_back(session, row, "attempt_lost", {"why": why}, budget=budget, backoff_seconds=backoff)


def expired_leases(session: Session, *, limit: int = 100) -> list[Job]:
    """Held jobs whose holder has been silent past its lease, locked until the transaction ends.

    All that are held are looked at, which are as many as workers have slots: an index by ``lease_until`` would have to
    be written at every renewal.
    """
    return list(
        session.scalars(
            select(Job)
            .where(is_held(), Job.lease_until < func.clock_timestamp())
            .order_by(Job.lease_until)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    )


def expire_queued(session: Session, *, limit: int = 100) -> list[str]:
    """Fail queued jobs whose deadline has passed, by ``ix_jobs_deadline``. Returns their ids."""
    due = (
        select(Job.id)
        .where(is_queued(), Job.deadline_at <= func.statement_timestamp())
        .order_by(Job.deadline_at)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )
    rows = session.execute(
        update(Job)
        .where(Job.id.in_(due))
        .values(status="failed", finished_at=func.clock_timestamp(), version=Job.version + 1, **DEADLINE_EXCEEDED)
        .returning(Job.id, Job.tenant_id, Job.kind)
    ).all()
    data = {"reason": DEADLINE_EXCEEDED["reason"]}
    for row in rows:
        session.execute(insert(JobEvent).values(tenant_id=row.tenant_id, job_id=row.id, type="failed", data=data))
        note(session, "jobs_ended", kind=row.kind, status="failed", reason=data["reason"])
        audit.record(session, row.tenant_id, actor="control", action="job.failed", subject=row.id, data=data)
    return [row.id for row in rows]


def move_queued(session: Session) -> list[str]:
    """Move queued jobs to the queues of this version: a gateway of an older one may still accept some. Their ids."""
    moved: list[str] = []
    for old, new in QUEUES_RENAMED.items():
        due = select(Job.id).where(is_queued(), Job.queue == old).with_for_update(skip_locked=True)
        rows = update(Job).where(Job.id.in_(due)).values(queue=new, dispatched_at=None).returning(Job.id)
        moved += session.scalars(rows)
    return moved


def reap(session: Session, job: Job, *, budget: int) -> str:
    """Take an expired lease back: to the queue within the budget and the deadline, else to its end.

    Returns the new status.
    """
    note(session, "lease_losses", cause="expired")
    return _give_back(session, job, "lease_expired", {}, budget=budget, backoff_seconds=0.0)


def _give_back(
    session: Session, job: Job, event: str, data: dict[str, Any], *, budget: int, backoff_seconds: float
) -> str:
    """End a lost attempt of a locked row."""
    held = Claim.of(job)
    if job.status == "cancelling":
        leases.cancelled(session, held)
        return "cancelled"
    if leases.expire(session, held):
        return "failed"
    losses = job.infrastructure_losses + 1
    if losses > budget:
        last = f"; the last time: {data['why']}" if data.get("why") else ""
        problem = {
            "type": "urn:forgetd:problem:attempts-exhausted",
            "title": "Too many attempts at the job were lost",
            "detail": (
                f"{losses} attempts ended without a result, more than the budget of {budget}{last}. "
                "Nothing was published."
            ),
        }
        leases.fail(session, held, reason="attempts_exhausted", problem=problem)
        return "failed"
    pause = func.clock_timestamp() + timedelta(seconds=backoff_seconds) if backoff_seconds else None
    told = {"losses": losses, **data}
    leases.requeue(session, held, event, data=told, infrastructure_losses=losses, not_before=pause)
    return "queued"
