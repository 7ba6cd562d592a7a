"""What must not stay: states, artifacts of lost attempts, images of people, uploads that nobody finished."""

from __future__ import annotations

import logging
import re
from datetime import UTC, datetime, timedelta

from botocore.exceptions import BotoCoreError, ClientError
from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from services import checkpoints, idempotency, image_sets, object_keys
from services.database import Database
from services.storage import ObjectStorage
from services.tables import Checkpoint, Classifier, ImageSet, Job, Tenant

__all__ = ["sweep", "swept_early", "tidy"]

logger = logging.getLogger(__name__)

SWEEP_AT_ONCE = 20
SETS_AT_ONCE = 5
UNFINISHED_HOURS = 24
STALE_WRITERS = timedelta(days=2)  # an attempt that lost its lease may go on writing, but not for this long
TENANTS = "tenants/"
OWNED = re.compile(r"tenants/[^/]+/(checkpoints|classifiers|image-sets)/((?:ckpt|clf|imgs)_[0-9a-f]{32})/")


def sweep(database: Database, storage: ObjectStorage) -> int:
    """Sweep behind the jobs that ended, then erase the image sets that are due. Returns how many rows were done.

    A row is locked while the store deletes: two janitors never do the same one. A row whose deletion fails stays due
    and holds up nobody else.
    """
    failed: set[str] = set()
    done = 0
    while done + len(failed) < SWEEP_AT_ONCE:
        job_id = _next_job(database, storage, failed)
        if job_id is None:
            break
        done += job_id not in failed
    return done + _erase_sets(database, storage)


def _next_job(database: Database, storage: ObjectStorage, failed: set[str]) -> str | None:
    """Sweep behind one job; its id joins ``failed`` when the store refuses."""
    with database.transaction() as session:
        job = session.scalar(
            select(Job)
            .where(Job.finished_at.is_not(None), Job.swept_at.is_(None), Job.id.not_in(failed))
            .order_by(Job.finished_at)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        if job is None:
            return None
        try:
            gone = _sweep(session, storage, job)
        except (BotoCoreError, ClientError, RuntimeError) as error:
            logger.warning("%s: not swept yet (%s)", job.id, type(error).__name__)
            failed.add(job.id)
            return job.id
        session.execute(update(Job).where(Job.id == job.id).values(swept_at=func.clock_timestamp()))
    if gone:
        logger.info("%s: %d objects swept", job.id, gone)
    return job.id


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


def _erase_sets(database: Database, storage: ObjectStorage) -> int:
    done = 0
    with database.transaction() as session:
        for row in image_sets.erasable(session, limit=SETS_AT_ONCE):
            why = "expired" if row.expires_at < datetime.now(UTC) else "job ended"
            try:
                gone = image_sets.erase(session, storage, row, why=why)
            except (BotoCoreError, ClientError, RuntimeError) as error:
                logger.warning("%s: not erased yet (%s)", row.id, type(error).__name__)
                continue
            logger.info("%s: %d objects erased", row.id, gone)
            done += 1
    return done


def tidy(database: Database, storage: ObjectStorage) -> int:
    """Remove uploads that were begun a day ago and never became a row, and what stale attempts wrote behind the sweep.

    Idempotency records of a day go too. Returns how many objects went.
    """
    with database.transaction() as session:
        idempotency.purge(session)
    older = timedelta(hours=UNFINISHED_HOURS)
    gone = _sweep_again(database, storage)
    gone += storage.abort_unfinished(TENANTS, older_than=older)
    with database.transaction() as session:
        tenants = list(session.scalars(select(Tenant.id)))
    for tenant_id in tenants:
        prefix = object_keys.tenant_prefix(tenant_id)
        found: dict[str, str] = {}
        for part in ("checkpoints/", "classifiers/", "image-sets/"):
            for key in storage.keys(prefix + part):
                if (match := OWNED.match(key)) is not None:
                    found[match[2]] = match[0]
        old = {name: where for name, where in found.items() if _made_at(name) < datetime.now(UTC) - older}
        for name in _without_row(database, tenant_id, set(old)):
            gone += storage.erase(old[name])
    if gone:
        logger.info("%d objects of unfinished uploads and stale attempts removed", gone)
    return gone


def _sweep_again(database: Database, storage: ObjectStorage) -> int:
    """Sweep every job again whose last sweep came too early to be behind every stale attempt of it."""
    with database.transaction() as session:
        due = list(session.scalars(select(Job.id).where(swept_early())))
    gone = 0
    for job_id in due:
        with database.transaction() as session:
            job = session.scalar(select(Job).where(Job.id == job_id, swept_early()).with_for_update(skip_locked=True))
            if job is None:
                continue
            try:
                gone += _sweep(session, storage, job)
            except (BotoCoreError, ClientError, RuntimeError) as error:
                logger.warning("%s: not swept again (%s)", job_id, type(error).__name__)
                continue
            session.execute(update(Job).where(Job.id == job_id).values(swept_at=func.clock_timestamp()))
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
