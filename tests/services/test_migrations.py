"""Single steps of the schema, with data that only one side of them knows."""

from __future__ import annotations

from alembic import command
from sqlalchemy import func, select, text

from services.database import Database
from services.ids import new_id
from services.migrations import alembic_config
from services.tables import AuditEvent, Checkpoint, Job, JobEvent
from services.tenancy import Caller


def _job(database: Database, caller: Caller, kind: str) -> str:
    job_id, checkpoint_id = new_id("job"), new_id("ckpt")
    with database.transaction() as session:
        session.add(
            Checkpoint(
                id=checkpoint_id, tenant_id=caller.tenant_id, name="", declared={}, source_bytes=1, source_sha256=""
            )
        )
        session.flush()
        session.add(
            Job(
                id=job_id,
                tenant_id=caller.tenant_id,
                kind=kind,
                queue="gpu.flow",
                checkpoint_id=checkpoint_id,
                request={},
                seed=0,
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
