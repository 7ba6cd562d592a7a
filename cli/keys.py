"""``forgetd keys``: who may call. For operators: these commands talk to the database, not to the service."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import DataDir, command

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.orm import Session

__all__ = ["app", "database_url", "operator_session"]

NO_DATABASE = """No database is known here. Set FORGETD_DATABASE_URL to the service's database
(postgresql+psycopg://user:password@host:port/database), or run `forgetd up` in this folder first."""

app = typer.Typer(help="Make and revoke API keys. For operators: needs the database.", no_args_is_help=True)


@command(app, example="forgetd keys create --tenant research --name laptop")
def create(
    tenant: Annotated[str, typer.Option(help="Whose key: tenants see nothing of each other. Made if new.")],
    name: Annotated[str, typer.Option(help="What the key is for, so that you know which one to revoke.")] = "default",
    data_dir: DataDir = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print id, tenant and secret as JSON.")] = False,
) -> None:
    """Make an API key and print its secret, once.

    Only a hash of the secret is stored, in the database of FORGETD_DATABASE_URL or of the `forgetd up` that runs here.
    """
    from cli.output import emit, emit_json, say
    from services import tenancy

    with operator_session(data_dir) as session:
        made = tenancy.create_key(session, tenant=tenant, name=name)
    if as_json:
        emit_json({"id": made.id, "tenant": made.tenant, "name": made.name, "secret": made.secret})
        return
    say(f"{made.id} for tenant {made.tenant}. The secret is shown this once:")
    emit(made.secret)


@command(app, "list", example="forgetd keys list")
def list_(
    data_dir: DataDir = None, as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False
) -> None:
    """List keys, oldest first; never their secrets."""
    from cli.output import age, emit_json, table
    from services import tenancy

    with operator_session(data_dir) as session:
        rows = [
            (key.id, tenant.name, key.name, key.created_at, key.revoked_at)
            for key, tenant in tenancy.list_keys(session)
        ]
    if as_json:
        for row in rows:
            emit_json(dict(zip(("id", "tenant", "name", "created_at", "revoked_at"), row, strict=True)))
        return
    table(
        ("id", "tenant", "name", "age", "state"),
        [(*row[:3], age(row[3]), "revoked" if row[4] else "live") for row in rows],
    )


@command(app, example="forgetd keys revoke key_0192f3c1a2b47d0e8f1a2b3c4d5e6f70")
def revoke(
    key: Annotated[str, typer.Argument(metavar="KEY_ID", help="The key's id: key_...")], data_dir: DataDir = None
) -> None:
    """End a key at once: the next call with it is refused. Its tenant's jobs and models stay."""
    from cli.output import say
    from services import tenancy

    with operator_session(data_dir) as session:
        tenancy.revoke_key(session, key)
    say(f"{key} is revoked.")


def database_url(data_dir: Path | None) -> str:
    """The database that operators' commands work on.

    Raises:
        ClientError: None is known.
    """
    from cli.errors import ClientError
    from cli.profile import data_dir as resolve_data_dir
    from cli.profile import live_profile

    if given := os.environ.get("FORGETD_DATABASE_URL"):
        return given
    profile = live_profile(resolve_data_dir(data_dir))
    if profile is None:
        raise ClientError(NO_DATABASE)
    return profile.database_url


@contextmanager
def operator_session(data_dir: Path | None) -> Iterator[Session]:
    """One transaction on that database; what it refuses becomes the client's errors."""
    from sqlalchemy.exc import OperationalError, ProgrammingError

    from cli.errors import ClientError, Unreachable, problem_error
    from services.database import Database
    from services.errors import ForgetdError

    database = Database(database_url(data_dir))
    try:
        with database.transaction() as session:
            yield session
    except ForgetdError as error:
        raise problem_error(error.status, error.problem()) from error
    except OperationalError as error:
        raise Unreachable(f"The database does not answer: {str(error.orig).splitlines()[0]}.") from error
    except ProgrammingError as error:
        raise ClientError("The database has no schema of forgetd yet. Run: forgetd migrate") from error
    finally:
        database.close()
