"""The job protocol as SQL: every statement of the attempt that holds a job's lease, named after its question.

All times are the database's (``clock_timestamp()``), so that no host's clock matters. A statement that acts for an
attempt carries its fencing token and changes nothing once the token is stale: that is what makes a lost lease harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, func, insert, or_, select, true, update
from sqlalchemy.orm import Session

from services import audit, checkpoints, quotas
from services.counted import note
from services.tables import FENCING_TOKENS, Job, JobEvent

__all__ = [
    "DEADLINE_EXCEEDED",
    "Claim",
    "Standing",
    "adopt",
    "cancelled",
    "claim",
    "expire",
    "fail",
    "fenced",
    "publish",
    "record_progress",
    "record_state",
    "release",
    "renew",
    "requeue",
    "retry_smaller",
    "standing",
]

HELD = ("running", "cancelling")
OUTCOMES = {"attempt_lost": "lost", "lease_expired": "expired"}  # of attempts, where it is not their event's name
DEADLINE_EXCEEDED: dict[str, Any] = {
    "reason": "deadline_exceeded",
    "problem": {
        "type": "urn:forgetd:problem:deadline-exceeded",
        "title": "The job did not succeed by its deadline",
        "detail": "It was given up and published nothing. Send it again with a later deadline, or without one.",
    },
}


@dataclass(frozen=True)
class Claim:
    """What the holder of a lease knows: the job's row as claimed. ``token`` fences everything it does."""

    job_id: str
    tenant_id: str
    kind: str
    token: int
    attempt: int
    checkpoint_id: str
    request: dict[str, Any]
    seed: int
    resume: dict[str, Any] | None
    out_of_memory_losses: int
    queue: str = ""
    traceparent: str | None = None

    @classmethod
    def of(cls, row: Job) -> Claim:
        """Of a row whose lease is held."""
        if row.fencing_token is None:
            raise RuntimeError(f"{row.id} is held without a fencing token")
        return cls(
            job_id=row.id,
            tenant_id=row.tenant_id,
            kind=row.kind,
            token=row.fencing_token,
            attempt=row.attempt,
            checkpoint_id=row.checkpoint_id,
            request=row.request,
            seed=row.seed,
            resume=row.resume,
            out_of_memory_losses=row.out_of_memory_losses,
            queue=row.queue,
            traceparent=row.traceparent,
        )


@dataclass(frozen=True)
class Standing:
    """Where a job stands, for an attempt that does not know whether its COMMIT arrived."""

    status: str
    token: int | None
    published_prefix: str | None


def _clock() -> ColumnElement[Any]:
    return func.clock_timestamp()


def fenced(job_id: str, token: int, statuses: tuple[str, ...] = HELD) -> ColumnElement[bool]:
    """Whether this is the job, and its lease is still the token's."""
    return and_(Job.id == job_id, Job.fencing_token == token, Job.status.in_(statuses))


def _in_time() -> ColumnElement[bool]:
    return or_(Job.deadline_at.is_(None), Job.deadline_at > _clock())


def _event(session: Session, tenant_id: str, job_id: str, type: str, data: dict[str, Any]) -> None:
    session.execute(insert(JobEvent).values(tenant_id=tenant_id, job_id=job_id, type=type, data=data))


# The lease.


def claim(
    session: Session, job_id: str, *, worker: str, ttl_seconds: float, running_jobs: int | None = None
) -> Claim | None:
    """Take a queued job: lease, attempt + 1, fresh fencing token, in one conditional UPDATE.

    None when the job is not queued or its deadline has passed (the doorbell was a duplicate, or came late), or when its
    tenant has as many at work as it may; ``running_jobs`` is the limit of a tenant that has none of its own.
    """
    if not quotas.may_run(session, job_id, running_jobs=running_jobs):
        return None
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued", _in_time())
        .values(
            status="running",
            phase="validating",
            attempt=Job.attempt + 1,
            fencing_token=FENCING_TOKENS.next_value(),
            worker=worker,
            lease_until=_clock() + timedelta(seconds=ttl_seconds),
            started_at=func.coalesce(Job.started_at, _clock()),
            version=Job.version + 1,
        )
        .returning(Job)
    ).scalar_one_or_none()
    if row is None:
        return None
    _event(
        session, row.tenant_id, job_id, "attempt_started", {"attempt": row.attempt, "resumed": row.resume is not None}
    )
    note(session, "attempts", queue=row.queue)
    return Claim.of(row)


def adopt(session: Session, job_id: str, *, worker: str) -> Claim | None:
    """The lease that a worker's own claim took without its knowing, because the reply to the COMMIT was lost.

    The caller must know that no attempt of its own is at work on the job.
    """
    row = session.scalar(select(Job).where(Job.id == job_id, Job.worker == worker, Job.status.in_(HELD)))
    if row is None:
        return None
    note(session, "attempts", queue=row.queue)  # not counted before: a COMMIT without a reply counts nothing
    return Claim.of(row)


def standing(session: Session, job_id: str) -> Standing | None:
    """Where the job stands now; None when it is gone."""
    row = session.execute(
        select(Job.status, Job.fencing_token, Job.published_prefix).where(Job.id == job_id)
    ).one_or_none()
    return None if row is None else Standing(row.status, row.fencing_token, row.published_prefix)


def renew(
    session: Session, job_id: str, token: int, *, ttl_seconds: float
) -> Literal["held", "cancel", "expired", "lost"]:
    """Extend the lease and learn in the same statement whether the caller cancelled or the deadline has passed."""
    row = session.execute(
        update(Job)
        .where(fenced(job_id, token))
        .values(lease_until=_clock() + timedelta(seconds=ttl_seconds))
        .returning(Job.status, _in_time().label("in_time"))
    ).one_or_none()
    if row is None:
        return "lost"
    if row.status == "cancelling":
        return "cancel"
    return "held" if row.in_time else "expired"


def record_progress(session: Session, claim: Claim, *, phase: str, progress: dict[str, Any] | None) -> bool:
    """Show where the attempt is. False: the lease is lost."""
    before = session.execute(select(Job.phase).where(fenced(claim.job_id, claim.token)).with_for_update()).one_or_none()
    if before is None:
        return False
    session.execute(
        update(Job).where(Job.id == claim.job_id).values(phase=phase, progress=progress, version=Job.version + 1)
    )
    if before.phase != phase:
        _event(session, claim.tenant_id, claim.job_id, "phase", {"phase": phase})
    return True


def record_state(session: Session, claim: Claim, resume: dict[str, Any]) -> bool:
    """Name the newest state in the store: the next attempt starts there. False: the lease is lost."""
    done = session.execute(
        update(Job).where(fenced(claim.job_id, claim.token)).values(resume=resume).returning(Job.id)
    ).scalar_one_or_none()
    if done is not None:
        _event(session, claim.tenant_id, claim.job_id, "state_saved", {"step": resume["step"]})
    return done is not None


# The ends of an attempt.


def _end(
    session: Session,
    claim: Claim,
    event: str,
    *,
    statuses: tuple[str, ...] = HELD,
    when: ColumnElement[bool] | None = None,
    data: dict[str, Any],
    **values: Any,
) -> bool:
    """One fenced UPDATE that gives the lease up, with its event; terminal when the values say so."""
    row = session.execute(
        update(Job)
        .where(fenced(claim.job_id, claim.token, statuses), true() if when is None else when)
        .values(lease_until=None, worker=None, phase=None, version=Job.version + 1, **values)
        .returning(Job.id)
    ).scalar_one_or_none()
    if row is None:
        return False
    _event(session, claim.tenant_id, claim.job_id, event, data)
    reason = values.get("reason") or ""
    note(session, "attempts_ended", outcome="lost" if reason == "attempts_exhausted" else OUTCOMES.get(event, event))
    if "finished_at" in values:
        note(session, "jobs_ended", kind=claim.kind, status=values["status"], reason=reason)
        audit.record(session, claim.tenant_id, actor="worker", action=f"job.{event}", subject=claim.job_id, data=data)
    return True


def publish(
    session: Session, claim: Claim, *, prefix: str, artifacts: list[dict[str, Any]], summary: dict[str, Any]
) -> bool:
    """Succeed and name the attempt's artifacts: the one publication of a job.

    False when the token is stale, a cancel came first or the deadline has passed: then nothing was published and
    nothing may be.
    """
    done = _end(
        session,
        claim,
        "succeeded",
        statuses=("running",),
        when=_in_time(),
        data={"attempt": claim.attempt},
        status="succeeded",
        # The least of both (NULL does not count): the clock goes on between the condition and here.
        finished_at=func.least(_clock(), Job.deadline_at),
        published_prefix=prefix,
        artifacts=artifacts,
        summary=summary,
    )
    if done and claim.kind == "import":
        checkpoints.accept(
            session,
            claim.tenant_id,
            claim.checkpoint_id,
            manifest=summary["manifest"],
            prefix=prefix,
            weights=artifacts[0],
        )
    return done


def fail(
    session: Session,
    claim: Claim,
    *,
    reason: str,
    problem: dict[str, Any],
    prefix: str | None = None,
    artifacts: list[dict[str, Any]] | None = None,
    summary: dict[str, Any] | None = None,
) -> bool:
    """Fail for good; with ``criteria_not_met`` the report is published and the weights are not.

    False when the token is stale or a cancel came first; with something to publish, also when the deadline has passed.
    """
    done = _end(
        session,
        claim,
        "failed",
        statuses=("running",),
        when=None if prefix is None else _in_time(),
        data={"attempt": claim.attempt, "reason": reason},
        status="failed",
        finished_at=_clock(),
        reason=reason,
        problem=problem,
        published_prefix=prefix,
        artifacts=artifacts,
        summary=summary,
    )
    if done and claim.kind == "import":
        checkpoints.reject(session, claim.tenant_id, claim.checkpoint_id, problem)
    return done


def expire(session: Session, claim: Claim) -> bool:
    """Fail because the deadline has passed; nothing is published.

    False when the token is stale, a cancel came first, or there is time left.
    """
    return _end(
        session,
        claim,
        "failed",
        statuses=("running",),
        when=~_in_time(),
        data={"attempt": claim.attempt, "reason": DEADLINE_EXCEEDED["reason"]},
        status="failed",
        finished_at=_clock(),
        **DEADLINE_EXCEEDED,
    )


def cancelled(session: Session, claim: Claim) -> bool:
    """The attempt ended because the caller cancelled."""
    return _end(
        session, claim, "cancelled", statuses=("cancelling",), data={}, status="cancelled", finished_at=_clock()
    )


def requeue(session: Session, claim: Claim, event: str, *, data: dict[str, Any], **values: Any) -> bool:
    """Back to the queue, to be rung for at once unless ``not_before`` says when.

    False when the token is stale, or a cancel came first.
    """
    return _end(
        session,
        claim,
        event,
        statuses=("running",),
        data={"attempt": claim.attempt, **data},
        status="queued",
        dispatched_at=None,
        **values,
    )


def release(session: Session, claim: Claim, *, why: str = "") -> bool:
    """A drain, or a worker that cannot work: back to the queue, and the attempt is not consumed."""
    data = {"why": why} if why else {}
    return requeue(session, claim, "drained", data=data, attempt=Job.attempt - 1, not_before=None)


def retry_smaller(session: Session, claim: Claim) -> bool:
    """The runner ran out of memory: back to the queue, the next attempt at half the micro-batch."""
    losses = Job.out_of_memory_losses + 1
    return requeue(session, claim, "out_of_memory", data={}, out_of_memory_losses=losses)
