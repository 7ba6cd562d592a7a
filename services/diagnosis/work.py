"""The work: whether somebody rings, somebody hears it, and nothing piles up. The database is asked, the broker once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row, text
from sqlalchemy.orm import Session

from services import dispatch
from services.diagnosis.findings import Finding, ok, warning, wrong
from services.metrics_gauges import BACKLOG
from services.settings import Settings

__all__ = ["Listener", "largest_checkpoint", "listeners", "questions"]

COUNTED_AT_MOST = 10_000
SHOWN_AT_MOST = 3  # of ids
STATEMENT_MILLISECONDS = 5000
CONTROL_SILENT_SECONDS = 75  # a loop that counts nothing writes its row once a minute (services.metrics)
EXPIRED_SECONDS = 10  # a lease that nobody took back
UNRUNG_SECONDS = 30  # a job that could start and was not told to
FIRST_SIGN_SECONDS = 4.0  # a loop that has just begun says so after three
AGAIN_SECONDS = 1.0  # between two looks at what is to ring: what is in both was left lying
QUEUED_SECONDS = 3600
LOSSES = 2
UNSWEPT_MINUTES = 10

LISTENERS = text("""
SELECT id, queue, slots FROM worker_slots
WHERE seen_at > clock_timestamp() - make_interval(secs => :silent) ORDER BY queue, id
""")
CONTROL = text("""
SELECT count(*) FILTER (WHERE seen_at > clock_timestamp() - make_interval(secs => :silent)) AS live,
    extract(epoch FROM clock_timestamp() - max(seen_at)) AS silent
FROM process_counters WHERE kind = 'control'
""")
EXPIRED = text("""
SELECT count(*) FROM jobs WHERE status IN ('running', 'cancelling')
AND lease_until < clock_timestamp() - make_interval(secs => :late)
""")
HELD_BY = text("""
SELECT worker, count(*) AS jobs FROM jobs WHERE status IN ('running', 'cancelling') GROUP BY worker
""")
LEFT_LYING = text("""
SELECT id FROM jobs WHERE id = ANY (:ids)
AND greatest(created_at, dispatched_at, not_before) < clock_timestamp() - make_interval(secs => :late)
""")
LOST = text("""
SELECT id, infrastructure_losses AS losses FROM jobs
WHERE finished_at IS NULL AND infrastructure_losses >= :losses ORDER BY infrastructure_losses DESC, id LIMIT :most
""")
FULL = text("""
SELECT tenants.name, count(*) AS open, coalesce(tenants.max_open_jobs, :open) AS most,
    tenants.max_running_jobs = 0 AS pausing
FROM jobs JOIN tenants ON tenants.id = jobs.tenant_id WHERE jobs.finished_at IS NULL GROUP BY tenants.id
HAVING count(*) >= coalesce(tenants.max_open_jobs, :open) OR tenants.max_running_jobs = 0
ORDER BY tenants.name LIMIT :most
""")
UNSWEPT = text("""
SELECT count(*) FROM (
    SELECT FROM jobs WHERE finished_at < clock_timestamp() - make_interval(mins => :late) AND swept_at IS NULL
    AND finished_at IS NOT NULL LIMIT :most
) AS few
""")
OVERDUE = text("""
SELECT count(*) FROM (
    SELECT FROM image_sets WHERE erased_at IS NULL AND expires_at < clock_timestamp() - make_interval(mins => :late)
    LIMIT :most
) AS few
""")


@dataclass(frozen=True)
class Listener:
    """A live worker and one queue of its."""

    worker: str
    queue: str
    slots: int


def listeners(session: Session) -> list[Listener]:
    """Every worker that lives, once for each queue that it listens to."""
    rows = session.execute(LISTENERS, {"silent": dispatch.WORKER_SILENT_SECONDS})
    return [Listener(row.id, row.queue, row.slots) for row in rows]


def largest_checkpoint(session: Session) -> int:
    """Bytes of the largest model that a job may fetch."""
    found = session.scalar(text("SELECT max(weights_bytes) FROM checkpoints WHERE status = 'ready'"))
    return int(found or 0)


def questions(
    session: Session, settings: Settings, live: Sequence[Listener], *, unheard: Callable[[list[str]], Mapping[str, int]]
) -> Iterator[Finding]:
    """In a transaction that is rolled back. Each statement has seconds, so that a doctor is no burden itself.

    Args:
        session: Of the transaction.
        settings: With the limits of tenants.
        live: The workers.
        unheard: How many doorbells lie in each of these queues, as far as the broker says.
    """
    session.execute(text(f"SET LOCAL statement_timeout = {STATEMENT_MILLISECONDS}"))
    backlog = session.execute(BACKLOG, {"most": COUNTED_AT_MOST}).all()
    yield from _control(session, settings, live, unheard)
    yield from _workers(backlog, live)
    yield from _waiting(backlog)
    yield from _lost(session)
    yield from _tenants(session, settings)
    yield from _leftovers(session)


def _control(
    session: Session, settings: Settings, live: Sequence[Listener], unheard: Callable[[list[str]], Mapping[str, int]]
) -> Iterator[Finding]:
    check = "control loop"
    mend = "Start one: python -m worker.control. If one runs, its log says what keeps it."
    seen = session.execute(CONTROL, {"silent": CONTROL_SILENT_SECONDS}).one()
    if not seen.live:
        time.sleep(FIRST_SIGN_SECONDS)
        seen = session.execute(CONTROL, {"silent": CONTROL_SILENT_SECONDS}).one()
    expired = session.execute(EXPIRED, {"late": EXPIRED_SECONDS}).scalar_one()
    due = _unrung(session, settings)
    # Where bells lie, the loop has rung: it rings for no more jobs than lie there unheard.
    lengths = unheard(sorted(set(due.values()))) if due else {}
    lying = {queue: count for queue, count in lengths.items() if count}
    unrung = sorted(job_id for job_id, queue in due.items() if queue not in lying)
    if expired:
        says = f"{_jobs(expired)} held by dead workers for more than {EXPIRED_SECONDS} s past the lease, not taken back"
        yield wrong(check, says, mend)
    if unrung:
        says = f"{_jobs(len(unrung))} could start and {_was(len(unrung))} not told to for {UNRUNG_SECONDS} s"
        yield wrong(check, f"{says} ({_some(unrung)})", f"{mend} It also needs the workers' broker.")
    if not seen.live:
        ago = "was ever seen" if seen.silent is None else f"was seen for {_length(float(seen.silent))}"
        yield wrong(check, f"none {ago}: jobs do not start, and lost ones do not go on", mend)
    elif not expired and not unrung:
        yield ok(check, f"{seen.live} at work" if seen.live > 1 else "at work")
    if lengths or not due:  # the broker says, or need not be asked
        yield from _doorbells(session, lying, live)


def _doorbells(session: Session, lying: Mapping[str, int], live: Sequence[Listener]) -> Iterator[Finding]:
    """Bells that lie in the broker while workers who should hear them have a free slot."""
    check = "doorbells"
    busy = {row.worker: row.jobs for row in session.execute(HELD_BY)} if lying else {}
    for queue, count in lying.items():
        free = [one.worker for one in live if one.queue == queue and busy.get(one.worker, 0) < one.slots]
        says = f"{count} lie{'s' if count == 1 else ''} unheard in queue {queue}, whose workers have a slot free"
        mend = (
            "Let workers and control loop have the same FORGETD_BROKER_URL: server, and number after the slash. If "
            "they do, the log of each worker says whether it reaches the broker, and the store: a worker that the "
            "store does not answer takes no job."
        )
        yield wrong(check, f"{says} ({_some(free)})", mend)
    if not lying:
        yield ok(check, "none lies unheard while a slot is free")


def _unrung(session: Session, settings: Settings) -> dict[str, str]:
    """Jobs, with their queues, that have a free slot and that nobody told to start, in two looks."""
    left = _left_lying(session, settings)
    if left:
        time.sleep(AGAIN_SECONDS)
        again = _left_lying(session, settings)
        left = {job_id: queue for job_id, queue in left.items() if job_id in again}
    return left


def _left_lying(session: Session, settings: Settings) -> dict[str, str]:
    """In one look, whose locks are given back at once."""
    look = session.begin_nested()
    due = dispatch.dispatchable(session, ring_seconds=UNRUNG_SECONDS, running_jobs=settings.tenant_running_jobs)
    found = session.scalars(LEFT_LYING, {"ids": [job_id for job_id, _ in due], "late": UNRUNG_SECONDS})
    late = set(found)
    look.rollback()
    return {job_id: queue for job_id, queue in due if job_id in late}


def _workers(backlog: Sequence[Row[Any]], live: Sequence[Listener]) -> Iterator[Finding]:
    check = "workers"
    served = {one.queue for one in live}
    missing = False
    for row in backlog:
        if row.queue not in served:
            missing = True
            start = "forgetd worker --cpu" if row.queue == "cpu" else f"forgetd worker --gpu 0 --queues {row.queue}"
            yield wrong(
                check, f"{_jobs(row.jobs)} in queue {row.queue} and no worker listens to it", f"Start one: {start}"
            )
    if live:
        counts = {queue: sum(one.queue == queue for one in live) for queue in sorted(served)}
        named = ", ".join(f"{count} on {queue}" for queue, count in counts.items())
        yield ok(check, f"{len({one.worker for one in live})} listen: {named}")
    elif not missing:
        yield warning(check, "none listens: what is posted will wait", "Start some: forgetd worker --gpu 0, --cpu")


def _waiting(backlog: Sequence[Row[Any]]) -> Iterator[Finding]:
    check = "waiting jobs"
    long = [row for row in backlog if (row.oldest or 0) > QUEUED_SECONDS]
    for row in long:
        says = f"the oldest of {_jobs(row.jobs)} in queue {row.queue} has waited for {_length(float(row.oldest))}"
        yield warning(check, says, f"Add workers on {row.queue}, or see whose jobs they are: forgetd tenants list")
    if not long:
        yield ok(check, ", ".join(f"{row.jobs} in {row.queue}" for row in backlog) or "none")


def _lost(session: Session) -> Iterator[Finding]:
    rows = session.execute(LOST, {"losses": LOSSES, "most": SHOWN_AT_MOST + 1}).all()
    if rows:
        says = f"{_some([row.id for row in rows])} lost {rows[0].losses} attempts with their workers so far"
        mend = "See in the workers' logs why they died: lines that carry the job's id. Often it is memory."
        yield warning("lost attempts", says, mend)
    else:
        yield ok("lost attempts", f"no open job has lost {LOSSES} or more")


def _tenants(session: Session, settings: Settings) -> Iterator[Finding]:
    rows = session.execute(FULL, {"open": settings.tenant_open_jobs, "most": SHOWN_AT_MOST}).all()
    for row in rows:
        if row.pausing:
            says = f"{row.name} may run no job, and has {row.open} open"
            yield warning("tenants", says, f"To let them go on: forgetd tenants limit {row.name} --running-jobs none")
        else:
            says = f"{row.name} has {row.open} of {row.most} open jobs: more are refused"
            yield warning(
                "tenants", says, f"To allow more: forgetd tenants limit {row.name} --open-jobs {2 * row.most}"
            )
    if not rows:
        yield ok("tenants", "none is at its limit of open jobs")


def _leftovers(session: Session) -> Iterator[Finding]:
    late = {"late": UNSWEPT_MINUTES, "most": COUNTED_AT_MOST}
    mend = "A control loop erases them: it must run, and reach the store. Its log says what is not erased yet, and why."
    overdue = session.execute(OVERDUE, late).scalar_one()
    if overdue:
        says = f"{overdue} image set{_s(overdue)} past the hard cap still in the store"
        yield wrong("image sets", says, mend)
    else:
        yield ok("image sets", "none is past its hard cap")
    unswept = session.execute(UNSWEPT, late).scalar_one()
    if unswept:
        says = f"what {_jobs(unswept)} left in the store is still there {UNSWEPT_MINUTES} minutes after the end"
        yield warning("leftovers", says, mend)
    else:
        yield ok("leftovers", "swept behind every job")


def _jobs(count: int) -> str:
    return f"{count}{'+' if count == COUNTED_AT_MOST else ''} job{_s(count)}"


def _s(count: int) -> str:
    return "" if count == 1 else "s"


def _was(count: int) -> str:
    return "was" if count == 1 else "were"


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_AT_MOST]) + (", ..." if len(ids) > SHOWN_AT_MOST else "")


def _length(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
