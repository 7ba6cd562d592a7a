"""What an exception of the database may say."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from services.database import Database


def test_a_failing_statement_does_not_tell_its_values(database: Database) -> None:
    with pytest.raises(DBAPIError) as failure, database.transaction() as session:
        session.execute(text("SELECT :value FROM missing_table"), {"value": "the name of a person"})

    assert "missing_table" in str(failure.value)
    assert "the name of a person" not in f"{failure.value} {failure.value!r}"
