"""The figures of every process as rows of the database, and their sums.

A row holds what its process has counted since it began. The total is the sum over the rows, also of processes that are
gone; rows that were silent for an hour are folded into one, in one transaction, so that totals never go backwards,
whichever gateway shows them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping

from sqlalchemy import delete, func, select, text
from sqlalchemy import update as change
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.orm import Session

from services.database import Database
from services.tables import ProcessCounters

__all__ = ["Row", "expose", "fold", "totals"]

GONE = "gone"  # the row into which the others are folded
SILENT_SECONDS = 3600
BUCKET = re.compile(r'(?:(?<={)|,)le="([^"]+)"')


class Row:
    """The row of one process.

    If the row is folded while its process sleeps, what it held is in the sum already: the process goes on in a new row,
    from nought.
    """

    def __init__(self, process: str, kind: str) -> None:
        self._process, self._kind = process, kind
        self._folds = 0
        self._there = False
        self._held: dict[str, float] = {}  # what the row held when it was last written
        self._base: dict[str, float] = {}  # what is in the sum of earlier rows

    def write(self, database: Database, samples: Mapping[str, float]) -> None:
        """Bring the row up to date. ``samples`` count from the beginning of the process."""
        with database.transaction() as session:
            if self._there and not self._update(session, self._since(samples)):
                self._folds += 1
                self._base, self._there = self._held, False
            if not self._there:
                self._insert(session, self._since(samples))
        self._there, self._held = True, dict(samples)

    @property
    def _name(self) -> str:
        return f"{self._process}+{self._folds}" if self._folds else self._process

    def _since(self, samples: Mapping[str, float]) -> dict[str, float]:
        return {key: value - self._base.get(key, 0.0) for key, value in samples.items()}

    def _update(self, session: Session, samples: dict[str, float]) -> bool:
        return (
            session.execute(
                change(ProcessCounters)
                .where(ProcessCounters.process == self._name)
                .values(samples=samples, seen_at=func.clock_timestamp())
                .returning(ProcessCounters.process)
            ).scalar_one_or_none()
            is not None
        )

    def _insert(self, session: Session, samples: dict[str, float]) -> None:
        # On a conflict it is our own row: an earlier COMMIT arrived, and its reply was lost.
        values = {"samples": samples, "seen_at": func.clock_timestamp()}
        row = upsert(ProcessCounters).values(process=self._name, kind=self._kind, **values)
        session.execute(row.on_conflict_do_update(index_elements=["process"], set_=values))


def fold(session: Session) -> int:
    """Add the rows of processes that were silent for an hour to one row. Returns how many."""
    row = upsert(ProcessCounters).values(process=GONE, kind=GONE, samples={}, seen_at=func.clock_timestamp())
    session.execute(row.on_conflict_do_nothing())
    # One at a time folds; the lock on the sum is taken before the rows are, and held until both are written.
    sums = session.scalars(select(ProcessCounters).where(ProcessCounters.process == GONE).with_for_update()).one()
    silent = ProcessCounters.seen_at < func.clock_timestamp() - text(f"interval '{SILENT_SECONDS} seconds'")
    rows = session.scalars(
        delete(ProcessCounters)
        .where(ProcessCounters.process != GONE, silent)
        .returning(ProcessCounters.samples)
        .execution_options(synchronize_session=False)
    ).all()
    total = defaultdict(float, sums.samples)
    for samples in rows:
        for key, value in samples.items():
            total[key] += value
    if rows:
        session.execute(
            change(ProcessCounters)
            .where(ProcessCounters.process == GONE)
            .values(samples=dict(total), seen_at=func.clock_timestamp())
            .execution_options(synchronize_session=False)
        )
    return len(rows)


TOTALS = text(
    "SELECT sample.key, sum(sample.value::float8) AS total "
    "FROM process_counters, jsonb_each_text(samples) AS sample GROUP BY sample.key"
)


def totals(session: Session) -> dict[str, float]:
    """The sums over every process that ever was, by sample: one statement, and so one moment."""
    return {row.key: row.total for row in session.execute(TOTALS)}


def expose(samples: Mapping[str, float], headers: Mapping[str, str]) -> str:
    """Sums as Prometheus reads them. What a newer version counts, and this one has no words for, is left out."""
    families: dict[str, list[str]] = {name: [] for name in headers}
    for key in sorted(samples, key=_place):
        name = key.partition("{")[0]
        family = name if name in families else name.rpartition("_")[0]
        if family in families:
            families[family].append(f"{key} {samples[key]!r}\n")
    return "".join(headers[name] + "".join(lines) for name, lines in families.items())


def _place(key: str) -> tuple[str, str, float]:
    """Where a sample stands: a histogram's buckets together, in their order."""
    bound = BUCKET.search(key)
    name = key.partition("{")[0]
    return (name, BUCKET.sub("", key), float(bound[1])) if bound else (name, key, 0.0)
