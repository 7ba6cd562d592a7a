"""One commit a unit of work; and reads that need no transaction, on connections of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
from psycopg.abc import RV, PQGen
from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from services.counted import Counted, take_notes

__all__ = ["ANSWER_SECONDS", "CONNECT_SECONDS", "Database"]

POOL_SIZE = 10
READERS = 3  # kinds of questions that the gateway asks, each one at a time
CONNECT_SECONDS = 5
STATEMENT_MILLISECONDS = 30_000
ANSWER_SECONDS = STATEMENT_MILLISECONDS / 1000 + 5.0  # what the server ends itself, it has told by then

Found = TypeVar("Found")


class Database:
    """Hands out sessions whose block is one transaction: committed at its end, rolled back by any exception.

    Args:
        url: where PostgreSQL is.
        pool_size: connections that are kept; as many again are opened for a while where needed.
        answer_seconds: after so long without an answer a connection is lost.
        counted: told of every error, and of what a transaction noted (``services.counted``) once it is committed.
    """

    def __init__(
        self,
        url: str,
        *,
        pool_size: int = POOL_SIZE,
        answer_seconds: float = ANSWER_SECONDS,
        counted: Counted | None = None,
    ) -> None:
        self._url, self._counted = url, counted
        self.engine: Engine = _engine(
            url, answer_seconds, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True
        )
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        # Neither a transaction nor a question before the question: ``read`` asks again where a connection was lost.
        self._reads = _engine(
            url,
            answer_seconds,
            pool_size=READERS,
            max_overflow=0,
            pool_reset_on_return=None,
            isolation_level="AUTOCOMMIT",
        )
        if counted is not None:
            for engine in (self.engine, self._reads):
                event.listen(engine, "handle_error", self._count_error)

    def another(self, *, pool_size: int, answer_seconds: float) -> Database:
        """The same database for somebody else, who closes it."""
        return Database(self._url, pool_size=pool_size, answer_seconds=answer_seconds, counted=self._counted)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session in its own transaction."""
        with self._sessions.begin() as session:
            yield session
        if self._counted is not None:
            for name, labels in take_notes(session):
                self._counted.count(name, **labels)

    def read(self, work: Callable[[Connection], Found]) -> Found:
        """What this finds, outside a transaction: each of its statements sees what is committed when it begins.

        A connection that turns out to be lost, as all are after a restart of the server, is replaced once.
        """
        try:
            return self._read(work)
        except DBAPIError as error:
            if not error.connection_invalidated:
                raise
        return self._read(work)

    def _read(self, work: Callable[[Connection], Found]) -> Found:
        with self._reads.connect() as connection:
            return work(connection)

    def close(self) -> None:
        """Return every connection."""
        self.engine.dispose()
        self._reads.dispose()

    def _count_error(self, context: ExceptionContext) -> None:
        if self._counted is not None:
            self._counted.count("database_errors", error=type(context.original_exception).__name__)


class _Connection(psycopg.Connection[Any]):
    """Waits for no answer for ever: the server's own limit says nothing where it is not heard any more.

    A proxy that takes a statement after it lost its server looks to TCP as one that works on it.
    """

    answer_seconds = ANSWER_SECONDS

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        """As its parent, which asks this for every exchange with the server."""
        if timeout is not None:
            return super().wait(gen, interval, timeout)
        deadline = time.monotonic() + self.answer_seconds
        try:
            return super().wait(gen, interval, self.answer_seconds)
        except psycopg.OperationalError as error:
            if time.monotonic() < deadline:
                raise
            self.close()  # a late answer would be taken for that to the next question
            raise psycopg.OperationalError(f"no answer within {self.answer_seconds:g} s") from error


def _engine(url: str, answer_seconds: float, **options: Any) -> Engine:
    engine = create_engine(
        url,
        hide_parameters=True,  # values are what callers sent: an exception's text ends in a log
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            # A peer that vanished without a goodbye must not hold a supervisor's renewal for ever.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "tcp_user_timeout": 15_000,
            "options": f"-c timezone=UTC -c statement_timeout={STATEMENT_MILLISECONDS}",
        },
        **options,
    )

    def connect(_dialect: object, _record: object, arguments: list[Any], parameters: dict[str, Any]) -> _Connection:
        connection = _Connection.connect(*arguments, **parameters)
        connection.answer_seconds = answer_seconds
        return connection

    event.listen(engine, "do_connect", connect)
    return engine
