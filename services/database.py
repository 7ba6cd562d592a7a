"""One engine a process, one commit a unit of work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine, create_engine
from sqlalchemy.orm import Session, sessionmaker

__all__ = ["Database"]

POOL_SIZE = 10
CONNECT_SECONDS = 5
STATEMENT_MILLISECONDS = 30_000


class Database:
    """Hands out sessions whose block is one transaction: committed at its end, rolled back by any exception."""

    def __init__(self, url: str, *, pool_size: int = POOL_SIZE) -> None:
        self.engine: Engine = create_engine(
            url,
            pool_size=pool_size,
            max_overflow=pool_size,
            pool_pre_ping=True,
            hide_parameters=True,  # values are what callers sent: an exception's text ends in a log
            connect_args={
                "connect_timeout": CONNECT_SECONDS,
                # A peer that vanished without a goodbye must not hold a supervisor's renewal for ever.
                "keepalives_idle": 10,
                "tcp_user_timeout": 15_000,
                "options": f"-c timezone=UTC -c statement_timeout={STATEMENT_MILLISECONDS}",
            },
        )
        self._sessions = sessionmaker(self.engine, expire_on_commit=False)

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session in its own transaction."""
        with self._sessions.begin() as session:
            yield session

    def close(self) -> None:
        """Return every connection."""
        self.engine.dispose()
