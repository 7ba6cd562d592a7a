"""One commit a unit of work; and reads that need no transaction, on connections of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from services.counted import Counted, take_notes

__all__ = ["Database"]

POOL_SIZE = 10
READERS = 3  # kinds of questions that the gateway asks, each one at a time
CONNECT_SECONDS = 5
STATEMENT_MILLISECONDS = 30_000

Found = TypeVar("Found")


class Database:
    """Hands out sessions whose block is one transaction: committed at its end, rolled back by any exception.

    Args:
        url: where PostgreSQL is.
        pool_size: connections that are kept; as many again are opened for a while where needed.
        counted: told of every error, and of what a transaction noted (``services.counted``) once it is committed.
    """

    def __init__(self, url: str, *, pool_size: int = POOL_SIZE, counted: Counted | None = None) -> None:
        self._counted = counted
        self.engine: Engine = _engine(url, pool_size=pool_size, max_overflow=pool_size, pool_pre_ping=True)
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)
        # Neither a transaction nor a question before the question: ``read`` asks again where a connection was lost.
        self._reads = _engine(
            url, pool_size=READERS, max_overflow=0, pool_reset_on_return=None, isolation_level="AUTOCOMMIT"
        )
        if counted is not None:
            for engine in (self.engine, self._reads):
                event.listen(engine, "handle_error", self._count_error)

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


def _engine(url: str, **options: Any) -> Engine:
    return create_engine(
        url,
        hide_parameters=True,  # values are what callers sent: an exception's text ends in a log
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            # A peer that vanished without a goodbye must not hold a supervisor's renewal for ever.
            "keepalives_idle": 10,
            "tcp_user_timeout": 15_000,
            "options": f"-c timezone=UTC -c statement_timeout={STATEMENT_MILLISECONDS}",
        },
        **options,
    )
