"""The schema: bring a database to head, and say whether it is there. The steps are beside this file, and installed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

__all__ = ["MigrationBlocked", "alembic_config", "at_head", "upgrade"]

CONFIGURATION = Path(__file__).resolve().with_name("alembic.ini")

BLOCKED = {  # by SQLSTATE
    "55P03": "A table stayed locked by another session. End what holds the lock (a long transaction: see "
    "pg_stat_activity) and run this again.",
    "40P01": "A table was locked by another session, which waited for this one in its turn. Run this again.",
}


class MigrationBlocked(Exception):
    """A step did not get a lock that somebody holds; the schema is as the last complete step left it."""


def alembic_config(database_url: str | None = None) -> Any:
    """What Alembic's own commands take; without a URL they ask the settings."""
    # Alembic is loaded only by those who migrate: the gateway asks ``at_head`` alone.
    from alembic.config import Config

    config = Config(CONFIGURATION)
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, revision: str = "head", *, lock_timeout: str | None = None) -> None:
    """Migrate up to a revision; safe to call from several hosts at once.

    Args:
        database_url: Which database.
        revision: Up to where.
        lock_timeout: How long each statement waits for its lock, as PostgreSQL writes it; None: 5s.

    Raises:
        MigrationBlocked: A lock was not to be had within that time, or at all, since its holder waited for one of
            ours. The step is undone; run it again.
    """
    from alembic import command

    config = alembic_config(database_url)
    config.attributes["lock_timeout"] = lock_timeout
    try:
        command.upgrade(config, revision)
    except OperationalError as error:
        why = BLOCKED.get(str(getattr(error.orig, "sqlstate", None)))
        if why is None:
            raise
        raise MigrationBlocked(
            f"{why} The step which needs it was undone; the schema is as the step before left it."
        ) from error


@lru_cache(maxsize=1)
def head() -> str:
    """The newest revision."""
    from alembic.script import ScriptDirectory

    revision = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if revision is None:
        raise RuntimeError("there are no migrations beside services.migrations")
    return str(revision)


def at_head(connection: Connection) -> bool:
    """Whether the database has the schema of this version."""
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision() == head()
