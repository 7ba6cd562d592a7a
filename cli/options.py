"""Options that several commands share, each defined once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from cli.client import Client

__all__ = ["DataDir", "JobId", "Json", "Key", "Timeout", "Url", "command", "connect", "prose"]

Function = TypeVar("Function", bound=Callable[..., Any])

PATIENCE_SECONDS = 3.0  # a person is waiting; waits for a job are more patient

Url = Annotated[
    str | None,
    typer.Option(
        "--url",
        envvar="FORGETD_URL",
        metavar="URL",
        help="The service; by default the one that `forgetd up` runs here.",
        rich_help_panel="Which service",
    ),
]
Key = Annotated[
    str | None,
    typer.Option(
        "--key",
        envvar="FORGETD_KEY",
        metavar="KEY",
        help="Your API key; sent to that service only. Prefer the variable: a command line can be read by others.",
        rich_help_panel="Which service",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print what the service sent, one JSON document a line.")]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id (job_...), or latest.")]
Timeout = Annotated[
    float | None, typer.Option("--timeout", min=0.0, metavar="SECONDS", help="Stop watching after this long (exit 7).")
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="FORGETD_DATA_DIR",
        metavar="DIR",
        help="Where the service keeps its data, logs and credentials; ./.forgetd by default.",
        show_default=False,
    ),
]


def connect(url: str | None, key: str | None) -> Client:
    """The client that the options name."""
    from cli.client import Client
    from cli.profile import resolve

    address, secret = resolve(url, key)
    return Client(address, secret, patience=PATIENCE_SECONDS)


def command(app: typer.Typer, name: str | None = None, *, example: str) -> Callable[[Function], Function]:
    """Register a function as a command; its docstring is the help, the example works as pasted."""

    def register(function: Function) -> Function:
        app.command(name, help=prose(function.__doc__ or ""), epilog=f"Example: {example}")(function)
        return function

    return register


def prose(text: str) -> str:
    """Paragraphs without the line breaks of the source, so that the terminal's width decides."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
