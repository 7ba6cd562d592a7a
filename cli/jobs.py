"""``forgetd jobs``: ask for forgetting, follow it, fetch what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import JobId, Json, Key, Timeout, Url, command, connect

if TYPE_CHECKING:
    from cli.client import Client
    from cli.resources import Job

__all__ = ["app"]

FORGET_EXAMPLE = (
    'forgetd jobs forget "$(forgetd checkpoints push glow.safetensors)" "$(forgetd images push anna/)" --watch'
)

app = typer.Typer(help="Make a model forget, follow the job, and fetch what came of it.", no_args_is_help=True)

Names = Annotated[
    list[str] | None,
    typer.Option("--parameter", "-p", metavar="NAME=VALUE", help="A parameter of the method, e.g. -p delta=3. Repeat."),
]


@command(app, example=FORGET_EXAMPLE)
def forget(
    checkpoint: Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id of a ready model: ckpt_...")],
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="Id of the images to forget: imgs_...")],
    remember: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Images that must stay; else the model's own samples stand in.")
    ] = None,
    remember_generated: Annotated[
        int | None, typer.Option(min=64, max=20_000, help="How many samples stand in.", show_default="1024")
    ] = None,
    same_identity: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Other images of the same, to measure on.")
    ] = None,
    held_out: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Images the model never saw, to measure on.")
    ] = None,
    sample_grid: Annotated[
        bool, typer.Option("--sample-grid", help="Show samples in the report; they may show faces.")
    ] = False,
    parameter: Names = None,
    release_always: Annotated[
        bool, typer.Option("--release-always", help="Let the weights go even if the criteria are missed.")
    ] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of all randomness.", show_default="drawn, reported")] = None,
    priority: Annotated[int, typer.Option(min=-100, max=100, help="Higher first.")] = 0,
    metadata: Annotated[
        list[str] | None,
        typer.Option("--metadata", "-m", metavar="NAME=VALUE", help="Yours, kept with the job. Repeat."),
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Same key, same job, however often it is sent.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Stay until the job has ended.")] = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a model forget what the images show. Prints the job's id.

    The job is queued and survives restarts of the service. The model itself stays as it is: a job that meets its
    criteria publishes a new one beside a report. The images to forget are erased when the job ends, however it ends.
    With --watch the exit code tells the outcome: 0 succeeded, 5 failed or cancelled, 6 criteria missed.
    """
    from cli.output import emit, emit_json

    if remember and remember_generated:
        raise typer.BadParameter("Give either --remember or --remember-generated.")
    with connect(url, key) as client:
        job = client.forget(
            checkpoint,
            images,
            remember=remember or remember_generated,
            parameters=_pairs(parameter),
            criteria={"release_weights": "always"} if release_always else None,
            same_identity=same_identity,
            held_out=held_out,
            sample_grid=sample_grid,
            seed=seed,
            priority=priority,
            metadata=_pairs(metadata),
            idempotency_key=idempotency_key,
        )
        if as_json:
            emit_json(job.wire)
        else:
            emit(job.id)
        if watch:
            _follow(client, job.id, as_json=as_json)


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
        ("id", "status", "where", "age"),
        [
            (j.id, j.status, j.reason or (progress_note(j) if j.status == "running" else ""), age(j.created_at))
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
            "status": found.status,
            "phase": found.phase,
            "progress": None if found.finished else progress_note(found),
            "reason": found.reason,
            "problem": " ".join(str(problem[part]) for part in ("title", "detail") if problem.get(part)),
            "checkpoint": found.checkpoint,
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
        _follow(client, _id(client, job), timeout=timeout, as_json=as_json)


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

    Files come from the object store by a link that lives for minutes; your API key is not sent there. Each is checked
    against the SHA-256 that the service announces, and appears whole or not at all.
    """
    from cli.output import emit, transfer_bar

    with connect(url, key) as client:
        job = _id(client, job)
        if not everything:
            with transfer_bar("tamed model") as progress:
                emit(str(client.download(job, out, progress=progress)))
            return
        for artifact in client.artifacts(job):
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


def _follow(client: Client, job_id: str, *, timeout: float | None = None, as_json: bool) -> None:
    """Show a job's changes until it ends; raises what its failure is."""
    from cli.output import emit_json, say, watch_bar

    with watch_bar() as show:

        def changed(job: Job) -> None:
            show(job)
            if as_json:
                emit_json(job.wire)

        job = client.wait(job_id, changed, timeout=timeout)
    took = f" in {job.seconds:.1f} s" if job.seconds is not None else ""
    say(f"{job.id} succeeded{took}. Fetch the model with: forgetd jobs download {job.id}")


def _id(client: Client, text: str) -> str:
    """The job that an argument names: ``latest`` is the one accepted last."""
    if text != "latest":
        return text
    newest = next(client.jobs(), None)
    if newest is None:
        raise typer.BadParameter("You have no jobs yet.")
    return newest.id


def _pairs(texts: list[str] | None) -> dict[str, Any]:
    """NAME=VALUE texts as members; a value that is JSON is read as such, any other is a string."""
    members: dict[str, Any] = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise typer.BadParameter(f"{text!r} is not NAME=VALUE.")
        try:
            members[name] = json.loads(value)
        except ValueError:
            members[name] = value
    return members
