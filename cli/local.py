"""``forgetd up``, ``demo`` and ``migrate``: the commands that run things on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import DataDir, command

__all__ = ["register"]

Port = Annotated[
    int,
    typer.Option("--port", min=0, max=65535, help="The gateway's port; the next free one if taken, any if 0."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, example="forgetd up --port 8080")(up)
    command(app, example="forgetd demo --person 7")(demo)
    command(app, example="FORGETD_DATABASE_URL=postgresql+psycopg://forgetd:secret@db:5432/forgetd forgetd migrate")(
        migrate
    )


def up(data_dir: DataDir = None, port: Port = 8080) -> None:
    """Run the whole service on this machine until Ctrl-C.

    Starts PostgreSQL, Valkey and SeaweedFS (each only if FORGETD_DATABASE_URL, FORGETD_BROKER_URL or
    FORGETD_S3_ENDPOINT_URL does not name yours), migrates the database, makes a first API key, and starts the gateway,
    the control loop and two workers. Everything listens on this machine only, and nothing leaves it.

    Commands in the same folder find the service and its key by themselves, in DIR/profile.json (mode 0600). Ctrl-C ends
    it: running jobs save their state and go on at the next start. Logs are in DIR/logs.
    """
    from cli.up import run

    raise typer.Exit(run(data_dir, port))


def demo(
    person: Annotated[int, typer.Option(min=1, max=36, help="Whom to forget: one of the 36 people in training.")] = 7,
    seed: Annotated[int, typer.Option(min=0, help="Of the job's randomness.")] = 0,
    out: Annotated[Path, typer.Option(help="Where report, picture and weights go.")] = Path("forgetd-demo"),
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Leave the service running at the end, until Ctrl-C.")
    ] = False,
    data_dir: DataDir = None,
    port: Port = 8080,
) -> None:
    """Forget a real person, end to end, in about six minutes (the first time; then in about one).

    Uses the service that runs here, or starts one. Trains a small Glow on the ORL faces (once, kept in FORGETD_CACHE or
    ~/.cache/forgetd), uploads it and five photos of one person over HTTP, has that person forgotten, downloads the
    tamed model and the report, and prints the table of the flow taming paper for it. Nothing leaves this machine.
    """
    from cli.demo import run

    raise typer.Exit(run(person=person, seed=seed, out=out, keep_running=keep_running, data_dir=data_dir, port=port))


def migrate(data_dir: DataDir = None) -> None:
    """Bring the database's schema to this version. For operators; `forgetd up` does it by itself.

    Works on FORGETD_DATABASE_URL, or on the database of the `forgetd up` that runs here. Safe to run from several hosts
    at once, and when there is nothing to do. No step waits for a lock for more than 5 seconds: it is undone, and said.
    """
    from cli.errors import ClientError
    from cli.keys import database_url
    from cli.output import say
    from services.migrations import MigrationBlocked, upgrade

    try:
        upgrade(database_url(data_dir))
    except MigrationBlocked as error:
        raise ClientError(str(error)) from error
    say("The database is up to date.")
