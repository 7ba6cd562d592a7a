"""The schema: tables and migrations agree, and every step goes both ways."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from alembic.config import Config
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from alembic import command
from services import audit, tenancy
from services.database import Database
from services.migrations import ROOT, at_head
from services.tenancy import NewKey


@pytest.fixture
def alembic_config(database_url: str) -> Iterator[Config]:
    config = Config(ROOT / "alembic.ini")
    config.attributes["database_url"] = database_url
    return config


def test_tables_and_migrations_agree(alembic_config: Config) -> None:
    command.check(alembic_config)


def test_down_to_nothing_and_up_again_with_data(alembic_config: Config, database_url: str) -> None:
    database = Database(database_url)
    with database.transaction() as session:
        key = tenancy.create_key(session, tenant="a", name="b")
        audit.record(session, key.tenant_id, actor="test", action="x", subject="y")
    database.close()

    command.downgrade(alembic_config, "base")
    command.upgrade(alembic_config, "head")

    command.check(alembic_config)
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
