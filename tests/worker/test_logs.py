"""What a log line says of an exception: its place and its kind, and nothing that a caller sent."""

from __future__ import annotations

import logging

import pytest
from sqlalchemy import insert, text
from sqlalchemy.exc import DBAPIError

from services.database import Database
from services.logs import LineFormatter
from services.tables import Tenant

CANARY = "Jane Example"


def logged(error: BaseException) -> str:
    """The log's lines of an exception."""
    record = logging.LogRecord(
        "test", logging.ERROR, __file__, 1, "it failed", None, (type(error), error, error.__traceback__)
    )
    return LineFormatter().format(record)


def test_a_unique_violation_is_logged_without_its_values(database: Database) -> None:
    with pytest.raises(DBAPIError) as failure, database.transaction() as session:
        session.execute(insert(Tenant), [{"id": f"ten_{number}", "name": CANARY} for number in range(2)])
    assert CANARY in str(failure.value)

    line = logged(failure.value)

    assert "psycopg.errors.UniqueViolation 23505: duplicate key" in line
    assert "uq_tenants_name" in line
    assert "test_logs.py" in line
    assert CANARY not in line


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT CAST(:value AS integer)",  # quoted in the first line of the database's words
        "INSERT INTO checkpoints (id, tenant_id, name, status, declared, source_bytes, source_sha256) "
        "VALUES ('c', 't', :value, 'odd', '{}', 1, '')",  # the row that a CHECK refused
    ],
)
def test_no_refusal_of_the_database_brings_a_value_into_the_log(database: Database, statement: str) -> None:
    with pytest.raises(DBAPIError) as failure, database.transaction() as session:
        session.execute(text(statement), {"value": CANARY})
    assert CANARY in str(failure.value)

    assert CANARY not in logged(failure.value)


def test_what_an_exception_followed_is_logged_before_it() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError as error:
            raise RuntimeError("second") from error
    except RuntimeError as error:
        line = logged(error)

    assert "KeyError: 'first'\nwhich led to:\n" in line
    assert line.endswith("RuntimeError: second")
