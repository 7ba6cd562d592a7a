"""Runs migrations on the one database of the settings, refusing to wait long for a lock."""

from __future__ import annotations

from alembic import context
from sqlalchemy import create_engine, pool, text

from services.tables import Base

# A statement that waits for its lock makes everybody who comes after it wait too: better to fail and be run again.
LOCK_TIMEOUT = "5s"
# Two hosts that start at once migrate one after the other.
ADVISORY_LOCK = 7_306_580_001


def run() -> None:
    """Online only: an offline script would hide from the advisory lock."""
    url = context.config.attributes.get("database_url")
    if url is None:
        from services.settings import get_settings

        url = get_settings().database_url.get_secret_value()
    patience = context.config.attributes.get("lock_timeout") or LOCK_TIMEOUT
    engine = create_engine(url, poolclass=pool.NullPool, hide_parameters=True)
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": ADVISORY_LOCK})
        connection.execute(text("SELECT set_config('lock_timeout', :patience, false)"), {"patience": patience})
        connection.commit()
        context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True)
        with context.begin_transaction():
            context.run_migrations()
    engine.dispose()


run()
