"""``forgetd jobs forget`` and ``forgetd jobs debias``: what a model shall forget, in words on a command line."""

from __future__ import annotations

from typing import Annotated

import typer

from cli.job_options import (
    Aliases,
    AtMost,
    CheckpointId,
    Deadline,
    GuidanceScale,
    HeldOut,
    IdempotencyKey,
    Metadata,
    OthersWithin,
    Parameters,
    Priority,
    ReleaseAlways,
    Remember,
    RememberConcepts,
    RememberGenerated,
    RememberSets,
    ReplacedAtLeast,
    ReplaceWith,
    SampleGrid,
    SamplingSteps,
    Seed,
    Watch,
    common,
    deadline_of,
    replacement,
    send,
)
from cli.judges import attribute_of, condition_of, distribution_of, judge_of, pairs_of, replacements_of
from cli.options import Json, Key, Url, command

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
    concept: Annotated[
        str | None, typer.Option(metavar="WORDS", help="What a model of prompts shall forget, such as: zero.")
    ] = None,
    alias: Aliases = None,
    replace_with: ReplaceWith = None,
    replace_with_concept: Annotated[
        str | None, typer.Option(metavar="WORDS", help="What that concept becomes, such as: one.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="JUDGE",
            help="Who tells what samples of a conditional model show: clf_..., or labelled image sets "
            "0=imgs_...,1=imgs_...; else one is trained on its samples.",
        ),
    ] = None,
    shows: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONCEPT=CLASS",
            help="The judge's class that shows a concept. Repeat.",
            show_default="the class of its name",
        ),
    ] = None,
    at_most: AtMost = None,
    replaced_at_least: ReplacedAtLeast = None,
    others_within: OthersWithin = None,
    guidance_scale: GuidanceScale = None,
    sampling_steps: SamplingSteps = None,
    remember: Remember = None,
    remember_generated: RememberGenerated = None,
    remember_concept: RememberConcepts = None,
    remember_set: RememberSets = None,
    same_identity: Annotated[
        str | None, typer.Option(metavar="IMAGES", help="Other images of the same, to measure on.")
    ] = None,
    held_out: HeldOut = None,
    sample_grid: SampleGrid = False,
    parameter: Parameters = None,
    release_always: ReleaseAlways = False,
    seed: Seed = None,
    priority: Priority = 0,
    deadline: Deadline = None,
    metadata: Metadata = None,
    idempotency_key: IdempotencyKey = None,
    watch: Watch = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Make a model forget what the images show, an attribute, a class, or a concept. Prints the job's id.

    An attribute: forgetd jobs forget ckpt_... --attribute 'clf_...:smiling<=0.1'. A class: forgetd jobs forget ckpt_...
    --class-label 3 --where prior. A class of a conditional model, which becomes another: forgetd jobs forget ckpt_...
    --class-label 0 --replace-with 1. A concept: forgetd jobs forget ckpt_... --concept zero --alias nought
    --replace-with-concept one --remember-concept one --remember-concept two.

    The job is queued and survives restarts of the service. The model itself stays as it is: a job that meets its
    criteria publishes a new one beside a report. The images to forget are erased when the job ends, however it ends.
    With --watch the exit code tells the outcome: 0 succeeded, 5 failed or cancelled, 6 criteria missed.
    """
    if images is None and not attribute and class_label is None and concept is None:
        raise typer.BadParameter("Say what to forget: IMAGES, --attribute, --class-label or --concept.")
    if shows and judge is None:
        raise typer.BadParameter("--shows says what classes of the --judge show; name one.")
    until = deadline_of(deadline)
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
        remember_concept=remember_concept,
        remember_set=remember_set,
        sampling={"guidance_scale": guidance_scale, "sampling_steps": sampling_steps},
    )
    replacing = replacement(replace_with, replace_with_concept)
    named = judge_of(judge) | ({"shows": pairs_of(shows, "CONCEPT=CLASS")} if shows else {}) if judge else None
    attributes = [attribute_of(text) for text in attribute] if attribute else None
    send(
        lambda client: client.forget(
            checkpoint,
            images,
            attributes=attributes,
            class_label=class_label,
            where=where,
            concept=concept,
            aliases=alias,
            replace_with=replacing,
            judge=named,
            same_identity=same_identity,
            held_out=held_out,
            sample_grid=sample_grid,
            seed=seed,
            priority=priority,
            deadline=until,
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
    condition_class: Annotated[
        int | None, typer.Option(min=0, help="Of a conditional model: the class whose samples are spread, from 0.")
    ] = None,
    condition_concept: Annotated[
        str | None,
        typer.Option(metavar="WORDS", help="Of a model of prompts: what it is asked for."),
    ] = None,
    alias: Aliases = None,
    replacement: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS=CONDITION",
            help="What the model is asked for to show that class: a class, or words, as the condition is. Repeat.",
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="How far off each fraction may be.", show_default="0.03")
    ] = None,
    confidence: Annotated[
        float | None, typer.Option(help="Of the intervals that must lie inside.", show_default="0.95")
    ] = None,
    others_within: OthersWithin = None,
    guidance_scale: GuidanceScale = None,
    sampling_steps: SamplingSteps = None,
    remember: Remember = None,
    remember_generated: RememberGenerated = None,
    remember_concept: RememberConcepts = None,
    remember_set: RememberSets = None,
    held_out: HeldOut = None,
    sample_grid: SampleGrid = False,
    parameter: Parameters = None,
    release_always: ReleaseAlways = False,
    seed: Seed = None,
    priority: Priority = 0,
    deadline: Deadline = None,
    metadata: Metadata = None,
    idempotency_key: IdempotencyKey = None,
    watch: Watch = False,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Spread a model's samples over the classes of an attribute as stated. Prints the job's id.

    A conditional model is debiased where it is asked for one thing: forgetd jobs debias ckpt_... clf_... --target
    female=.5 --target male=.5 --condition-concept "a doctor" --replacement "female=a female doctor" --replacement
    "male=a male doctor".

    The job succeeds when the confidence interval of every sampled fraction lies within the tolerance of its target. The
    model itself stays as it is. With --watch the exit code tells the outcome: 0 succeeded, 5 failed or cancelled, 6
    criteria missed.
    """
    until = deadline_of(deadline)
    said = common(
        remember=remember,
        remember_generated=remember_generated,
        parameter=parameter,
        release_always=release_always,
        metadata=metadata,
        bounds={"others_within": others_within},
        remember_concept=remember_concept,
        remember_set=remember_set,
        sampling={"guidance_scale": guidance_scale, "sampling_steps": sampling_steps},
    )
    condition = condition_of(condition_class, condition_concept, alias)
    attribute = {"classes": True} if judge == OWN_CLASSES else judge_of(judge)
    distribution = distribution_of(target)
    replacements = replacements_of(replacement, words=condition_concept is not None)
    send(
        lambda client: client.debias(
            checkpoint,
            attribute,
            distribution,
            condition=condition,
            replacements=replacements,
            tolerance=tolerance,
            confidence=confidence,
            held_out=held_out,
            sample_grid=sample_grid,
            seed=seed,
            priority=priority,
            deadline=until,
            idempotency_key=idempotency_key,
            **said,
        ),
        url=url,
        key=key,
        as_json=as_json,
        watch=watch,
    )
