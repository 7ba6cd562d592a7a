"""The schema: bring a database to head, and say whether it is there."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

__all__ = ["at_head", "upgrade"]

ROOT = Path(__file__).resolve().parent.parent


def _config(database_url: str | None = None) -> Any:
    # Alembic is loaded only by those who migrate: the gateway asks ``at_head`` alone.
    from alembic.config import Config

    config = Config(ROOT / "alembic.ini")
    config.attributes["database_url"] = database_url
    return config


def upgrade(database_url: str, revision: str = "head") -> None:
    """Migrate up to a revision; safe to call from several hosts at once."""
    from alembic import command

    command.upgrade(_config(database_url), revision)


@lru_cache(maxsize=1)
def head() -> str:
    """The newest revision in the source tree."""
    from alembic.script import ScriptDirectory

    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise RuntimeError("there are no migrations in the source tree")
    return str(revision)


def at_head(connection: Connection) -> bool:
    """Whether the database has the schema of this source tree."""
    from alembic.migration import MigrationContext

    return MigrationContext.configure(connection).get_current_revision() == head()
