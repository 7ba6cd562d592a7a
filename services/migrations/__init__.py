"""The schema: bring a database to head, and say whether it is there. The steps are beside this file, and installed."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

__all__ = ["alembic_config", "at_head", "upgrade"]

CONFIGURATION = Path(__file__).resolve().with_name("alembic.ini")


def alembic_config(database_url: str | None = None) -> Any:
    """What Alembic's own commands take; without a URL they ask the settings."""
    # Alembic is loaded only by those who migrate: the gateway asks ``at_head`` alone.
    from alembic.config import Config

    config = Config(CONFIGURATION)
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate up to a revision; safe to call from several hosts at once."""
    from alembic import command

    command.upgrade(alembic_config(database_url), revision)


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
