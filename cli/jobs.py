"""``forgetd jobs``: follow what was asked for, and fetch what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.job_options import follow
from cli.job_requests import app
from cli.options import JobId, Json, Key, Timeout, Url, command, connect

if TYPE_CHECKING:
    from cli.client import Client

__all__ = ["app"]

PIPELINE = "pipeline.tar"  # the tamed model as other programs open it, of families that have such a form


@command(app, "list", example="forgetd jobs list --status failed --json")
def list_(
    status: Annotated[
        str | None, typer.Option(help="Only: queued, running, cancelling, succeeded, failed or cancelled.")
    ] = None,
    checkpoint: Annotated[str | None, typer.Option(metavar="CHECKPOINT", help="Only jobs on this model.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List your jobs, newest first."""
    from itertools import islice

    from cli.output import age, emit_json, progress_note, table

    with connect(url, key) as client:
        found = list(islice(client.jobs(status=status, checkpoint=checkpoint), limit))
    if as_json:
        for job in found:
            emit_json(job.wire)
        return
    table(
        ("id", "status", "where", "age", "kind"),
        [
            (j.id, j.status, j.reason or (progress_note(j) if j.status == "running" else ""), age(j.created_at), j.kind)
            for j in found
        ],
    )


@command(app, example="forgetd jobs show latest")
def show(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show one job: where it is, or how it ended and why."""
    from cli.output import age, emit_json, fields, progress_note

    with connect(url, key) as client:
        found = client.job(_id(client, job))
    if as_json:
        emit_json(found.wire)
        return
    problem = found.problem or {}
    fields(
        {
            "id": found.id,
            "kind": found.kind,
            "status": found.status,
            "phase": found.phase,
            "progress": None if found.finished else progress_note(found),
            "reason": found.reason,
            "problem": " ".join(str(problem[part]) for part in ("title", "detail") if problem.get(part)),
            "checkpoint": found.checkpoint,
            "deadline": found.wire.get("deadline_at"),
            "attempt": str(found.attempt) if found.attempt else None,
            "accepted": f"{age(found.created_at)} ago",
            "took": f"{found.seconds:.1f} s" if found.seconds is not None else None,
        }
    )


@command(app, example="forgetd jobs watch latest")
def watch(job: JobId, timeout: Timeout = None, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Follow a job until it ends; the exit code tells how: 0 succeeded, 5 failed or cancelled, 6 criteria missed.

    Ctrl-C stops watching; the job runs on. With --json each change is a line.
    """
    with connect(url, key) as client:
        follow(client, _id(client, job), timeout=timeout, as_json=as_json)


@command(app, example="forgetd jobs cancel latest")
def cancel(job: JobId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Ask a job to end. Nothing of it is published, and its images are erased."""
    from cli.output import emit_json, say

    with connect(url, key) as client:
        found = client.cancel(_id(client, job))
    if as_json:
        emit_json(found.wire)
    say(f"{found.id} is {found.status}.")


@command(app, example="forgetd jobs download latest --out tamed/")
def download(
    job: JobId,
    out: Annotated[Path, typer.Option("--out", "-o", file_okay=False, help="The folder it goes to.")] = Path(),
    everything: Annotated[
        bool, typer.Option("--all", help="All that the job published: report and pictures too.")
    ] = False,
    url: Url = None,
    key: Key = None,
) -> None:
    """Fetch the tamed model, or all that a job published. Prints the paths.

    Of a Stable Diffusion that is two files: as forgetd keeps it, and pipeline.tar, which diffusers opens unpacked.

    Files come from the object store by a link that lives for minutes; your API key is not sent there. Each is checked
    against the SHA-256 that the service announces, and appears whole or not at all.
    """
    from cli.output import emit, transfer_bar

    with connect(url, key) as client:
        job = _id(client, job)
        if not everything:
            with transfer_bar("tamed model") as progress:
                emit(str(client.download(job, out, progress=progress)))
        for artifact in client.artifacts(job):
            if not everything and artifact.name != PIPELINE:
                continue
            with transfer_bar(artifact.name) as progress:
                emit(str(client.download_artifact(job, artifact, out, progress=progress)))


@command(app, example="forgetd jobs report latest --html --out report.html")
def report(
    job: JobId,
    html: Annotated[bool, typer.Option("--html", help="The page for people, one file, opens offline.")] = False,
    out: Annotated[Path | None, typer.Option("--out", "-o", dir_okay=False, help="Write it there.")] = None,
    url: Url = None,
    key: Key = None,
) -> None:
    """Print a job's report: JSON for machines, or a page for people.

    There is one for a job that missed its criteria, too: it says by how much.
    """
    from cli.output import emit, say

    with connect(url, key) as client:
        job = _id(client, job)
        text = client.report_html(job) if html else json.dumps(client.report(job), indent=2, ensure_ascii=False)
    if out is None:
        emit(text)
        return
    out.write_text(text, encoding="utf-8")
    say(f"Wrote {out}.")


def _id(client: Client, text: str) -> str:
    """The job that an argument names: ``latest`` is the one accepted last."""
    if text != "latest":
        return text
    newest = next(client.jobs(), None)
    if newest is None:
        raise typer.BadParameter("You have no jobs yet.")
    return newest.id
