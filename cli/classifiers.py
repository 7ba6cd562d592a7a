"""``forgetd classifiers``: the judges that say what a model's samples show."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json, Key, Url, command, connect

__all__ = ["app"]

app = typer.Typer(help="Upload classifiers that judge samples, and erase them.", no_args_is_help=True)

ClassifierId = Annotated[str, typer.Argument(metavar="CLASSIFIER", help="The classifier's id: clf_...")]
SHOW_EXAMPLE = "forgetd classifiers show clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"
DELETE_EXAMPLE = "forgetd classifiers delete clf_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"


@command(app, example="forgetd classifiers upload smiles.onnx --classes other,smiling")
def upload(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="The ONNX file.")],
    classes: Annotated[
        str, typer.Option(metavar="NAME,NAME", help="The classes, in the order of the output, separated by commas.")
    ],
    name: Annotated[str | None, typer.Option(help="How it is listed.", show_default="the file's name")] = None,
    output: Annotated[str, typer.Option(help="What it answers: logits, probabilities, or one score.")] = "logits",
    threshold: Annotated[
        float | None,
        typer.Option(
            help="From which value on an image is of the second of two classes.", show_default="0.5; score: 0"
        ),
    ] = None,
    mean: Annotated[
        str | None, typer.Option(metavar="X,...", help="Its pixels, v / 255, are shifted by this, one a channel.")
    ] = None,
    std: Annotated[str | None, typer.Option(metavar="X,...", help="And divided by this, one a channel.")] = None,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload a classifier. Prints its id.

    It is one ONNX file with its weights inside that takes float images (N, c, h, w) and answers with a figure for each
    class, or a single one for two classes: the second is the one that it speaks for. The service loads it and runs it
    once on images of zeros, in a process without network.
    """
    from cli.output import emit, emit_json, say, transfer_bar

    figures = {"mean": _figures(mean), "std": _figures(std)}
    with connect(url, key) as client, transfer_bar(path.name) as progress:
        made = client.push_classifier(
            path, classes.split(","), name=name, output=output, threshold=threshold, progress=progress, **figures
        )
    size, channels = made.wire.get("size") or "any", made.wire.get("channels") or "any"
    say(f"It takes images of {size} x {size} pixels, {channels} channels, and tells {', '.join(made.classes)} apart.")
    if as_json:
        emit_json(made.wire)
    else:
        emit(made.id)


@command(app, "list", example="forgetd classifiers list --json | jq .classes")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List your classifiers, newest first."""
    from itertools import islice

    from cli.output import age, emit_json, table

    with connect(url, key) as client:
        found = list(islice(client.classifiers(), limit))
    if as_json:
        for classifier in found:
            emit_json(classifier.wire)
        return
    table(("id", "name", "classes", "age"), [(c.id, c.name, ", ".join(c.classes), age(c.created_at)) for c in found])


@command(app, example=SHOW_EXAMPLE)
def show(classifier: ClassifierId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show one classifier: what was said of it, and what its trial found."""
    from cli.output import age, emit_json, fields

    with connect(url, key) as client:
        found = client.classifier(classifier)
    if as_json:
        emit_json(found.wire)
        return
    wire = found.wire
    fields(
        {
            "id": found.id,
            "name": found.name,
            "classes": ", ".join(found.classes),
            "output": f"{wire['output']}, threshold {wire['threshold']:g}",
            "images": f"{wire['size'] or 'any'} pixels a side, {wire['channels'] or 'any'} channels",
            "scale": str(wire["scale"]),
            "uploaded": f"{age(found.created_at)} ago",
            "erased": f"{age(found.erased_at)} ago" if found.erased_at else None,
        }
    )


@command(app, example=DELETE_EXAMPLE)
def delete(classifier: ClassifierId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Erase a classifier's file now, every copy the service holds. Refused while a job still needs it."""
    from cli.output import emit_json, say

    with connect(url, key) as client:
        erased = client.erase_classifier(classifier)
    if as_json:
        emit_json(erased.wire)
    say(f"Classifier {erased.id} is erased.")


def _figures(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not numbers separated by commas.") from None
