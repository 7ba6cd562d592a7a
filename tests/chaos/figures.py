"""Figures of a chaos run: how long recovery, cancels and drains took, and whether two attempts computed at once."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from sqlalchemy import func, select

from services.database import Database
from services.tables import Job, JobEvent
from tests.chaos.audit import traced
from tests.chaos.callers import Promised
from tests.chaos.faults import Broken

__all__ = ["Figures", "figures", "overlap", "percentile"]


@dataclass(frozen=True)
class Figures:
    """In seconds, or how many; null where nothing was seen."""

    recoveries: int
    recovery_p50_seconds: float | None
    recovery_p99_seconds: float | None
    running_cancels: int
    running_cancel_p99_seconds: float | None
    queued_cancels: int
    queued_cancel_p99_seconds: float | None
    drains: int
    drain_max_seconds: float | None
    broker_outages: int
    start_after_broker_max_seconds: float | None
    posts_while_broker_away: int
    accepted_at_the_first_try: int
    computed_twice_max_seconds: float
    calls_repeated: int


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that at least this share of them does not exceed; None of none."""
    ordered = sorted(values)
    return round(ordered[max(0, ceil(share * len(ordered)) - 1)], 3) if ordered else None


def figures(database: Database, trace: Path, promised: Promised, broken: Broken) -> Figures:
    """What the rows, the trace and the callers tell."""
    starts: dict[str, list[float]] = defaultdict(list)
    with database.transaction() as session:
        epoch = func.extract("epoch", JobEvent.created_at)
        rows = select(JobEvent.job_id, epoch).where(JobEvent.type == "attempt_started").order_by(JobEvent.id)
        for job_id, at in session.execute(rows):
            starts[job_id].append(float(at))
        asked = func.extract("epoch", Job.finished_at - Job.cancel_requested_at)
        held = select(JobEvent.job_id).where(JobEvent.type == "cancel_requested")
        cancels = [
            float(it) for it in session.scalars(select(asked).where(Job.status == "cancelled", Job.id.in_(held)))
        ]
        times = func.extract("epoch", Job.created_at), func.extract("epoch", Job.started_at)
        born = [
            (float(made), float(began))
            for made, began in session.execute(select(*times).where(Job.started_at.is_not(None)))
        ]
    recoveries: list[float] = []
    for at, jobs in broken.worker_kills:
        for job_id in jobs:
            following = starts[job_id][bisect_right(starts[job_id], at) :]
            recoveries += [following[0] - at] if following else []
    waits = [began - back for gone, back in broken.broker_outages for made, began in born if gone < made < back]
    posts = [first for at, first in promised.posts if any(gone < at < back for gone, back in broken.broker_outages)]
    return Figures(
        recoveries=len(recoveries),
        recovery_p50_seconds=percentile(recoveries, 0.5),
        recovery_p99_seconds=percentile(recoveries, 0.99),
        running_cancels=len(cancels),
        running_cancel_p99_seconds=percentile(cancels, 0.99),
        queued_cancels=len(promised.queued_cancels),
        queued_cancel_p99_seconds=percentile(promised.queued_cancels, 0.99),
        drains=len(broken.drains),
        drain_max_seconds=percentile(broken.drains, 1.0),
        broker_outages=len(broken.broker_outages),
        start_after_broker_max_seconds=percentile(waits, 1.0),
        posts_while_broker_away=len(posts),
        accepted_at_the_first_try=sum(posts),
        computed_twice_max_seconds=overlap(trace),
        calls_repeated=promised.tried_again,
    )


def overlap(trace: Path) -> float:
    """The longest time in seconds that two runners computed the same job."""
    spans: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for lines in traced(trace).values():
        if lines and not lines[0].get("real"):
            spans[lines[0]["job"]].append((lines[0]["at"], lines[-1]["at"]))
    longest = 0.0
    for own in spans.values():
        own.sort()
        latest = own[0][1]
        for begin, end in own[1:]:  # against the longest of those before it, which need not be its neighbour
            longest = max(longest, min(latest, end) - begin)
            latest = max(latest, end)
    return round(longest, 3)
