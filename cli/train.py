"""``forgetd train``: a flow of the user's own images, trained on this machine in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from cli.exits import ExitCode
from cli.options import command

__all__ = ["register"]

ROOT = Path(__file__).resolve().parent.parent
FIGURES = {
    "bits_per_dim": "bits per dimension",
    "nats_per_image": "negative ELBO in nats an image",
    "squared_error_per_image": "squared error, summed over an image",
}
"""What a training ends with, by its family's unit."""
EXAMPLE = "forgetd train ~/Pictures/faces --family glow --out base.safetensors --channels 1 --minutes 10"
TAIL_LINES = 8


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, example=EXAMPLE)(train)


def train(
    folder: Annotated[
        Path,
        typer.Argument(
            exists=True, file_okay=False, help="Folder of JPEG, PNG or WebP files, searched with its sub-folders."
        ),
    ],
    family: Annotated[
        str, typer.Option("--family", help="A flow (glow, realnvp, maf, iaf, tarflow, class-prior), a vae or a ddpm.")
    ] = "glow",
    out: Annotated[Path, typer.Option("--out", help="The checkpoint to write.")] = Path("base.safetensors"),
    size: Annotated[int, typer.Option(min=2, max=1024, help="Side of the square that images are fitted to.")] = 32,
    channels: Annotated[int, typer.Option(min=1, max=3, help="3: colour; 1: grey, which learns sooner.")] = 3,
    n_bits: Annotated[
        int | None, typer.Option("--n-bits", min=1, max=8, help="Colour depth; 5; 8 for a noisy flow, a vae, a ddpm.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser steps; the family's own by default.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0.001, help="Time budget instead of steps; with both, what is over first.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all randomness.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A value of the architecture or recipe, as hidden=128."),
    ] = None,
    hold_out: Annotated[
        float, typer.Option("--hold-out", min=0.0, max=0.9, help="Share of the images that is only measured on.")
    ] = 0.1,
    conditional: Annotated[
        bool,
        typer.Option(
            "--conditional", help="Sub-folders are classes of a tarflow; always so of class-prior, vae, ddpm."
        ),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep a state file beside --out, and go on from it if it is there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")] = False,
) -> None:
    """Train a model on a folder of your images, and write a checkpoint that `forgetd checkpoints push` takes.

    Nothing leaves this machine, and no service is needed. Part of the images is held out; at the end the command prints
    bits per dimension on both parts (of a vae its bound, in nats an image; of a ddpm its squared error), and whether
    the service would take the checkpoint. Ctrl-C leaves no half a file.
    """
    given: dict[str, Any] = {
        "--family": family, "--out": out, "--size": size, "--channels": channels, "--n-bits": n_bits, "--steps": steps,
        "--minutes": minutes, "--seed": seed, "--hold-out": hold_out, "--device": device,
    }  # fmt: skip
    arguments = [f"{name}={value}" for name, value in given.items() if value is not None]
    arguments += [f"--set={text}" for text in settings or []]
    arguments += ["--conditional"] * conditional + ["--resume"] * resume + ["--json", "--", str(folder)]
    raise typer.Exit(run(arguments, as_json=as_json))


def run(arguments: list[str], *, as_json: bool) -> int:
    """Run ``python -m models.train`` and show what it says; returns the exit code."""
    from cli.output import emit, emit_json, say

    signal.signal(signal.SIGTERM, signal.default_int_handler)
    result: dict[str, Any] = {}
    with tempfile.TemporaryFile() as errors:
        with _child(arguments, errors) as process, _shown() as show:
            try:
                for line in process.stdout or ():
                    told = json.loads(line)
                    if "step" in told:
                        show(told)
                    else:
                        result = told
                code = process.wait()
            except KeyboardInterrupt:
                code = _stopped(process)
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    if code != ExitCode.OK or not result:
        say("\n".join(_complaint(code, said)))
        return code if code in (ExitCode.USAGE, ExitCode.INTERRUPTED) else ExitCode.FAILURE
    if as_json:
        emit_json(result)
    else:
        emit("\n".join(_lines(result)))
    return ExitCode.OK


@contextlib.contextmanager
def _child(arguments: list[str], errors: IO[bytes]) -> Iterator[subprocess.Popen[str]]:
    """The training in its own process, so that this one never loads torch; it ends with this one, however that ends."""
    # The service's addresses and keys are none of its business.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGETD_")}
    if ROOT.name != "site-packages":  # a checkout: found from any folder
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
    process = subprocess.Popen(  # noqa: S603 our own argument list
        [sys.executable, "-m", "cli.child", "", "models.train", *arguments],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=errors,
        text=True,
        start_new_session=True,  # Ctrl-C at the terminal is for us: we stop it in order
    )
    try:
        if process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # it died; its exit code says why
                process.stdin.write("{}\n")
                process.stdin.flush()
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def _stopped(process: subprocess.Popen[str]) -> int:
    """Ask the training to stop, and wait for it to save what it wants to; a second Ctrl-C does not wait."""
    with contextlib.suppress(KeyboardInterrupt):
        process.terminate()
        for _ in process.stdout or ():
            pass
        process.wait()
    return ExitCode.INTERRUPTED


@contextlib.contextmanager
def _shown() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar where somebody looks, nothing elsewhere."""
    from cli.output import progress_bar

    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with progress_bar("training") as show:
        yield lambda told: show(told["seconds"], told["total_seconds"] or 0.0, f"step {told['step']}, {_now(told)}")


def _now(told: dict[str, Any]) -> str:
    """The running loss: bits of a flow, nats of a model that is known by a bound, the squared error of a ddpm."""
    if "bpd" in told:
        return f"{told['bpd']:.3f} bits a dimension"
    if "nats" in told:
        return f"{told['nats']:.1f} nats an image"
    return f"{told['squared_error']:.2f} squared error an image"


def _complaint(code: int, said: list[str]) -> list[str]:
    """Why there is no result: what the training said last, if it said so itself, else the end of its traceback."""
    if said and said[-1].startswith("Error: "):
        return said[-1:]
    if code == ExitCode.INTERRUPTED:
        return ["Error: interrupted; no checkpoint was written"]
    return [f"Error: the training ended with code {code}.", *said[-TAIL_LINES:]]


def _lines(result: dict[str, Any]) -> list[str]:
    """The result, for a person."""
    data = result["data"]
    unit = next(name for name in FIGURES if f"{name}_training" in result)
    what = FIGURES[unit]
    held_out = result[f"{unit}_held_out"]
    classes = f", {len(data['classes'])} classes" if data["classes"] else ""
    lines = [
        f"{result['path']}: {result['family']}, {result['parameters']:,} parameters, {result['steps']} steps "
        f"in {result['seconds']:.0f} s",
        f"images: {data['images']} in training, {data['held_out']} held out{classes}",
        f"{what}: {result[f'{unit}_training']:.3f} in training"
        + (f", {held_out:.3f} held out" if held_out is not None else ""),
    ]
    lines += [f"Note: {text}" for text in result["warnings"]]
    if result["refused"]:
        lines.append(f"The service would refuse this checkpoint: {result['refused']}")
    return lines
