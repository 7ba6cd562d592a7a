"""``forgetd tenants``: what each tenant may have at once. For operators: these commands talk to the database."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.keys import operator_session
from cli.options import DataDir, command

__all__ = ["app"]

SETTINGS = "none"  # the word for: as the settings have it
MOST = 2**31 - 1

app = typer.Typer(
    help="See tenants, and say how many jobs each may have. For operators: needs the database.", no_args_is_help=True
)


@command(app, "list", example="forgetd tenants list")
def list_(
    data_dir: DataDir = None, as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False
) -> None:
    """List tenants by name: the jobs that have not ended, those at work, and the limits that are the tenant's own.

    A limit of - is that of FORGETD_TENANT_OPEN_JOBS or FORGETD_TENANT_RUNNING_JOBS.
    """
    from cli.output import emit_json, table
    from services import quotas

    with operator_session(data_dir) as session:
        rows = quotas.usage(session)
    if as_json:
        for row in rows:
            emit_json(vars(row))
        return
    table(
        ("id", "tenant", "open", "of", "running", "of"),
        [
            (
                row.id,
                row.name,
                f"{row.open_jobs}",
                _own(row.max_open_jobs),
                f"{row.running_jobs}",
                _own(row.max_running_jobs),
            )
            for row in rows
        ],
    )


@command(app, example="forgetd tenants limit research --open-jobs 200 --running-jobs 2")
def limit(
    tenant: Annotated[str, typer.Argument(metavar="NAME", help="The tenant's name.", show_default=False)],
    open_jobs: Annotated[
        str | None, typer.Option(metavar="N|none", help="Jobs that have not ended, uploads in validation included.")
    ] = None,
    running_jobs: Annotated[str | None, typer.Option(metavar="N|none", help="Jobs at work, on all workers.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Say how many jobs a tenant may have; it holds from the next request and the next start of a job on.

    What is left out stays. With none, what the settings of the service say holds again. Nothing that was accepted or
    runs is ended.
    """
    from cli.output import say
    from services import quotas

    given = {"max_open_jobs": open_jobs, "max_running_jobs": running_jobs}
    limits = {name: _number(text) for name, text in given.items() if text is not None}
    if not limits:
        raise typer.BadParameter("Say which limit: --open-jobs, --running-jobs, or both.")
    with operator_session(data_dir) as session:
        quotas.set_limits(session, tenant, **limits)
    say(f"The limits of {tenant} are set.")


def _number(text: str) -> int | None:
    if text == SETTINGS:
        return None
    if not (text.isascii() and text.isdecimal()) or int(text) > MOST:
        raise typer.BadParameter(f"{text!r} is neither a number from 0 on nor {SETTINGS}.")
    return int(text)


def _own(limit: int | None) -> str:
    return "-" if limit is None else str(limit)
