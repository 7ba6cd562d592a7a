"""The runner's side of its contract: messages out, beats in, SIGTERM, exit codes. See docs/architecture.md."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path
from types import FrameType
from typing import Any, Literal

__all__ = [
    "JOB_FILE",
    "DeadMansSwitch",
    "ExitCode",
    "Interrupted",
    "Phase",
    "Reporter",
    "Scope",
    "Stop",
    "wait_for_job",
]

Phase = Literal["validating", "replay", "fisher", "unlearning", "evaluating"]
Scope = Literal["checkpoint", "job"]
"""Who can use what a job worked out: all jobs on its checkpoint, or its own later attempts."""

SILENCE_PER_LEASE = 1.2
PROGRESS_SECONDS = 0.2  # between two progress messages
JOB_FILE = "job.json"  # appears once everything that it names is in place
LOOK_SECONDS = 0.02


class ExitCode(IntEnum):
    """How the process says what happened, beside its last message."""

    REPORTED = 0
    USER_ERROR = 64
    INTERNAL = 70
    OUT_OF_MEMORY = 71
    INTERRUPTED = 75


class Interrupted(Exception):
    """SIGTERM came, and what can be resumed has been written."""


class Reporter:
    """JSON lines on the real standard output; whatever else prints there is sent to standard error."""

    def __init__(self) -> None:
        sys.stdout.flush()
        self._out = os.fdopen(os.dup(1), "wb", buffering=0)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._lock = threading.Lock()
        self._phase: Phase = "validating"
        self._spoke_at = 0.0

    def phase(self, phase: Phase) -> None:
        """A new phase begins."""
        self._phase = phase
        self._spoke_at = 0.0
        self._say({"type": "phase", "phase": phase})

    def progress(
        self,
        *,
        step: int,
        total: int,
        eta_seconds: float | None,
        losses: Mapping[str, float] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Where the phase is; most calls say nothing, so that every step may call."""
        now = time.monotonic()
        if now - self._spoke_at < PROGRESS_SECONDS and step != total:
            return
        self._spoke_at = now
        self._say(
            {
                "type": "progress",
                "phase": self._phase,
                "step": step,
                "total": total,
                "eta_seconds": None if eta_seconds is None else round(eta_seconds, 1),
                "losses": _finite(losses or {}),
                "metrics": _finite(metrics or {}),
            }
        )

    def alive(self) -> None:
        """Nothing new, and no hang: a part of a long step is done."""
        self._say({"type": "alive"})

    def state(self, path: Path, folder: Path, *, step: int) -> None:
        """A state that the next attempt can start from has been written, whole."""
        self._say({"type": "state", "path": str(path.relative_to(folder)), "step": step})

    def asset(self, path: Path, folder: Path, *, name: str, scope: Scope = "checkpoint") -> None:
        """A file that later jobs on this checkpoint, or later attempts at this job, can start from is there, whole.

        One for this job is taken over by the supervisor, and may be followed by a newer one of its name.
        """
        self._say({"type": "asset", "path": str(path.relative_to(folder)), "name": name, "scope": scope})

    def result(self, outcome: str, artifacts: list[dict[str, str]], summary: dict[str, Any]) -> None:
        """The last word of a run that came to its end."""
        self._say({"type": "result", "outcome": outcome, "artifacts": artifacts, "summary": summary})

    def error(self, reason: str, problem: dict[str, Any]) -> None:
        """The last word of a run that could not."""
        self._say({"type": "error", "reason": reason, "problem": problem})

    def _say(self, message: dict[str, Any]) -> None:
        line = json.dumps(message, allow_nan=False).encode() + b"\n"
        with self._lock:
            rest = memoryview(line)
            while rest:
                rest = rest[self._out.write(rest) :]


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    """JSON knows no NaN; a figure that is none is left out."""
    return {name: float(value) for name, value in values.items() if abs(float(value)) < float("inf")}


def wait_for_job(folder: Path, *, descriptor: int = 0) -> dict[str, Any]:
    """The job of this folder, once its inputs are there. Ends the process when the supervisor is gone before."""
    path = folder / JOB_FILE
    while not path.exists():
        ready, _, _ = select.select([descriptor], [], [], LOOK_SECONDS)
        if ready and not os.read(descriptor, 4096):
            os._exit(ExitCode.INTERNAL)
    job: dict[str, Any] = json.loads(path.read_text())
    return job


class DeadMansSwitch(threading.Thread):
    """Ends this process, and all that it started, once nobody holds the lease for it any more.

    The supervisor writes a byte for every renewal that the database confirmed. Its end of the pipe closes when it dies;
    when it hangs, or cannot reach the database, the bytes stop.
    """

    def __init__(self, lease_ttl_seconds: float, *, descriptor: int = 0) -> None:
        super().__init__(name="dead-mans-switch", daemon=True)
        self._limit = SILENCE_PER_LEASE * lease_ttl_seconds
        self._descriptor = descriptor

    def run(self) -> None:
        """Read beats until they stop."""
        while True:
            ready, _, _ = select.select([self._descriptor], [], [], self._limit)
            if not ready or not os.read(self._descriptor, 4096):
                break
        self._end()

    @staticmethod
    def _end() -> None:
        if os.getsid(0) == os.getpid():  # started by a supervisor, in a session of our own
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(ExitCode.INTERNAL)


class Stop:
    """SIGTERM, as a flag that is looked at between steps, or as an exception where there are no steps."""

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._held = False
        signal.signal(signal.SIGTERM, self._on_signal)

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A block that has nothing to save: SIGTERM leaves it with ``Interrupted`` wherever it is."""
        self._at_once = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._at_once = False

    def at_steps(self) -> None:
        """From the first step on there is something to save: for the rest of the block SIGTERM is a flag."""
        self._at_once = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Work within `at_once` that does have something to save: SIGTERM waits for its end, or what it releases."""
        before, self._held = self._held, True
        try:
            yield
        finally:
            self._held = before
        self._look()

    @contextmanager
    def released(self) -> Iterator[None]:
        """A part of a `held` block that SIGTERM cuts wherever it is, if it would cut what is around that."""
        before, self._held = self._held, False
        try:
            self._look()
            yield
        finally:
            self._held = before

    def _look(self) -> None:
        if self.requested and self._at_once and not self._held:
            raise Interrupted

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self.requested = True
        self._look()
