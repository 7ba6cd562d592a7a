"""``forgetd up``: the local service in the foreground, until somebody says stop."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from cli.exits import ExitCode
from cli.output import emit, say
from cli.profile import data_dir as resolve_data_dir
from cli.service import LocalService

__all__ = ["run", "signals_stop"]


def run(data_dir: Path | None, port: int) -> int:
    """Start, print how to call it, stay, stop."""
    service = LocalService(resolve_data_dir(data_dir), port=port, tell=say)
    say("Starting forgetd ...")
    try:
        with signals_stop(service) as stopped, service:
            emit(_card(service))
            stopped.wait()
            say("Stopping: running jobs save their state. Ctrl-C again to stop at once.")
    except KeyboardInterrupt:
        say("Stopped before it was up.")
        return ExitCode.INTERRUPTED
    say("Stopped.")
    return ExitCode.OK


@contextmanager
def signals_stop(service: LocalService) -> Iterator[threading.Event]:
    """Turn SIGINT, SIGTERM and SIGHUP into an event: an interrupt during the start, a hurry during the stop."""
    stopped = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        if stopped.is_set():
            service.stop_now()
            return
        stopped.set()
        if not service.start_seconds:
            raise KeyboardInterrupt  # not up yet: the start undoes itself

    former = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield stopped
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _card(service: LocalService) -> str:
    """Where it is and how to call it."""
    return f"""\
forgetd is up ({service.start_seconds:.1f} s).

  API       {service.url}
  Docs      {service.url}/docs
  Key       {service.key}
  Data      {service.data_dir}   (logs in logs/)

Call it, in another terminal and this folder:

  forgetd checkpoints push glow.safetensors
  forgetd images push photos/
  forgetd jobs list

or from anywhere:

  export FORGETD_URL={service.url} FORGETD_KEY={service.key}
  curl -H "Authorization: Bearer $FORGETD_KEY" $FORGETD_URL/jobs

Ctrl-C stops it."""
