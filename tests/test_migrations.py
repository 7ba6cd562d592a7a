"""The schema: tables and migrations agree, and every step goes both ways, with rows in every table."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, create_engine, inspect, text
from sqlalchemy.exc import DBAPIError

from services.database import Database
from services.migrations import MigrationBlocked, alembic_config, at_head, upgrade
from services.tenancy import NewKey
from tests.worker.helpers import eventually

REVISIONS = [
    step.revision for step in reversed(list(ScriptDirectory.from_config(alembic_config()).walk_revisions()))
]  # the oldest first
VERSION = "alembic_version"

# A row of each table, by what it had at first. A table without one here fails the tests below: give it one.
ROWS = {
    "tenants": "(id, name) VALUES ('ten_1', 'one')",
    "api_keys": "(id, tenant_id, name, secret_sha256) VALUES ('key_1', 'ten_1', '', '')",
    "checkpoints": "(id, tenant_id, name, declared, source_bytes, source_sha256) "
    "VALUES ('c', 'ten_1', '', '{}', 1, '')",
    "image_sets": "(id, tenant_id, count, total_bytes, images, expires_at) VALUES ('i', 'ten_1', 0, 0, '[]', now())",
    "jobs": "(id, tenant_id, kind, queue, checkpoint_id, request, seed) "
    "VALUES ('job_1', 'ten_1', 'forget', 'gpu.flow', 'c', '{}', 0)",
    "job_events": "(tenant_id, job_id, type) VALUES ('ten_1', 'job_1', 'queued')",
    "audit_events": "(tenant_id, actor, action, subject) VALUES ('ten_1', 'a', 'b', 'c')",
    "idempotency_records": "(tenant_id, route, key, fingerprint, status, headers, body) "
    "VALUES ('ten_1', 'r', 'k', 'f', 202, '{}', '{}')",
    "worker_slots": "(id, queue, slots) VALUES ('w', 'gpu.flow', 1)",
    "classifiers": "(id, tenant_id, name, classes, output, threshold, bytes, sha256, key) "
    "VALUES ('clf_1', 'ten_1', '', '[]', 'logits', 0.5, 1, '', 'k')",
    "process_counters": "(process, kind, samples) VALUES ('p', 'worker', '{}')",
}
# What later steps added to older tables, filled once it is there.
VALUES = {
    ("tenants", "max_running_jobs"): "1",
    ("tenants", "max_open_jobs"): "1",
    ("tenants", "last_served_at"): "now()",
    ("jobs", "deadline_at"): "now()",
    ("jobs", "traceparent"): "'00-1'",
}


def test_tables_and_migrations_agree(database_url: str) -> None:
    command.check(alembic_config(database_url))


@pytest.fixture
def empty(database_url: str) -> Iterator[Connection]:
    """A database without a schema."""
    command.downgrade(alembic_config(database_url), "base")
    engine = create_engine(database_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


def counts(connection: Connection) -> dict[str, int]:
    """The rows of every table that there is now."""
    tables = set(inspect(connection).get_table_names()) - {VERSION}
    return {table: connection.execute(text(f"SELECT count(*) FROM {table}")).scalar_one() for table in sorted(tables)}


def fill(connection: Connection) -> None:
    """A row into each table that has none, and a value into each column that a later step added."""
    found = counts(connection)
    assert set(found) <= set(ROWS), "a new table: give it a row in ROWS"
    for table, row in ROWS.items():
        if found.get(table) == 0:
            connection.execute(text(f"INSERT INTO {table} {row}"))
    for (table, column), value in VALUES.items():
        if table in found and column in {one["name"] for one in inspect(connection).get_columns(table)}:
            connection.execute(text(f"UPDATE {table} SET {column} = {value}"))


def test_each_step_goes_up_down_and_up_with_rows_in_every_table(empty: Connection, database_url: str) -> None:
    config = alembic_config(database_url)

    for before, revision in zip(["base", *REVISIONS], REVISIONS, strict=False):
        older = counts(empty)
        command.upgrade(config, revision)
        fill(empty)
        full = counts(empty)
        command.downgrade(config, before)
        assert counts(empty) == older  # what the step did not bring stays
        command.upgrade(config, revision)
        assert older.items() <= counts(empty).items()
        fill(empty)
        assert counts(empty) == full
        assert all(full.values())

    command.check(config)
    assert set(full) == set(ROWS)
    assert at_head(empty)


def test_down_to_nothing_and_up_again_with_rows_in_every_table(empty: Connection, database_url: str) -> None:
    config = alembic_config(database_url)
    command.upgrade(config, "head")
    fill(empty)
    assert all(counts(empty).values())

    command.downgrade(config, "base")

    assert counts(empty) == {}
    command.upgrade(config, "head")
    command.check(config)
    assert at_head(empty)
    fill(empty)  # nothing of the former schema is in the way


def test_several_hosts_may_migrate_at_once(empty: Connection, database_url: str, tmp_path: Path) -> None:
    env = os.environ | {"FORGETD_DATABASE_URL": database_url, "PYTHONPATH": str(Path(__file__).parents[1])}

    hosts = [
        subprocess.Popen(
            [sys.executable, "-m", "cli.main", "migrate"], env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True
        )
        for _ in range(3)
    ]
    ended = [(host.communicate(timeout=60)[1], host.returncode) for host in hosts]

    assert ended == [("The database is up to date.\n", 0)] * 3
    assert at_head(empty)


# Of a session that has waited for its table so long that it has looked for a deadlock, which each does once, after 1 s.
WAITS = text("""
SELECT 1 FROM pg_locks WHERE pid = :pid AND NOT granted AND waitstart < clock_timestamp() - make_interval(secs => :long)
""")


def test_a_step_that_ends_in_a_deadlock_is_undone_and_says_so(
    empty: Connection, database: Database, database_url: str
) -> None:
    upgrade(database_url, "0002")  # the next locks tenants, then jobs
    migrator = text("SELECT pid FROM pg_locks WHERE relation = 'tenants'::regclass AND NOT granted")

    with (
        ThreadPoolExecutor(2) as threads,
        database.engine.connect() as holder,
        database.engine.connect() as other,
    ):
        holder.execute(text("SELECT 1 FROM tenants"))
        other.execute(text("SELECT 1 FROM jobs"))
        pid = other.execute(text("SELECT pg_backend_pid()")).scalar_one()
        upgrading = threads.submit(upgrade, database_url, "0003", lock_timeout="60s")
        eventually(lambda: empty.execute(migrator).all())
        asking = threads.submit(other.execute, text("SELECT 1 FROM tenants"))
        eventually(lambda: empty.execute(WAITS, {"pid": pid, "long": 2}).all())
        holder.rollback()  # the step goes on to jobs, and nobody else will look for a deadlock

        with pytest.raises(MigrationBlocked, match="waited for this one in its turn"):
            upgrading.result(60)
        assert asking.result(60).all() == []

    assert empty.execute(text("SELECT version_num FROM alembic_version")).scalar_one() == "0002"
    assert "max_open_jobs" not in {column["name"] for column in inspect(empty).get_columns("tenants")}


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_events SET actor = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events"]
)
def test_audit_events_cannot_be_changed(database: Database, api_key: NewKey, statement: str) -> None:
    assert api_key.id  # its creation was audited

    with pytest.raises(DBAPIError, match="append-only"), database.transaction() as session:
        session.execute(text(statement))
