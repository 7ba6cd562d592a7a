"""The job protocol as SQL: every statement that moves a job's lease, named after its question.

All times are the database's (``clock_timestamp()``), so that no host's clock matters. A statement that acts for an
attempt carries its fencing token and changes nothing once the token is stale: that is what makes a lost lease harmless.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, delete, func, insert, or_, select, update
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from services import audit, checkpoints
from services.tables import FENCING_TOKENS, Job, JobEvent, WorkerSlot

__all__ = [
    "Claim",
    "Standing",
    "adopt",
    "cancelled",
    "claim",
    "dispatchable",
    "expired_leases",
    "fail",
    "lose",
    "publish",
    "reap",
    "record_progress",
    "record_state",
    "release",
    "renew",
    "retire_worker",
    "retry_smaller",
    "see_worker",
    "stamp_dispatched",
    "standing",
]

HELD = ("running", "cancelling")
WORKER_SILENT_SECONDS = 15
MAX_BACKOFF_SECONDS = 60


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


@dataclass(frozen=True)
class Standing:
    """Where a job stands, for an attempt that does not know whether its COMMIT arrived."""

    status: str
    token: int | None
    published_prefix: str | None


def _clock() -> ColumnElement[Any]:
    return func.clock_timestamp()


def _fenced(job_id: str, token: int, statuses: tuple[str, ...] = HELD) -> ColumnElement[bool]:
    return and_(Job.id == job_id, Job.fencing_token == token, Job.status.in_(statuses))


def _event(session: Session, tenant_id: str, job_id: str, type: str, data: dict[str, Any]) -> None:
    session.execute(insert(JobEvent).values(tenant_id=tenant_id, job_id=job_id, type=type, data=data))


# Dispatch: the row is the outbox.


def dispatchable(session: Session, *, ring_seconds: float) -> list[tuple[str, str]]:
    """Queued jobs whose doorbell should ring now, as (id, queue), locked until the transaction ends.

    Only as many as live workers have free slots, best first, so that order stays in SQL and not in the broker.
    """
    rung = Job.dispatched_at > _clock() - timedelta(seconds=ring_seconds)
    due = or_(Job.not_before.is_(None), Job.not_before <= _clock())
    live = WorkerSlot.seen_at > _clock() - timedelta(seconds=WORKER_SILENT_SECONDS)
    slots = session.execute(select(WorkerSlot.queue, func.sum(WorkerSlot.slots)).where(live).group_by(WorkerSlot.queue))
    rows: list[tuple[str, str]] = []
    for queue, total in slots.all():
        listening = select(WorkerSlot.id).where(live, WorkerSlot.queue == queue)
        # A lease of a dead worker takes no slot of a living one; a living one's lease does, whatever its queue.
        busy = and_(Job.lease_until.is_not(None), Job.worker.in_(listening))
        ringing = and_(Job.status == "queued", Job.queue == queue, rung)
        taken = session.scalar(select(func.count()).select_from(Job).where(or_(busy, ringing)))
        free = int(total) - int(taken or 0)
        if free <= 0:
            continue
        best = session.execute(
            select(Job.id, Job.queue)
            .where(Job.status == "queued", Job.queue == queue)
            .where(or_(Job.dispatched_at.is_(None), ~rung), due)
            .order_by(Job.priority.desc(), Job.id)
            .limit(free)
            .with_for_update(skip_locked=True)
        )
        rows += [(row.id, row.queue) for row in best]
    return rows


def stamp_dispatched(session: Session, job_ids: list[str]) -> None:
    """Remember that these doorbells were rung."""
    session.execute(update(Job).where(Job.id.in_(job_ids)).values(dispatched_at=_clock()))


def see_worker(session: Session, worker: str, queues: list[str], slots: int) -> None:
    """A worker says that it lives and how many jobs it can hold at once."""
    for queue in queues:
        row = upsert(WorkerSlot).values(id=worker, queue=queue, slots=slots, seen_at=_clock())
        session.execute(
            row.on_conflict_do_update(index_elements=["id", "queue"], set_={"slots": slots, "seen_at": _clock()})
        )


def retire_worker(session: Session, worker: str) -> None:
    """A worker says that it will take nothing more; long-silent rows go with it."""
    silent = WorkerSlot.seen_at < _clock() - timedelta(hours=1)
    session.execute(delete(WorkerSlot).where(or_(WorkerSlot.id == worker, silent)))


# The lease.


def claim(session: Session, job_id: str, *, worker: str, ttl_seconds: float) -> Claim | None:
    """Take a queued job: lease, attempt + 1, fresh fencing token, in one conditional UPDATE.

    None when the job is not queued: the doorbell was a duplicate, or came after a cancel.
    """
    row = session.execute(
        update(Job)
        .where(Job.id == job_id, Job.status == "queued")
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
    return _as_claim(row)


def adopt(session: Session, job_id: str, *, worker: str) -> Claim | None:
    """The lease that a worker's own claim took without its knowing, because the reply to the COMMIT was lost.

    The caller must know that no attempt of its own is at work on the job.
    """
    row = session.scalar(select(Job).where(Job.id == job_id, Job.worker == worker, Job.status.in_(HELD)))
    return None if row is None else _as_claim(row)


def standing(session: Session, job_id: str) -> Standing | None:
    """Where the job stands now; None when it is gone."""
    row = session.execute(
        select(Job.status, Job.fencing_token, Job.published_prefix).where(Job.id == job_id)
    ).one_or_none()
    return None if row is None else Standing(row.status, row.fencing_token, row.published_prefix)


def _as_claim(row: Job) -> Claim:
    if row.fencing_token is None:
        raise RuntimeError(f"{row.id} is held without a fencing token")
    return Claim(
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
    )


def renew(session: Session, job_id: str, token: int, *, ttl_seconds: float) -> Literal["held", "cancel", "lost"]:
    """Extend the lease and learn in the same statement whether the caller asked to cancel."""
    status = session.execute(
        update(Job)
        .where(_fenced(job_id, token))
        .values(lease_until=_clock() + timedelta(seconds=ttl_seconds))
        .returning(Job.status)
    ).scalar_one_or_none()
    if status is None:
        return "lost"
    return "cancel" if status == "cancelling" else "held"


def record_progress(session: Session, claim: Claim, *, phase: str, progress: dict[str, Any] | None) -> bool:
    """Show where the attempt is. False: the lease is lost."""
    before = session.execute(
        select(Job.phase).where(_fenced(claim.job_id, claim.token)).with_for_update()
    ).one_or_none()
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
        update(Job).where(_fenced(claim.job_id, claim.token)).values(resume=resume).returning(Job.id)
    ).scalar_one_or_none()
    if done is not None:
        _event(session, claim.tenant_id, claim.job_id, "state_saved", {"step": resume["step"]})
    return done is not None


# The ends of an attempt.


def _end(
    session: Session, claim: Claim, event: str, *, statuses: tuple[str, ...] = HELD, data: dict[str, Any], **values: Any
) -> bool:
    """One fenced UPDATE that gives the lease up, with its event; terminal when the values say so."""
    row = session.execute(
        update(Job)
        .where(_fenced(claim.job_id, claim.token, statuses))
        .values(lease_until=None, worker=None, phase=None, version=Job.version + 1, **values)
        .returning(Job.id)
    ).scalar_one_or_none()
    if row is None:
        return False
    _event(session, claim.tenant_id, claim.job_id, event, data)
    if "finished_at" in values:
        audit.record(session, claim.tenant_id, actor="worker", action=f"job.{event}", subject=claim.job_id, data=data)
    return True


def publish(
    session: Session, claim: Claim, *, prefix: str, artifacts: list[dict[str, Any]], summary: dict[str, Any]
) -> bool:
    """Succeed and name the attempt's artifacts: the one publication of a job.

    False when the token is stale, or a cancel came first: then nothing was published and nothing may be.
    """
    done = _end(
        session,
        claim,
        "succeeded",
        statuses=("running",),
        data={"attempt": claim.attempt},
        status="succeeded",
        finished_at=_clock(),
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

    False when the token is stale, or a cancel came first.
    """
    done = _end(
        session,
        claim,
        "failed",
        statuses=("running",),
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


def cancelled(session: Session, claim: Claim) -> bool:
    """The attempt ended because the caller cancelled."""
    return _end(
        session, claim, "cancelled", statuses=("cancelling",), data={}, status="cancelled", finished_at=_clock()
    )


def release(session: Session, claim: Claim) -> bool:
    """A drain: back to the queue, and the attempt is not consumed."""
    return _end(
        session,
        claim,
        "drained",
        statuses=("running",),
        data={"attempt": claim.attempt},
        status="queued",
        attempt=Job.attempt - 1,
        dispatched_at=None,
        not_before=None,
    )


def retry_smaller(session: Session, claim: Claim) -> bool:
    """The runner ran out of memory: back to the queue, the next attempt at half the micro-batch."""
    return _end(
        session,
        claim,
        "out_of_memory",
        statuses=("running",),
        data={"attempt": claim.attempt},
        status="queued",
        out_of_memory_losses=Job.out_of_memory_losses + 1,
        dispatched_at=None,
    )


def lose(session: Session, claim: Claim, *, why: str, budget: int) -> str | None:
    """The runner died without a word: back to the queue within the budget, sooner than the reaper would.

    Returns the new status (queued, failed, cancelled), or None when the token is stale.
    """
    row = session.scalar(select(Job).where(_fenced(claim.job_id, claim.token)).with_for_update())
    if row is None:
        return None
    losses = row.infrastructure_losses + 1
    # At once the first time; a runner that keeps dying must not burn its budget in a second.
    backoff = min(2.0 ** (losses - 1), MAX_BACKOFF_SECONDS) if losses > 1 else 0.0
    return _give_back(session, row, "attempt_lost", {"why": why}, budget=budget, backoff_seconds=backoff)


# The reaper.


def expired_leases(session: Session, *, limit: int = 100) -> list[Job]:
    """Held jobs whose holder has been silent past its lease, locked until the transaction ends."""
    return list(
        session.scalars(
            select(Job)
            .where(Job.lease_until < _clock())
            .order_by(Job.lease_until)
            .limit(limit)
            .with_for_update(skip_locked=True)
        )
    )


def reap(session: Session, job: Job, *, budget: int) -> str:
    """Take an expired lease back: to the queue within the budget, else to its end. Returns the new status."""
    return _give_back(session, job, "lease_expired", {}, budget=budget, backoff_seconds=0.0)


def _give_back(
    session: Session, job: Job, event: str, data: dict[str, Any], *, budget: int, backoff_seconds: float
) -> str:
    """End a lost attempt of a locked row."""
    held = _as_claim(job)
    if job.status == "cancelling":
        cancelled(session, held)
        return "cancelled"
    losses = job.infrastructure_losses + 1
    if losses > budget:
        problem = {
            "type": "urn:forgetd:problem:attempts-exhausted",
            "title": "The job lost its worker too often",
            "detail": (
                f"{losses} attempts ended without a result, more than the budget of {budget}. Nothing was published."
            ),
        }
        fail(session, held, reason="attempts_exhausted", problem=problem)
        return "failed"
    _end(
        session,
        held,
        event,
        data={"attempt": job.attempt, "losses": losses, **data},
        status="queued",
        infrastructure_losses=losses,
        dispatched_at=None,
        not_before=_clock() + timedelta(seconds=backoff_seconds) if backoff_seconds else None,
    )
    return "queued"
