"""What the commands that ask for a job have in common: their options, each defined once, and the way they end."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.judges import pairs_of
from cli.options import connect

if TYPE_CHECKING:
    from cli.client import Client
    from cli.resources import Job

__all__ = [
    "Aliases",
    "AtMost",
    "CheckpointId",
    "Deadline",
    "GuidanceScale",
    "HeldOut",
    "IdempotencyKey",
    "Metadata",
    "OthersWithin",
    "Parameters",
    "Priority",
    "ReleaseAlways",
    "Remember",
    "RememberConcepts",
    "RememberGenerated",
    "RememberSets",
    "ReplaceWith",
    "ReplacedAtLeast",
    "SampleGrid",
    "SamplingSteps",
    "Seed",
    "Watch",
    "common",
    "deadline_of",
    "follow",
    "replacement",
    "send",
]

DURATIONS = {"m": "minutes", "h": "hours", "d": "days"}
EXAMPLE = "2026-12-31T18:00:00Z"

CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="Id of a ready model: ckpt_...")]
Remember = Annotated[
    str | None, typer.Option(metavar="IMAGES", help="Images that must stay; else the model's own samples stand in.")
]
RememberGenerated = Annotated[
    int | None, typer.Option(min=64, max=20_000, help="How many samples stand in.", show_default="1024")
]
RememberConcepts = Annotated[
    list[str] | None,
    typer.Option(metavar="WORDS", help="A concept that must stay, whose samples stand in. Repeat."),
]
RememberSets = Annotated[
    list[str] | None,
    typer.Option(metavar="CONCEPT=IMAGES", help="A concept that must stay, with images that show it. Repeat."),
]
Aliases = Annotated[
    list[str] | None, typer.Option("--alias", metavar="WORDS", help="Another name of the concept. Repeat.")
]
GuidanceScale = Annotated[
    float | None, typer.Option(help="How samples of a guided model are drawn.", show_default="the checkpoint's")
]
SamplingSteps = Annotated[
    int | None, typer.Option(help="Steps of a sample of a diffusion model.", show_default="the checkpoint's")
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
        metavar="noise|others|CLASS|IMAGES",
        help="What a class or a concept of a conditional model becomes: what the others show, another class, imgs_...",
        show_default="noise; of a concept others",
    ),
]
AtMost = Annotated[
    float | None,
    typer.Option(help="P(forgotten) of samples asked for it, if conditional.", show_default="0.05"),
]
ReplacedAtLeast = Annotated[
    float | None, typer.Option(help="P(replacement) of the same samples.", show_default="0.9, with one")
]
OthersWithin = Annotated[
    float | None, typer.Option(help="How far what stays may fall in accuracy.", show_default="0.02")
]
Seed = Annotated[int | None, typer.Option(min=0, help="Of all randomness.", show_default="drawn, reported")]
Priority = Annotated[int, typer.Option(min=-100, max=100, help="Higher first, among your own jobs.")]
Deadline = Annotated[
    str | None,
    typer.Option(
        metavar="DURATION|TIME",
        help="By when it must have succeeded, else it fails: 30m, 2h, 3d from now, or 2026-12-31T18:00:00Z.",
    ),
]
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
    remember_concept: list[str] | None = None,
    remember_set: list[str] | None = None,
    sampling: dict[str, float | None] | None = None,
) -> dict[str, Any]:
    """The client's arguments that say the same in every kind of job.

    Of conditional models, ``bounds`` are criteria and ``sampling`` are parameters that have options of their own.
    """
    criteria: dict[str, Any] = {name: value for name, value in (bounds or {}).items() if value is not None}
    if release_always:
        criteria["release_weights"] = "always"
    said = {name: value for name, value in (sampling or {}).items() if value is not None}
    return {
        "remember": _remember(remember, remember_generated, remember_concept, remember_set),
        "parameters": _pairs(parameter) | said,
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


def replacement(text: str | None, concept: str | None = None) -> str | int | dict[str, str] | None:
    """``noise``, ``others``, a class by its label, an image set by its id, or a concept, as the client takes it."""
    if concept is not None:
        if text is not None:
            raise typer.BadParameter("Give either --replace-with or --replace-with-concept.")
        return {"concept": concept}
    if text is None or text in ("noise", "others") or text.startswith("imgs_"):
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise typer.BadParameter(
        f"{text!r} is neither noise, nor others, nor a class from 0, nor imgs_...; a concept goes with "
        "--replace-with-concept."
    )


def deadline_of(text: str | None) -> str | timedelta | None:
    """A deadline as the client takes it: a duration from now, or the time as it was written."""
    if text is None or "T" in text.upper():
        return text
    number, unit = text[:-1], text[-1:].lower()
    if unit not in DURATIONS or not (number.isascii() and number.isdecimal()) or len(number) > 6:
        raise typer.BadParameter(f"{text!r} is neither a duration such as 30m, 2h or 3d, nor a time such as {EXAMPLE}.")
    return timedelta(**{DURATIONS[unit]: int(number)})


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


def _remember(
    images: str | None, generated: int | None, concepts: list[str] | None, sets: list[str] | None
) -> str | int | dict[str, Any] | None:
    """What must stay, as the client takes it."""
    if sum(bool(given) for given in (images, generated or concepts, sets)) > 1:
        raise typer.BadParameter(
            "Give one of --remember, --remember-generated (with --remember-concept) and --remember-set."
        )
    if sets:
        return {"sets": pairs_of(sets, "CONCEPT=IMAGES")}
    if concepts:
        return {"concepts": concepts} | ({"generated": generated} if generated else {})
    return images or generated


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
