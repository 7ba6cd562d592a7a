"""What a connection to the database does when the other side is gone without a word."""

from __future__ import annotations

import socket

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from services.database import Database


def backend(database: Database) -> int | None:
    """The server's process behind the one connection that is kept."""
    with database.transaction() as session:
        return session.scalar(text("SELECT pg_backend_pid()"))


def ask(database: Database, *statements: str) -> None:
    with database.transaction() as session:
        for statement in statements:
            session.execute(text(statement))


def test_an_answer_that_does_not_come_costs_the_connection(database_url: str) -> None:
    database = Database(database_url, pool_size=1, answer_seconds=0.5)
    before = backend(database)

    with pytest.raises(OperationalError, match="no answer within"):
        ask(database, "SELECT pg_sleep(5)")

    assert backend(database) != before
    database.close()


def test_another_has_connections_and_a_patience_of_its_own(database: Database) -> None:
    other = database.another(pool_size=1, answer_seconds=0.5)
    assert backend(other) != backend(database)

    with pytest.raises(OperationalError, match=r"no answer within 0\.5 s"):
        ask(other, "SELECT pg_sleep(5)")

    other.close()


def test_a_refusal_costs_no_connection(database_url: str) -> None:
    database = Database(database_url, pool_size=1)
    before = backend(database)

    with pytest.raises(OperationalError, match="statement timeout"):
        ask(database, "SET LOCAL statement_timeout = 50", "SELECT pg_sleep(5)")

    assert backend(database) == before
    database.close()


def test_a_peer_that_vanished_is_asked_for_every_few_seconds(database: Database) -> None:
    with database.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        with socket.fromfd(driver.fileno(), socket.AF_INET, socket.SOCK_STREAM) as line:
            idle, interval = (
                line.getsockopt(socket.IPPROTO_TCP, option) for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL)
            )

    assert (idle, interval) == (10, 5)
