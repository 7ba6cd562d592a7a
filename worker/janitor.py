"""What must not stay: states, artifacts of lost attempts, images of people, uploads that nobody finished."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import partial

from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy import ColumnElement, func, select, tuple_, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from services import checkpoints, idempotency, image_sets, metrics_table, object_keys, uploads
from services.database import Database
from services.storage import ObjectStorage
from services.tables import Checkpoint, Classifier, ImageSet, Job, Tenant

__all__ = ["sweep", "swept_early", "tidy"]

logger = logging.getLogger(__name__)

SWEEP_AT_ONCE = 20
SETS_AT_ONCE = 5
UNFINISHED_HOURS = uploads.UNFINISHED_HOURS  # one of images that never became a set is gone within a day too
STALE_WRITERS = timedelta(days=2)  # an attempt that lost its lease may go on writing, but not for this long
TENANTS = "tenants/"
REFUSED = (BotoCoreError, ClientError, RuntimeError)  # by the store, or no answer from it
FAULTS_OF_A_ROW = (*REFUSED, SQLAlchemyError)  # of a database that is away, the question for the next row says so
OWNED = re.compile(r"tenants/[^/]+/(checkpoints|classifiers|image-sets)/((?:ckpt|clf|imgs)_[0-9a-f]{32})/")


def sweep(database: Database, storage: ObjectStorage) -> int:
    """Erase the image sets that are due and sweep behind the jobs that ended. Returns how many rows were done.

    No row is locked while the store deletes, and two janitors never do the same one. A row whose deletion fails stays
    due and holds up nobody else; images of people wait for no job but their own.
    """
    passed_sets: set[str] = set()
    done = _erase_sets(database, storage, passed_sets)
    unswept = Job.finished_at.is_not(None) & Job.swept_at.is_(None)
    walk = _Walk()
    for _ in range(SWEEP_AT_ONCE):
        if _sweep_one(database, storage, unswept, walk) is None:
            break
        done += 1
    return done + _erase_sets(database, storage, passed_sets)  # of the jobs that have just been swept


@dataclass
class _Walk:
    """One turn over jobs in the order in which they ended: each is met once, whatever becomes of it."""

    last: tuple[datetime, str] | None = None

    def next(self, session: Session, due: ColumnElement[bool]) -> str | None:
        """The job that ended first of those that are due and were not met yet."""
        jobs = select(Job.finished_at, Job.id).where(due).order_by(Job.finished_at, Job.id).limit(1)
        if self.last is not None:
            jobs = jobs.where(Job.finished_at >= self.last[0], tuple_(Job.finished_at, Job.id) > tuple_(*self.last))
        if (row := session.execute(jobs).first()) is None:
            return None
        self.last = row.finished_at, row.id
        return str(row.id)


def _sweep_one(database: Database, storage: ObjectStorage, due: ColumnElement[bool], walk: _Walk) -> int | None:
    """Sweep behind the next job that is due. Returns how many objects went; None once no other job is due.

    Jobs that the store or the database refuses, or that another janitor is at, are left for another turn.
    """
    while True:
        with database.transaction() as session:
            job_id = walk.next(session, due)
        if job_id is None:
            return None
        try:
            gone = _sweep_behind(database, storage, due, job_id)
        except FAULTS_OF_A_ROW as error:
            logger.warning("%s: not swept yet (%s)", job_id, type(error).__name__)
            continue
        if gone is None:
            continue
        if gone:
            logger.info("%s: %d objects swept", job_id, gone)
        return gone


def _sweep_behind(database: Database, storage: ObjectStorage, due: ColumnElement[bool], job_id: str) -> int | None:
    """How many objects of a job went; None where it is another's to sweep, or nobody's yet."""
    with database.transaction() as session:
        if not image_sets.condemn(session, job_id):
            return None
    with database.transaction() as session:  # another: no row is locked while the store deletes
        # Asked again once it is ours: another may have done it in between.
        if not _alone(session, job_id) or (job := session.scalar(select(Job).where(due, Job.id == job_id))) is None:
            return None
        gone = _sweep(session, storage, job)
        session.execute(update(Job).where(Job.id == job_id).values(swept_at=func.clock_timestamp()))
    return gone


def _alone(session: Session, name: str) -> bool:
    """Whether no other janitor is at this row; none will be before the transaction ends. Nobody else asks."""
    return bool(session.scalar(select(func.pg_try_advisory_xact_lock(func.hashtextextended(name, 0)))))


def _sweep(session: Session, storage: ObjectStorage, job: Job) -> int:
    gone = storage.erase(object_keys.states_prefix(job.tenant_id, job.id))
    for prefix in _attempt_prefixes(storage, job):
        if prefix != job.published_prefix:
            gone += storage.erase(prefix)
    if job.kind == "import":
        # The file as uploaded is not needed any more, whether it was converted or refused.
        gone += storage.erase(object_keys.checkpoint_source(job.tenant_id, job.checkpoint_id))
        checkpoints.forget_source(session, job.tenant_id, job.checkpoint_id)
    return gone


def _attempt_prefixes(storage: ObjectStorage, job: Job) -> set[str]:
    """The attempts of a job that left something in the store."""
    root = f"{object_keys.job_prefix(job.tenant_id, job.id)}attempts/"
    return {f"{root}{key.removeprefix(root).partition('/')[0]}/" for key in storage.keys(root)}


def _erase_sets(database: Database, storage: ObjectStorage, passed: set[str]) -> int:
    """Erase a few sets of those that are due and not ``passed``, which they join. Returns how many."""
    done = 0
    while done < SETS_AT_ONCE:
        with database.transaction() as session:
            due = image_sets.due(session, limit=SETS_AT_ONCE, but_not=passed)
        if not due:
            break
        passed |= set(due)
        for image_set_id, why in due.items():
            try:
                done += _erase_set(database, storage, image_set_id, why)
            except FAULTS_OF_A_ROW as error:
                logger.warning("%s: not erased yet (%s)", image_set_id, type(error).__name__)
    return done


def _erase_set(database: Database, storage: ObjectStorage, image_set_id: str, why: str) -> bool:
    with database.transaction() as session:
        row = session.get(ImageSet, image_set_id) if _alone(session, image_set_id) else None
        if row is None or row.erased_at is not None:
            return False
        gone = image_sets.erase(session, storage, row, why=why)
    logger.info("%s: %d objects erased", image_set_id, gone)
    return True


def tidy(
    database: Database,
    storage: ObjectStorage,
    *,
    unfinished: timedelta = timedelta(hours=UNFINISHED_HOURS),
    stale: timedelta = STALE_WRITERS,
) -> int:
    """Remove uploads begun longer ago than ``unfinished`` that are no row, and what stale attempts wrote since a sweep.

    A job is swept again once, when it ended longer ago than ``stale``. Idempotency records of a day go too, and the
    figures of processes that ended become one sum. What the store refuses is left for the next time and holds up
    nothing else. Returns how many objects went.
    """
    with database.transaction() as session:
        idempotency.purge(session)
    with database.transaction() as session:
        metrics_table.fold(session)
    gone = _sweep_again(database, storage, stale)
    gone += _tolerated("unfinished uploads", lambda: storage.abort_unfinished(TENANTS, older_than=unfinished))
    with database.transaction() as session:
        tenants = list(session.scalars(select(Tenant.id)))
    for tenant_id in tenants:
        gone += _tolerated(tenant_id, partial(_erase_unowned, database, storage, tenant_id, unfinished))
    if gone:
        logger.info("%d objects of unfinished uploads and stale attempts removed", gone)
    return gone


def _erase_unowned(database: Database, storage: ObjectStorage, tenant_id: str, unfinished: timedelta) -> int:
    """Remove what lies where a row of the tenant's would name it, and none does."""
    prefix = object_keys.tenant_prefix(tenant_id)
    found: dict[str, str] = {}
    for part in ("checkpoints/", "classifiers/", "image-sets/"):
        for key in storage.keys(prefix + part):
            if (match := OWNED.match(key)) is not None:
                found[match[2]] = match[0]
    old = {name: where for name, where in found.items() if _made_at(name) < datetime.now(UTC) - unfinished}
    names = _without_row(database, tenant_id, set(old))
    return sum(_tolerated(name, partial(storage.erase, old[name])) for name in names)


def _tolerated(what: str, remove: Callable[[], int]) -> int:
    """How many objects that removed; none where the store refused."""
    try:
        return remove()
    except REFUSED as error:
        logger.warning("%s: not removed yet (%s)", what, type(error).__name__)
        return 0


def _sweep_again(database: Database, storage: ObjectStorage, stale: timedelta) -> int:
    """Sweep the jobs again that ended so long ago that no stale attempt of theirs writes any more."""
    due = swept_early() & (Job.finished_at < func.clock_timestamp() - stale)
    walk = _Walk()
    gone = 0
    while (swept := _sweep_one(database, storage, due, walk)) is not None:
        gone += swept
    return gone


def swept_early() -> ColumnElement[bool]:
    """A stale attempt may have written after the last sweep. The condition of ``ix_jobs_swept_early``, in its form."""
    return Job.swept_at - Job.finished_at < STALE_WRITERS


def _made_at(name: str) -> datetime:
    """When an identifier was made: the first 48 bits of a UUIDv7 are milliseconds."""
    return datetime.fromtimestamp(int(name.partition("_")[2][:12], 16) / 1000, UTC)


def _without_row(database: Database, tenant_id: str, names: set[str]) -> set[str]:
    known: set[str] = set()
    with database.transaction() as session:
        for table in (Checkpoint, Classifier, ImageSet):
            known |= set(session.scalars(select(table.id).where(table.tenant_id == tenant_id, table.id.in_(names))))
    return names - known
