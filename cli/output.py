"""What commands print: results on stdout, everything else on stderr, and nothing that moves unless somebody looks."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from cli.errors import ClientError
    from cli.resources import Job

__all__ = [
    "age",
    "emit",
    "emit_json",
    "fields",
    "progress_bar",
    "progress_note",
    "report_error",
    "say",
    "table",
    "transfer_bar",
    "watch_bar",
]

PLAIN_SECONDS = 10.0  # between two lines about the same phase where there is no terminal
TELLING = ("z_min", "drift")  # the metrics that say most to whoever waits


def emit(text: str) -> None:
    """A result, for a person or a script."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def emit_json(data: Any) -> None:
    """A result in its wire form, one JSON document a line."""
    emit(json.dumps(data, ensure_ascii=False, default=str))


def say(text: str) -> None:
    """A word to the person at the terminal."""
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def stderr_console() -> Console:
    """Rich on stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Rows on stdout: a table for a terminal, tab-separated lines without a head for a pipe."""
    if not sys.stdout.isatty():
        for row in rows:
            emit("\t".join(row))
        return
    from rich.console import Console
    from rich.table import Table

    drawn = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        drawn.add_row(*row)
    Console(highlight=False).print(drawn)


def age(moment: datetime | None) -> str:
    """How long ago, in the largest unit that says something."""
    if moment is None:
        return "-"
    seconds = max(0.0, (datetime.now(UTC) - moment).total_seconds())
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f}{unit}"
    return f"{seconds:.0f}s"


def report_error(error: ClientError) -> None:
    """An error on stderr: what kind, what is wrong here, and what may help."""
    from cli.errors import AuthenticationError, CriteriaNotMet, ProblemError

    lines = [f"Error: {error}"]
    if isinstance(error, ProblemError):
        lines = [f"Error: {error.title}", *([f"  {error.detail}"] if error.detail else [])]
        for item in error.errors:
            where = item.get("pointer") or item.get("parameter") or item.get("header")
            lines.append(f"  {f'{where}: ' if where else ''}{item.get('detail', '')}")
    if isinstance(error, AuthenticationError):
        lines.append("  Pass --key or set FORGETD_KEY; an operator makes keys with: forgetd keys create")
    if isinstance(error, CriteriaNotMet):
        lines.append(f"  How far it came: forgetd jobs report {error.job.id}")
    say("\n".join(lines))


@contextmanager
def transfer_bar(label: str, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal while something is sent or fetched, one line when it is done elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _done, _total: None
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TransferSpeedColumn

    figures = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
    with Progress(TextColumn(label), BarColumn(), *figures, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total or None)


@contextmanager
def progress_bar(label: str) -> Iterator[Callable[[float, float, str], None]]:
    """A bar with a note on a terminal, a line now and then elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_progress(label)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(f"     {label}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task(label, total=None, note="")
        yield lambda done, total, note: bar.update(task, completed=done, total=total, note=note)


def _plain_progress(label: str) -> Callable[[float, float, str], None]:
    told = -1

    def show(done: float, total: float, note: str) -> None:
        nonlocal told
        tenth = int(10 * done / total) if total else 0
        if tenth > told:
            told = tenth
            say(f"     {label} {min(100, 100 * done / total if total else 0):.0f} %: {note}")

    return show


@contextmanager
def watch_bar() -> Iterator[Callable[[Job], None]]:
    """A job's phase, step and remaining time as they change: a bar on a terminal, a line a phase elsewhere."""
    if not sys.stderr.isatty():
        yield _plain_watcher()
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=stderr_console(), transient=True) as bar:
        task = bar.add_task("queued", total=None, note="")

        def show(job: Job) -> None:
            progress = job.progress
            bar.update(
                task,
                description=_where(job),
                total=progress.total,
                completed=progress.step or 0,
                note=progress_note(job),
            )

        yield show


def _plain_watcher() -> Callable[[Job], None]:
    last, told = "", 0.0

    def show(job: Job) -> None:
        nonlocal last, told
        now, moment = _where(job), time.monotonic()
        if now == last and (job.finished or moment - told < PLAIN_SECONDS):
            return
        last, told = now, moment
        say(f"{job.id} {now}  {'' if job.finished else progress_note(job)}".rstrip())

    return show


def _where(job: Job) -> str:
    return job.phase or job.progress.phase or "starting" if job.status == "running" else job.status


def progress_note(job: Job) -> str:
    """Step, remaining time and the method's figures of a running job in a line."""
    progress = job.progress
    parts = []
    if progress.step is not None:
        parts.append(f"step {progress.step}" + (f"/{progress.total}" if progress.total else ""))
    if progress.eta_seconds is not None:
        parts.append(f"eta {progress.eta_seconds:.0f} s")
    telling = [name for name in TELLING if name in progress.metrics] or [*progress.metrics][:2]
    parts += [f"{name} {_figure(progress.metrics[name])}" for name in telling]
    return "  ".join(parts)


def _figure(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def fields(pairs: Mapping[str, str | None]) -> None:
    """Named values on stdout, one a line, names aligned; the empty ones are left out."""
    shown = {name: value for name, value in pairs.items() if value}
    width = max(map(len, shown), default=0)
    for name, value in shown.items():
        emit(f"{name:<{width}}  {value}")
