"""What the commands that ask for a job have in common: their options, each defined once, and the way they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.options import connect

if TYPE_CHECKING:
    from cli.client import Client
    from cli.resources import Job

__all__ = [
    "AtMost",
    "CheckpointId",
    "HeldOut",
    "IdempotencyKey",
    "Metadata",
    "OthersWithin",
    "Parameters",
    "Priority",
    "ReleaseAlways",
    "Remember",
    "RememberGenerated",
    "ReplaceWith",
    "ReplacedAtLeast",
    "SampleGrid",
    "Seed",
    "Watch",
    "common",
    "follow",
    "replacement",
    "send",
]

CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id of a ready model: ckpt_...")]
Remember = Annotated[
    str | None, typer.Option(metavar="IMAGES", help="Images that must stay; else the model's own samples stand in.")
]
RememberGenerated = Annotated[
    int | None, typer.Option(min=64, max=20_000, help="How many samples stand in.", show_default="1024")
]
HeldOut = Annotated[str | None, typer.Option(metavar="IMAGES", help="Images the model never saw, to measure on.")]
SampleGrid = Annotated[bool, typer.Option("--sample-grid", help="Show samples in the report; they may show faces.")]
Parameters = Annotated[
    list[str] | None,
    typer.Option(
        "--parameter", "-p", metavar="NAME=VALUE", help="A parameter of the method, e.g. -p max_steps=200. Repeat."
    ),
]
ReleaseAlways = Annotated[
    bool, typer.Option("--release-always", help="Let the weights go even if the criteria are missed.")
]
ReplaceWith = Annotated[
    str | None,
    typer.Option(
        metavar="noise|CLASS|IMAGES",
        help="What a class of a VAE becomes: another class, imgs_...",
        show_default="noise",
    ),
]
AtMost = Annotated[
    float | None, typer.Option(help="P(forgotten class) of samples asked for it, of a VAE.", show_default="0.05")
]
ReplacedAtLeast = Annotated[
    float | None, typer.Option(help="P(replacing class) of the same samples.", show_default="0.9, with a class")
]
OthersWithin = Annotated[
    float | None, typer.Option(help="How far its other classes may fall in accuracy.", show_default="0.02")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of all randomness.", show_default="drawn, reported")]
Priority = Annotated[int, typer.Option(min=-100, max=100, help="Higher first.")]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", "-m", metavar="NAME=VALUE", help="Yours, kept with the job. Repeat."),
]
IdempotencyKey = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Same key, same job, however often it is sent.")
]
Watch = Annotated[bool, typer.Option("--watch", "-w", help="Stay until the job has ended.")]


def common(
    *,
    remember: str | None,
    remember_generated: int | None,
    parameter: list[str] | None,
    release_always: bool,
    metadata: list[str] | None,
    bounds: dict[str, float | None] | None = None,
) -> dict[str, Any]:
    """The client's arguments that say the same in every kind of job; ``bounds`` are criteria of this one."""
    if remember and remember_generated:
        raise typer.BadParameter("Give either --remember or --remember-generated.")
    criteria: dict[str, Any] = {name: value for name, value in (bounds or {}).items() if value is not None}
    if release_always:
        criteria["release_weights"] = "always"
    return {
        "remember": remember or remember_generated,
        "parameters": _pairs(parameter),
        "criteria": criteria or None,
        "metadata": _pairs(metadata),
    }


def send(ask: Callable[[Client], Job], *, url: str | None, key: str | None, as_json: bool, watch: bool) -> None:
    """Send a job, print it, and stay until its end where asked to."""
    from cli.output import emit, emit_json

    with connect(url, key) as client:
        job = ask(client)
        if as_json:
            emit_json(job.wire)
        else:
            emit(job.id)
        if watch:
            follow(client, job.id, as_json=as_json)


def replacement(text: str | None) -> str | int | None:
    """``noise``, a class by its label, or an image set by its id, as the client takes it."""
    if text is None or text == "noise" or text.startswith("imgs_"):
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise typer.BadParameter(f"{text!r} is neither noise, nor a class from 0, nor imgs_...")


def follow(client: Client, job_id: str, *, timeout: float | None = None, as_json: bool) -> None:
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
