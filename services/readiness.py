"""Whether the servers behind the gateway answer."""

from __future__ import annotations

from sqlalchemy import text

from services.database import Database
from services.errors import Unavailable
from services.migrations import at_head
from services.settings import Settings
from services.storage import ObjectStorage

__all__ = ["broker_answers", "require_database", "require_storage"]

BROKER_SECONDS = 1.0


def require_database(database: Database) -> None:
    """Raise unless PostgreSQL answers and has this version's schema."""
    with database.transaction() as session:
        session.execute(text("SELECT 1"))
        if not at_head(session.connection()):
            raise Unavailable("The database has another version's schema; run: forgetd migrate.")


def require_storage(storage: ObjectStorage) -> None:
    """Raise unless the bucket answers."""
    storage.ping()


def broker_answers(settings: Settings) -> bool:
    """Whether the broker answers. Without it jobs are accepted and wait."""
    import redis  # the gateway has no other business with the broker

    with redis.Redis.from_url(
        settings.broker_url.get_secret_value(),
        socket_connect_timeout=BROKER_SECONDS,
        socket_timeout=BROKER_SECONDS,
    ) as broker:
        try:
            return bool(broker.ping())
        except redis.RedisError:
            return False
