"""Whose doorbell rings next: free slots go to tenants in turn, and order stays in SQL and out of the broker.

The row is the outbox: ``dispatchable`` says and locks what is due, the control loop rings, ``stamp_dispatched``
remembers it. What a look costs follows the fleet and not the backlog: it is asked of small partial indexes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    CompoundSelect,
    Row,
    bindparam,
    delete,
    func,
    literal,
    null,
    or_,
    select,
    text,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session
from sqlalchemy.types import Text

from services.places import Places
from services.statuses import is_held, is_queued
from services.tables import Job, Tenant, WorkerSlot

__all__ = ["WORKER_SILENT_SECONDS", "dispatchable", "retire_worker", "see_worker", "stamp_dispatched"]

WORKER_SILENT_SECONDS = 15
TENANTS_AT_ONCE = 50
BELLS_AT_ONCE = 50  # of a queue in one look, of which there are several a second
LOOKS = 3  # where another control loop holds what was chosen
NEVER = datetime.min.replace(tzinfo=UTC)

# Tenants with a backlog, by id, from the one after :after on and round to it again: a loose scan of ix_jobs_queued, one
# descent a tenant. Of each, the best jobs that may ring now; those that ring, pause or are late are few, and skipped.
# OFFSET 0 keeps a subquery as it is written: evaluated once, and asked by key.
BACKLOG = text("""
WITH RECURSIVE lap AS (
    SELECT start.tenant_id, start.tenant_id AS first, 1 AS number
    FROM (SELECT coalesce(
        (SELECT tenant_id FROM jobs WHERE status = 'queued' AND queue = :queue AND tenant_id > :after
         ORDER BY tenant_id LIMIT 1),
        (SELECT tenant_id FROM jobs WHERE status = 'queued' AND queue = :queue ORDER BY tenant_id LIMIT 1)
    ) AS tenant_id) AS start
    WHERE start.tenant_id IS NOT NULL
  UNION ALL
    SELECT next.tenant_id, lap.first, lap.number + 1
    FROM lap CROSS JOIN LATERAL (SELECT coalesce(
        (SELECT tenant_id FROM jobs WHERE status = 'queued' AND queue = :queue AND tenant_id > lap.tenant_id
         ORDER BY tenant_id LIMIT 1),
        (SELECT tenant_id FROM jobs WHERE status = 'queued' AND queue = :queue ORDER BY tenant_id LIMIT 1)
    ) AS tenant_id OFFSET 0) AS next
    WHERE lap.number < :tenants AND next.tenant_id <> lap.first
)
SELECT lap.tenant_id, tenant.max_running_jobs, tenant.last_served_at, best.id, best.priority
FROM lap CROSS JOIN LATERAL (SELECT * FROM tenants WHERE tenants.id = lap.tenant_id OFFSET 0) AS tenant
LEFT JOIN LATERAL (
    SELECT jobs.id, jobs.priority FROM jobs
    WHERE jobs.status = 'queued' AND jobs.queue = :queue AND jobs.tenant_id = lap.tenant_id
      AND (jobs.dispatched_at IS NULL OR jobs.dispatched_at <= statement_timestamp() - :ring)
      AND (jobs.not_before IS NULL OR jobs.not_before <= statement_timestamp())
      AND (jobs.deadline_at IS NULL OR jobs.deadline_at > statement_timestamp())
      AND jobs.id <> ALL (:passed_over)
    ORDER BY jobs.priority DESC, jobs.id LIMIT :room
) AS best ON true
ORDER BY lap.number, best.priority DESC, best.id
""").bindparams(bindparam("passed_over", type_=ARRAY(Text)))


@dataclass
class _Waiting:
    """One tenant's share of the queues that the same workers serve."""

    tenant_id: str
    limit: int | None  # of its jobs at work, here and elsewhere
    load: int  # what it has there, held or rung
    served_at: datetime
    jobs: list[tuple[int, str, str]] = field(default_factory=list)  # (-priority, id, queue)

    def best(self, full: set[str]) -> tuple[int, str, str] | None:
        """Its best job for a queue that has room."""
        return min((job for job in self.jobs if job[2] not in full), default=None)


def dispatchable(
    session: Session,
    *,
    ring_seconds: float,
    running_jobs: int | None = None,
    rounds: dict[str, str] | None = None,
    tenants_at_once: int = TENANTS_AT_ONCE,
) -> list[tuple[str, str]]:
    """Queued jobs whose doorbell should ring now, as (id, queue), locked until the transaction ends.

    No more than live workers have free slots, a slot counted once however many queues it listens to. A slot goes to the
    tenant that has least, held and rung, in the queues that the same workers serve; of those that have as little, to
    the one served least recently. Priority orders within a tenant.

    Args:
        session: What it locks, other control loops pass over.
        ring_seconds: A doorbell that rang longer ago than this, unanswered, may ring again.
        running_jobs: How many jobs a tenant may have at work that has no limit of its own; None: any number.
        rounds: By queue, where this loop's next look begins; kept here from look to look. It matters only with more
            tenants in a queue than are weighed at once: these are then weighed in groups, one group a look.
        tenants_at_once: How many tenants of a queue are weighed against each other, beside one for each free slot.
    """
    look = _Look(
        session, timedelta(seconds=ring_seconds), running_jobs, {} if rounds is None else rounds, tenants_at_once
    )
    due: list[tuple[str, str]] = []
    for _ in range(LOOKS):
        chosen = look.choose()
        locked = look.lock([job_id for job_id, _ in chosen])
        due = [(job_id, queue) for job_id, queue in chosen if job_id in locked]
        if len(due) == len(chosen):
            break
        look.passed_over |= {job_id for job_id, _ in chosen} - locked
    return due


@dataclass
class _Look:
    """The questions of one call of ``dispatchable``, which has the meaning of the first fields."""

    session: Session
    ring: timedelta
    running_jobs: int | None
    rounds: dict[str, str]
    tenants_at_once: int
    passed_over: set[str] = field(default_factory=set)  # what another control loop has in its hands

    def choose(self) -> list[tuple[str, str]]:
        """What should ring, best first, without locking it."""
        under_way = self._under_way()
        places = _places(self.session, under_way)
        room = {queue: count for queue in sorted(places.queues) if (count := places.room(queue))}
        at_work: Counter[str] = Counter()
        load: Counter[tuple[frozenset[str], str]] = Counter()
        for row in under_way:
            at_work[row.tenant_id] += row.number
            load[places.pool(row.queue), row.tenant_id] += row.number
        waiting: dict[tuple[frozenset[str], str], _Waiting] = {}
        for queue, count in room.items():
            for row in self._backlog(queue, min(count, BELLS_AT_ONCE), at_work):
                key = places.pool(queue), row.tenant_id
                if key not in waiting:
                    served_at = row.last_served_at or NEVER
                    waiting[key] = _Waiting(row.tenant_id, self._limit(row), load[key], served_at)
                waiting[key].jobs.append((-row.priority, row.id, queue))
        return _in_turn(list(waiting.values()), places, at_work)

    def lock(self, job_ids: list[str]) -> set[str]:
        """Those of the chosen that are still due once they are locked, and not in another loop's hands."""
        if not job_ids:
            return set()
        silent = or_(Job.dispatched_at.is_(None), Job.dispatched_at <= func.statement_timestamp() - literal(self.ring))
        due = select(Job.id).where(Job.id.in_(job_ids), is_queued(), silent)
        return set(self.session.scalars(due.with_for_update(skip_locked=True, key_share=True)))

    def _under_way(self) -> list[Row[Any]]:
        """What is held and what is rung, by queue, tenant and, if held, worker."""
        held = select(Job.queue, Job.tenant_id, Job.worker, func.count().label("number")).where(is_held())
        rung = select(Job.queue, Job.tenant_id, null().label("worker"), func.count()).where(
            is_queued(), Job.dispatched_at > func.statement_timestamp() - literal(self.ring)
        )
        both: CompoundSelect[Any] = union_all(
            held.group_by(Job.queue, Job.tenant_id, Job.worker), rung.group_by(Job.queue, Job.tenant_id)
        )
        return list(self.session.execute(both).all())

    def _backlog(self, queue: str, room: int, at_work: Counter[str]) -> list[Row[Any]]:
        """The best waiting jobs of a queue's tenants: of all tenants, or of enough of them to fill the room."""
        group = self.tenants_at_once + room
        seen: set[str] = set()
        able: set[str] = set()
        rows: list[Row[Any]] = []
        while len(able) < room:
            asked = {"queue": queue, "after": self.rounds.get(queue, ""), "tenants": group, "room": room}
            asked |= {"ring": self.ring, "passed_over": sorted(self.passed_over)}
            found = self.session.execute(BACKLOG, asked).all()
            tenants = list(dict.fromkeys(row.tenant_id for row in found))
            if set(tenants) <= seen:
                break  # once round
            for row in found:
                limit = self._limit(row)
                if row.id is None or row.tenant_id in seen or (limit is not None and at_work[row.tenant_id] >= limit):
                    continue
                able.add(row.tenant_id)
                rows.append(row)
            seen.update(tenants)
            if len(tenants) < group:
                break
            self.rounds[queue] = tenants[-1]
        return rows

    def _limit(self, row: Row[Any]) -> int | None:
        limit: int | None = row.max_running_jobs
        return self.running_jobs if limit is None else limit


def _in_turn(waiting: list[_Waiting], places: Places, at_work: Counter[str]) -> list[tuple[str, str]]:
    """Hand the free places out, one at a time, to whoever has least."""
    full: set[str] = set()
    turns = [
        (one.load, one.served_at, best[1], number) for number, one in enumerate(waiting) if (best := one.best(full))
    ]
    heapq.heapify(turns)
    chosen: list[tuple[str, str]] = []
    while turns:
        number = heapq.heappop(turns)[3]
        one = waiting[number]
        best = one.best(full)
        if best is None or (one.limit is not None and at_work[one.tenant_id] >= one.limit):
            continue
        if places.take(best[2]):
            chosen.append((best[1], best[2]))
            one.jobs.remove(best)
            one.load += 1
            at_work[one.tenant_id] += 1
        else:
            full.add(best[2])  # for good: what is taken only grows
        if (after := one.best(full)) is not None:
            heapq.heappush(turns, (one.load, one.served_at, after[1], number))
    return chosen


def _places(session: Session, under_way: list[Row[Any]]) -> Places:
    """The free slots of live workers, less those that doorbells on their way will take."""
    live = WorkerSlot.seen_at > func.clock_timestamp() - timedelta(seconds=WORKER_SILENT_SECONDS)
    workers: dict[str, tuple[set[str], int]] = {}
    listening = session.execute(select(WorkerSlot.id, WorkerSlot.queue, WorkerSlot.slots).where(live))
    for worker, queue, slots in listening:
        workers.setdefault(worker, (set(), slots))[0].add(queue)
    # A lease of a dead worker takes no slot of a living one; a living one's lease does, whatever its queue.
    busy = Counter[str]()
    for row in under_way:
        busy[row.worker] += row.number
    places = Places()
    for worker, (queues, slots) in workers.items():
        places.add(queues, slots - busy[worker])
    for row in under_way:
        if row.worker is None:
            for _ in range(row.number):
                places.take(row.queue)
    return places


def stamp_dispatched(session: Session, job_ids: list[str]) -> None:
    """Remember that these doorbells were rung, and that their tenants were served."""
    session.execute(update(Job).where(Job.id.in_(job_ids)).values(dispatched_at=func.clock_timestamp()))
    owners = select(Job.tenant_id).where(Job.id.in_(job_ids))
    # A request or a claim may hold a tenant's row: nobody's bell waits for it, and that tenant's turn comes sooner.
    free = select(Tenant.id).where(Tenant.id.in_(owners)).with_for_update(skip_locked=True, key_share=True)
    session.execute(update(Tenant).where(Tenant.id.in_(free)).values(last_served_at=func.clock_timestamp()))


def see_worker(session: Session, worker: str, queues: list[str], slots: int) -> None:
    """A worker says that it lives and how many jobs it can hold at once."""
    for queue in queues:
        row = upsert(WorkerSlot).values(id=worker, queue=queue, slots=slots, seen_at=func.clock_timestamp())
        values = {"slots": slots, "seen_at": func.clock_timestamp()}
        session.execute(row.on_conflict_do_update(index_elements=["id", "queue"], set_=values))


def retire_worker(session: Session, worker: str) -> None:
    """A worker says that it will take nothing more; long-silent rows go with it."""
    silent = WorkerSlot.seen_at < func.clock_timestamp() - timedelta(hours=1)
    session.execute(delete(WorkerSlot).where(or_(WorkerSlot.id == worker, silent)))
