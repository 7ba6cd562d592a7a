"""``forgetd images``: the pictures that a job reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cli.options import Json, Key, Url, command, connect

__all__ = ["app"]

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
PUSH_EXAMPLE = "forgetd images push ~/Pictures/anna"

app = typer.Typer(help="Upload the images to forget or to remember, and erase them.", no_args_is_help=True)


@command(app, example=PUSH_EXAMPLE)
def push(
    paths: Annotated[
        list[Path], typer.Argument(exists=True, readable=True, help="JPEG, PNG or WebP files or folders.")
    ],
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload images as one set. Prints its id.

    The images go to the service, their file names do not. It decodes them, keeps them in its object store for a day at
    most, and erases a set as soon as the job whose target it was has ended.
    """
    from cli.output import emit, emit_json, say, transfer_bar

    files = _files(paths)
    with connect(url, key) as client, transfer_bar("images", unit="images") as progress:
        images = client.push_images(files, progress=progress)
    dropped = images.wire.get("duplicates_dropped") or 0
    again = f"; {dropped} had the pixels of another and {'was' if dropped == 1 else 'were'} dropped" if dropped else ""
    say(f"The set holds {images.count} image{'s' if images.count != 1 else ''}{again}.")
    if as_json:
        emit_json(images.wire)
    else:
        emit(images.id)


@command(app, example="forgetd images erase imgs_0192f3c1a2b47d0e8f1a2b3c4d5e6f70")
def erase(
    images: Annotated[str, typer.Argument(metavar="IMAGES", help="The set's id: imgs_...")],
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Erase the images of a set now, every copy the service holds. Refused while a job still reads them."""
    from cli.output import emit_json, say

    with connect(url, key) as client:
        erased = client.erase_images(images)
    if as_json:
        emit_json(erased.wire)
    say(f"The images of {erased.id} are erased.")


def _files(paths: list[Path]) -> list[Path]:
    """The files named, and the images in the folders named, in a stable order."""
    found: list[Path] = []
    for path in paths:
        inside = sorted(item for item in path.iterdir() if item.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise typer.BadParameter(f"{path} holds no image ({', '.join(SUFFIXES)}).")
        found += inside
    return found
