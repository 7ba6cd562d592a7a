"""The schema: tables and migrations agree, and every step goes both ways."""

from __future__ import annotations

import pytest
from alembic import command
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from services import audit, tenancy
from services.database import Database
from services.migrations import alembic_config, at_head
from services.tenancy import NewKey


def test_tables_and_migrations_agree(database_url: str) -> None:
    command.check(alembic_config(database_url))


def test_down_to_nothing_and_up_again_with_data(database_url: str) -> None:
    config = alembic_config(database_url)
    database = Database(database_url)
    with database.transaction() as session:
        key = tenancy.create_key(session, tenant="a", name="b")
        audit.record(session, key.tenant_id, actor="test", action="x", subject="y")
    database.close()

    command.downgrade(config, "base")
    command.upgrade(config, "head")

    command.check(config)
    with database.engine.connect() as connection:
        assert at_head(connection)
    database.close()


@pytest.mark.parametrize(
    "statement", ["UPDATE audit_events SET actor = 'x'", "DELETE FROM audit_events", "TRUNCATE audit_events"]
)
def test_audit_events_cannot_be_changed(database: Database, api_key: NewKey, statement: str) -> None:
    assert api_key.id  # its creation was audited

    with pytest.raises(DBAPIError, match="append-only"), database.transaction() as session:
        session.execute(text(statement))
