"""``forgetd jobs``: ask for forgetting or debiasing, follow it, fetch what came of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.job_options import (
    AtMost,
    CheckpointId,
    HeldOut,
    IdempotencyKey,
    Metadata,
    OthersWithin,
    Parameters,
    Priority,
    ReleaseAlways,
    Remember,
    RememberGenerated,
    ReplacedAtLeast,
    ReplaceWith,
    SampleGrid,
    Seed,
    Watch,
    common,
    follow,
    replacement,
    send,
)
from cli.judges import attribute_of, distribution_of, judge_of
from cli.options import JobId, Json, Key, Timeout, Url, command, connect

if TYPE_CHECKING:
    from cli.client import Client

__all__ = ["app"]

OWN_CLASSES = "own-classes"
FORGET_EXAMPLE = (
    'forgetd jobs forget "$(forgetd checkpoints push glow.safetensors)" "$(forgetd images push anna/)" --watch'
)
DEBIAS_EXAMPLE = (
    "forgetd jobs debias ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70 clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f71 "
    "--target smiling=0.5 --target other=0.5 --watch"
)

app = typer.Typer(help="Make a model forget, follow the job, and fetch what came of it.", no_args_is_help=True)


@command(app, example=FORGET_EXAMPLE)
def forget(
    checkpoint: CheckpointId,
    images: Annotated[
        str | None, typer.Argument(metavar="IMAGES", help="Id of the images to forget: imgs_...", show_default=False)
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option(
            metavar="JUDGE:CLASS<=FRACTION",
            help="How often samples may show a class: clf_...:smiling<=0.1, or with labelled image sets for the judge "
            "smiling=imgs_...,other=imgs_...:smiling<=0.1; >= for at least. Repeat.",
        ),
    ] = None,
    class_label: Annotated[
        int | None,
        typer.Option(min=0, help="A class of the model, from 0; with IMAGES of that class, if you have some."),
    ] = None,
    where: Annotated[
        str | None, typer.Option(help="That class: in the weights, or at the prior.", show_default="weights")
    ] = None,
    replace_with: ReplaceWith = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Who tells the classes of a VAE's samples: clf_..., or labelled image sets 0=imgs_...,1=imgs_...; "
            "else one is trained on its samples.",
        ),
    ] = None,
    at_most: AtMost = None,
    replaced_at_least: ReplacedAtLeast = None,
    others_within: OthersWithin = None,
    remember: Remember = None,
    remember_generated: RememberGenerated = None,
    same_identity: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Other images of the same, to measure on.")
    ] = None,
    held_out: HeldOut = None,
    sample_grid: SampleGrid = False,
    parameter: Parameters = None,
    release_always: ReleaseAlways = False,
    seed: Seed = None,
    priority: Priority = 0,
    metadata: Metadata = None,
    idempotency_key: IdempotencyKey = None,
    watch: Watch = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a model forget what the images show, an attribute, or a class. Prints the job's id.

    An attribute: forgetd jobs forget ckpt_... --attribute 'clf_...:smiling<=0.1'. A class: forgetd jobs forget ckpt_...
    --class-label 3 --where prior. A class of a VAE, which becomes another: forgetd jobs forget ckpt_... --class-label 0
    --replace-with 1.

    The job is queued and survives restarts of the service. The model itself stays as it is: a job that meets its
    criteria publishes a new one beside a report. The images to forget are erased when the job ends, however it ends.
    With --watch the exit code tells the outcome: 0 succeeded, 5 failed or cancelled, 6 criteria missed.
    """
    if images is None and not attribute and class_label is None:
        raise typer.BadParameter("Say what to forget: IMAGES, --attribute or --class-label.")
    said = common(
        remember=remember,
        remember_generated=remember_generated,
        parameter=parameter,
        release_always=release_always,
        metadata=metadata,
        bounds={
            "forgotten_at_most": at_most,
            "replaced_at_least": replaced_at_least,
            "others_within": others_within,
        },
    )
    replacing = replacement(replace_with)
    attributes = [attribute_of(text) for text in attribute] if attribute else None
    send(
        lambda client: client.forget(
            checkpoint,
            images,
            attributes=attributes,
            class_label=class_label,
            where=where,
            replace_with=replacing,
            judge=judge_of(judge) if judge else None,
            same_identity=same_identity,
            held_out=held_out,
            sample_grid=sample_grid,
            seed=seed,
            priority=priority,
            idempotency_key=idempotency_key,
            **said,
        ),
        url=url,
        key=key,
        as_json=as_json,
        watch=watch,
    )


@command(app, example=DEBIAS_EXAMPLE)
def debias(
    checkpoint: CheckpointId,
    judge: Annotated[
        str,
        typer.Argument(
            metavar="JUDGE",
            help="Who says what a sample shows: clf_..., labelled image sets NAME=imgs_...,NAME=imgs_..., or "
            "own-classes for the classes of a class-prior flow itself.",
        ),
    ],
    target: Annotated[
        list[str],
        typer.Option(metavar="CLASS=FRACTION", help="The fraction of a class; one for every class, they sum to 1."),
    ],
    tolerance: Annotated[
        float | None, typer.Option(help="How far off each fraction may be.", show_default="0.03")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the intervals that must lie inside.", show_default="0.95")
    ] = None,
    remember: Remember = None,
    remember_generated: RememberGenerated = None,
    held_out: HeldOut = None,
    sample_grid: SampleGrid = False,
    parameter: Parameters = None,
    release_always: ReleaseAlways = False,
    seed: Seed = None,
    priority: Priority = 0,
    metadata: Metadata = None,
    idempotency_key: IdempotencyKey = None,
    watch: Watch = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Spread a model's samples over the classes of an attribute as stated. Prints the job's id.

    The job succeeds when the confidence interval of every sampled fraction lies within the tolerance of its target. The
    model itself stays as it is. With --watch the exit code tells the outcome: 0 succeeded, 5 failed or cancelled, 6
    criteria missed.
    """
    said = common(
        remember=remember,
        remember_generated=remember_generated,
        parameter=parameter,
        release_always=release_always,
        metadata=metadata,
    )
    attribute = {"classes": True} if judge == OWN_CLASSES else judge_of(judge)
    distribution = distribution_of(target)
    send(
        lambda client: client.debias(
            checkpoint,
            attribute,
            distribution,
            tolerance=tolerance,
            confidence=confidence,
            held_out=held_out,
            sample_grid=sample_grid,
            seed=seed,
            priority=priority,
            idempotency_key=idempotency_key,
            **said,
        ),
        url=url,
        key=key,
        as_json=as_json,
        watch=watch,
    )


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


def _id(client: Client, text: str) -> str:
    """The job that an argument names: ``latest`` is the one accepted last."""
    if text != "latest":
        return text
    newest = next(client.jobs(), None)
    if newest is None:
        raise typer.BadParameter("You have no jobs yet.")
    return newest.id
