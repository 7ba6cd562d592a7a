"""Single steps of the schema, with data that only one side of them knows."""

from __future__ import annotations

from typing import Any

import pytest
from alembic import command
from sqlalchemy import func, inspect, select, text

from services.database import Database
from services.ids import new_id
from services.migrations import MigrationBlocked, alembic_config, upgrade
from services.tables import AuditEvent, Checkpoint, Job, JobEvent
from services.tenancy import Caller


def _job(
    database: Database,
    caller: Caller,
    kind: str,
    *,
    queue: str = "gpu.flow",
    family: str | None = None,
    ended: bool = False,
    **values: Any,
) -> str:
    job_id, checkpoint_id = new_id("job"), new_id("ckpt")
    with database.transaction() as session:
        session.add(
            Checkpoint(
                id=checkpoint_id,
                tenant_id=caller.tenant_id,
                name="",
                declared={},
                source_bytes=1,
                source_sha256="",
                manifest={"family": family} if family else None,
            )
        )
        session.flush()
        session.add(
            Job(
                id=job_id,
                tenant_id=caller.tenant_id,
                kind=kind,
                queue=queue,
                checkpoint_id=checkpoint_id,
                request={},
                seed=0,
                status="failed" if ended else "queued",
                finished_at=func.now() if ended else None,
                **values,
            )
        )
        session.flush()
        session.add(JobEvent(tenant_id=caller.tenant_id, job_id=job_id, type="queued"))
    return job_id


def test_jobs_that_debias_go_with_the_version_that_knows_them(
    database: Database, database_url: str, caller: Caller
) -> None:
    forget, _ = _job(database, caller, "forget"), _job(database, caller, "debias")
    with database.transaction() as session:
        audited = session.scalar(select(func.count()).select_from(AuditEvent))

    command.downgrade(alembic_config(database_url), "0001")

    with database.transaction() as session:
        jobs = session.scalars(text("SELECT id FROM jobs")).all()
        events = session.scalars(text("SELECT job_id FROM job_events")).all()
        left = session.scalar(text("SELECT count(*) FROM audit_events"))
    assert jobs == events == [forget]
    assert left == audited
    command.upgrade(alembic_config(database_url), "head")
    assert _job(database, caller, "debias")


def _queues(database: Database) -> dict[str, str]:
    with database.transaction() as session:
        return {row.id: row.queue for row in session.execute(text("SELECT id, queue FROM jobs"))}


def test_waiting_jobs_find_the_queues_of_each_version(database: Database, database_url: str, caller: Caller) -> None:
    jobs = {
        _job(database, caller, "import", queue="cpu"): ("cpu.convert", "cpu"),
        _job(database, caller, "import", queue="cpu", ended=True): ("cpu.convert", "cpu"),
        _job(database, caller, "forget", queue="gpu.flow", family="vae"): ("gpu.flow", "gpu.flow"),
        _job(database, caller, "forget", queue="gpu.diffusion", family="ddpm"): ("gpu.flow", "gpu.diffusion"),
        _job(database, caller, "debias", queue="gpu.diffusion", family="stable-diffusion-xl"): (
            "gpu.flow",
            "gpu.diffusion",
        ),
        # of an ended job the queue is history
        _job(database, caller, "forget", queue="gpu.diffusion", family="ddpm", ended=True): ("gpu.flow", "gpu.flow"),
    }

    command.downgrade(alembic_config(database_url), "0002")
    older = _queues(database)
    command.upgrade(alembic_config(database_url), "head")

    assert older == {job_id: queue for job_id, (queue, _) in jobs.items()}
    assert _queues(database) == {job_id: queue for job_id, (_, queue) in jobs.items()}


def test_what_failed_by_a_deadline_stays_failed_in_older_versions(
    database: Database, database_url: str, caller: Caller
) -> None:
    _job(database, caller, "forget", ended=True, reason="deadline_exceeded", deadline_at=func.now())

    command.downgrade(alembic_config(database_url), "0002")

    with database.transaction() as session:
        rows = session.execute(text("SELECT status, reason FROM jobs")).all()
    assert [tuple(row) for row in rows] == [("failed", "deadline_exceeded")]
    command.upgrade(alembic_config(database_url), "head")


def test_a_step_that_gets_no_lock_is_undone_and_says_so(database: Database, database_url: str, caller: Caller) -> None:
    _job(database, caller, "import", queue="cpu")
    command.downgrade(alembic_config(database_url), "0002")
    before = _queues(database)

    with database.engine.connect() as other:
        other.execute(text("SELECT 1 FROM jobs"))  # as a backup does, for hours
        with pytest.raises(MigrationBlocked, match="locked by another session"):
            upgrade(database_url, lock_timeout="100ms")
        columns = {column["name"] for column in inspect(other).get_columns("tenants")}
        version = other.execute(text("SELECT version_num FROM alembic_version")).scalar_one()

    assert (version, _queues(database)) == ("0002", before)
    assert columns == {"id", "name", "created_at"}
    upgrade(database_url)
    command.check(alembic_config(database_url))
