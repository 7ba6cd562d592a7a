"""How things stand at a scrape: asked of the database, each time by flat statements on small indexes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Gauge, generate_latest
from sqlalchemy import text
from sqlalchemy.orm import Session

from services.dispatch import WORKER_SILENT_SECONDS

__all__ = ["BACKLOG", "database_up", "gauges"]

COUNTED_AT_MOST = 10_001  # of a backlog, since counting all of a million takes a while
SCRAPE_MILLISECONDS = 2000

# The queues of waiting jobs, found by hopping through ix_jobs_queued: a long backlog costs no more than a short one.
BACKLOG = text("""
WITH RECURSIVE hop AS (
    (SELECT queue FROM jobs WHERE status = 'queued' ORDER BY queue LIMIT 1)
    UNION ALL
    SELECT (SELECT queue FROM jobs WHERE status = 'queued' AND queue > hop.queue ORDER BY queue LIMIT 1)
    FROM hop WHERE hop.queue IS NOT NULL
)
SELECT hop.queue,
    (SELECT count(*) FROM (SELECT FROM jobs WHERE status = 'queued' AND jobs.queue = hop.queue LIMIT :most) AS few)
        AS jobs,
    (SELECT extract(epoch FROM clock_timestamp() - created_at) FROM jobs
        WHERE status = 'queued' AND started_at IS NULL AND jobs.queue = hop.queue ORDER BY created_at LIMIT 1) AS oldest
FROM hop WHERE hop.queue IS NOT NULL
""")
HELD = text("""
SELECT queue, count(*) AS jobs, count(*) FILTER (WHERE status = 'cancelling') AS cancelling,
    count(*) FILTER (WHERE lease_until < clock_timestamp()) AS expired
FROM jobs WHERE status IN ('running', 'cancelling') GROUP BY queue
""")
LISTENING = text("""
SELECT queue, count(*) FILTER (WHERE live) AS workers, coalesce(sum(slots) FILTER (WHERE live), 0) AS slots
FROM (SELECT queue, slots, seen_at > clock_timestamp() - make_interval(secs => :silent) AS live
    FROM worker_slots) AS seen
GROUP BY queue
""")
UNSWEPT = text("""
SELECT count(*) FROM (SELECT FROM jobs WHERE finished_at IS NOT NULL AND swept_at IS NULL LIMIT :most) AS few
""")


def gauges(session: Session) -> str:
    """How things stand, in the text format of Prometheus."""
    session.execute(text(f"SET LOCAL statement_timeout = {SCRAPE_MILLISECONDS}"))
    backlog = session.execute(BACKLOG, {"most": COUNTED_AT_MOST}).all()
    held = session.execute(HELD).all()
    listening = session.execute(LISTENING, {"silent": WORKER_SILENT_SECONDS}).all()
    unswept = session.scalar(UNSWEPT, {"most": COUNTED_AT_MOST})
    queues = sorted({row.queue for rows in (backlog, held, listening) for row in rows})
    board = _Board(queues)
    board.of_queues(
        "queue_jobs",
        f"Jobs that wait, counted up to {COUNTED_AT_MOST}.",
        {row.queue: row.jobs for row in backlog},
    )
    board.of_queues(
        "queue_oldest_seconds",
        "How long the oldest job has waited of those that were never started.",
        {row.queue: row.oldest or 0 for row in backlog},
    )
    board.of_queues(
        "jobs_running",
        "Jobs that a worker holds, those that are being cancelled too.",
        {row.queue: row.jobs for row in held},
    )
    board.of_queues("workers", "Workers that listen.", {row.queue: row.workers for row in listening})
    board.of_queues(
        "worker_slots", "Jobs that these workers can hold at once.", {row.queue: row.slots for row in listening}
    )
    board.of_all(
        "jobs_cancelling", "Jobs that were asked to end and have not yet.", sum(row.cancelling for row in held)
    )
    board.of_all(
        "leases_expired",
        "Jobs held past their lease that nobody has taken back: above 0 for long, no control loop is at work.",
        sum(row.expired for row in held),
    )
    board.of_all(
        "jobs_unswept",
        f"Ended jobs whose leftovers still lie in the store, counted up to {COUNTED_AT_MOST}.",
        unswept or 0,
    )
    return board.text() + database_up(True)


def database_up(answers: bool) -> str:
    """Whether PostgreSQL answers, in the same format."""
    board = _Board([])
    board.of_all("database_up", "Whether PostgreSQL answered this scrape; if not, nothing else is shown.", answers)
    return board.text()


class _Board:
    """Gauges of one scrape."""

    def __init__(self, queues: Iterable[str]) -> None:
        self._registry, self._queues = CollectorRegistry(auto_describe=False), queues

    def of_queues(self, name: str, told: str, values: Mapping[str, float]) -> None:
        gauge = Gauge(f"forgetd_{name}", told, ["queue"], registry=self._registry)
        for queue in self._queues:
            gauge.labels(queue).set(float(values.get(queue, 0)))

    def of_all(self, name: str, told: str, value: float) -> None:
        Gauge(f"forgetd_{name}", told, registry=self._registry).set(float(value))

    def text(self) -> str:
        return generate_latest(self._registry).decode()
