"""``forgetd checkpoints``: the models that jobs work on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cli.options import Json, Key, Url, command, connect

if TYPE_CHECKING:
    from cli.resources import Checkpoint

__all__ = ["app"]

app = typer.Typer(help="Upload models, and see what became of them.", no_args_is_help=True)

CheckpointId = Annotated[str, typer.Argument(metavar="CHECKPOINT", help="The checkpoint's id: ckpt_...")]
PUSH_EXAMPLE = "forgetd checkpoints push glow.safetensors --name faces"
SHOW_EXAMPLE = "forgetd checkpoints show ckpt_0192f3c1a2b47d0e8f1a2b3c4d5e6f70"


@command(app, example=PUSH_EXAMPLE)
def push(
    path: Annotated[Path, typer.Argument(exists=True, dir_okay=False, readable=True, help="The model's file.")],
    name: Annotated[str | None, typer.Option(help="How it is listed.", show_default="the file's name")] = None,
    image_size: Annotated[int | None, typer.Option(min=1, help="Side of its images in pixels, if asked for.")] = None,
    n_bits: Annotated[int | None, typer.Option(min=1, max=8, help="Bits a colour channel, if asked for.")] = None,
    family: Annotated[str | None, typer.Option(help="glow, tarflow, ...; told by the file where unset.")] = None,
    noise_std: Annotated[
        float | None, typer.Option(min=0, help="Of a TarFlow's noise, as in the name of its published file.")
    ] = None,
    prediction_type: Annotated[
        str | None, typer.Option(help="Of a diffusion model: epsilon or v_prediction, if asked for.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait until it is validated.")] = True,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """Upload a model and have it validated. Prints its id.

    The file goes to the service, which keeps it in its object store; one of 64 MiB or more goes straight there. A
    safetensors file is checked; a plain state dict (.pt, .pth, .ckpt) is converted in a process without network, and
    code in it is never executed. A diffusers folder goes as a plain tar: tar -cf model.tar -C FOLDER .
    """
    from cli.output import emit, emit_json, say, transfer_bar

    with connect(url, key) as client:
        with transfer_bar(path.name) as progress:
            checkpoint = client.push_checkpoint(
                path,
                name=name,
                image_size=image_size,
                n_bits=n_bits,
                family=family,
                noise_std=noise_std,
                prediction_type=prediction_type,
                wait=False,
                progress=progress,
                notice=say,
            )
        if wait:
            say(f"Uploaded as {checkpoint.id}; validating.")
            checkpoint = client.wait_checkpoint(checkpoint.id)
            say(f"Ready: {_describe(checkpoint)}.")
    if as_json:
        emit_json(checkpoint.wire)
    else:
        emit(checkpoint.id)


@command(app, "list", example="forgetd checkpoints list --json | jq .status")
def list_(
    limit: Annotated[int, typer.Option(min=1, help="How many, newest first.")] = 20,
    url: Url = None,
    key: Key = None,
    as_json: Json = False,
) -> None:
    """List your models, newest first."""
    from itertools import islice

    from cli.output import age, emit_json, table

    with connect(url, key) as client:
        found = list(islice(client.checkpoints(), limit))
    if as_json:
        for checkpoint in found:
            emit_json(checkpoint.wire)
        return
    table(
        ("id", "name", "status", "model", "age"),
        [(c.id, c.name, c.status, _describe(c), age(c.created_at)) for c in found],
    )


@command(app, example=SHOW_EXAMPLE)
def show(checkpoint: CheckpointId, url: Url = None, key: Key = None, as_json: Json = False) -> None:
    """Show one model: what validation found, or why it was rejected."""
    from cli.output import age, emit_json, fields

    with connect(url, key) as client:
        found = client.checkpoint(checkpoint)
    if as_json:
        emit_json(found.wire)
        return
    problem = found.problem or {}
    fields(
        {
            "id": found.id,
            "name": found.name,
            "status": found.status,
            "model": _describe(found),
            "problem": " ".join(str(problem[part]) for part in ("title", "detail") if problem.get(part)),
            "warnings": "; ".join(str(warning) for warning in (found.manifest or {}).get("warnings") or ()),
            "uploaded": f"{age(found.created_at)} ago",
        }
    )


def _describe(checkpoint: Checkpoint) -> str:
    """The model in a few words, from the manifest that validation wrote."""
    manifest = checkpoint.manifest
    if not manifest:
        return "-"
    words = [str(manifest.get("family", ""))]
    if size := manifest.get("image_size"):
        words.append(f"{size}x{size}" + (f"x{manifest['channels']}" if manifest.get("channels") else ""))
    if bits := manifest.get("n_bits"):
        words.append(f"{bits} bits")
    return " ".join(words)
