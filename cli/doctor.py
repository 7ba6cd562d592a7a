"""``forgetd doctor``: what is wrong with the service and this host, and what to do."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.exits import ExitCode
from cli.options import DataDir, command

__all__ = ["register"]

STATES = ("ok", "warning", "wrong")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, example="forgetd doctor")(doctor)


def doctor(
    data_dir: DataDir = None, as_json: Annotated[bool, typer.Option("--json", help="One JSON document a line.")] = False
) -> None:
    """Say what is wrong, and what to do. For operators: needs the variables that the service's processes have.

    Looks at the settings, the database and its schema, the broker, the store (with a small object of its own below
    doctor/, which it deletes), the control loop, workers, waiting jobs and what piles up, and at this host: scratch
    folder, GPUs, clock. Uses the FORGETD_... variables set here, or the servers of the `forgetd up` that runs here.

    One line a check: ok, warning or wrong; then what mends each. Exit code 1 when something is wrong. Changes nothing,
    prints no secret, and ends within half a minute, whatever does not answer.
    """
    from cli.output import emit, emit_json, say
    from cli.profile import data_dir as resolve_data_dir
    from cli.profile import service_environment
    from services.diagnosis import diagnose

    findings = diagnose(service_environment(resolve_data_dir(data_dir)))
    if as_json:
        for finding in findings:
            emit_json(vars(finding))
    else:
        width = max(len(finding.check) for finding in findings)
        for finding in findings:
            emit(f"{finding.state:<{len('warning')}}  {finding.check:<{width}}  {finding.says}")
        amiss = [finding for finding in findings if finding.state != "ok"]
        if amiss:
            emit("")
        for finding in amiss:
            emit(f"{finding.check}: {finding.mend}")
    counts = {state: sum(finding.state == state for finding in findings) for state in STATES}
    say(f"{counts['wrong']} wrong, {counts['warning']} to look at, {counts['ok']} ok.")
    raise typer.Exit(ExitCode.FAILURE if counts["wrong"] else ExitCode.OK)
