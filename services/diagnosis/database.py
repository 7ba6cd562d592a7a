"""The database: reachable, of this version's schema, with room for connections, and its clock."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sqlalchemy import Connection, text
from sqlalchemy.exc import SQLAlchemyError

from services import migrations
from services.diagnosis.findings import Finding, first_line, ok, warning, wrong

__all__ = ["connected", "questions", "unreachable"]

CHECK = "database"
OLDEST = 150_000  # server_version_num
CLOCK_SECONDS = 30.0
FULL = 0.8  # of max_connections
REFUSED = ("authentication failed", "no password supplied", "role ", "no pg_hba.conf entry")
ABSENT = 'database "'
CROWDED = ("too many clients", "remaining connection slots", "too many connections")


def unreachable(error: SQLAlchemyError) -> Finding:
    """Why there is no connection."""
    told = first_line(getattr(error, "orig", None) or error)
    if any(word in told for word in CROWDED):
        mend = "Raise max_connections there, or run fewer processes: a gateway holds up to 23, other processes fewer."
        return wrong(CHECK, f"it has no connection left: {told}", mend)
    if any(word in told for word in REFUSED):
        return wrong(CHECK, f"it refuses the credentials: {told}", "Correct user and password in FORGETD_DATABASE_URL.")
    if ABSENT in told and "does not exist" in told:
        return wrong(CHECK, told, "Make it (createdb), or correct the name at the end of FORGETD_DATABASE_URL.")
    mend = "Start PostgreSQL, or correct host and port in FORGETD_DATABASE_URL. Nothing works without it."
    return wrong(CHECK, f"it does not answer: {told}", mend)


def questions(connection: Connection) -> Iterator[Finding]:
    """Of a server that lets us in."""
    yield _version(connection)
    yield _clock(connection)
    yield _connections(connection)
    yield _autovacuum(connection)
    yield _schema(connection)


def connected(connection: Connection) -> bool:
    """Whether the tables are those of this version: only then can more be asked."""
    return migrations.at_head(connection)


def _version(connection: Connection) -> Finding:
    began = time.monotonic()
    number = int(connection.execute(text("SHOW server_version_num")).scalar_one())
    took = 1e3 * (time.monotonic() - began)
    name = f"PostgreSQL {number // 10_000}.{number % 10_000}"
    if number < OLDEST:
        return warning(CHECK, f"{name} is older than forgetd is made for", "Upgrade it to 15 or newer.")
    return ok(CHECK, f"{name} answers in {took:.0f} ms")


def _clock(connection: Connection) -> Finding:
    check = f"{CHECK} clock"
    before = time.time()
    there = float(connection.execute(text("SELECT extract(epoch FROM clock_timestamp())")).scalar_one())
    apart = max(before - there, there - time.time(), 0.0)
    if apart > CLOCK_SECONDS:
        says = f"this host's clock and the database's are {apart:.0f} s apart: leases do not mind, the store may"
        return warning(check, says, "Let both hosts set their clocks (chrony, systemd-timesyncd).")
    return ok(check, "agrees with this host's")


def _connections(connection: Connection) -> Finding:
    check = f"{CHECK} connections"
    most = int(connection.execute(text("SHOW max_connections")).scalar_one())
    used = connection.execute(text("SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"))
    count = int(used.scalar_one())
    if count > FULL * most:
        mend = "Raise max_connections there, or run fewer processes: a gateway holds up to 23, other processes fewer."
        return warning(check, f"{count} of {most} are in use", mend)
    return ok(check, f"{count} of {most} in use")


def _autovacuum(connection: Connection) -> Finding:
    check = f"{CHECK} autovacuum"
    if connection.execute(text("SHOW autovacuum")).scalar_one() != "on":
        mend = "Set autovacuum = on there: without it every look at the queue gets slower."
        return warning(check, "it is off", mend)
    return ok(check, "on")


def _schema(connection: Connection) -> Finding:
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    check = f"{CHECK} schema"
    known = [
        step.revision for step in ScriptDirectory.from_config(migrations.alembic_config()).walk_revisions()
    ]  # from the newest on
    now = MigrationContext.configure(connection).get_current_revision()
    if now is None:
        return wrong(check, "there is none", "Run: forgetd migrate")
    if now not in known:
        says = f"{now} is of a newer forgetd than this one, which knows up to {known[0]}"
        return wrong(check, says, "Install the version that is at work here, and run that one's doctor.")
    if now != known[0]:
        return wrong(check, f"{now} is behind {known[0]}, which this version needs", "Run: forgetd migrate")
    return ok(check, f"{now}, as this version needs")
