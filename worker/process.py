"""The runner seen from outside: one process in a session of its own, JSON lines out, one byte per renewal in."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

from services.logs import inheriting

__all__ = ["RUNNER_COMMAND", "Malformed", "RunnerProcess", "runner_environment"]

ROOT = Path(__file__).resolve().parent.parent
# -P: the runner's folder holds what callers sent; it must not become a place to import from.
RUNNER_COMMAND: tuple[str, ...] = (sys.executable, "-P", "-m", "worker.runner")

MAX_LINE_BYTES = 4 * 2**20
MAX_WAITING_MESSAGES = 1000  # then the runner waits, which is better than memory without bound
MAX_STDERR_LINES = 200
MAX_STDERR_LINE_BYTES = 4096
KEPT_VARIABLES = re.compile(
    r"PATH|LANG|LC_\w+|TZ|LD_LIBRARY_PATH|DYLD_\w+|CUDA_\w+|NVIDIA_\w+|NCCL_\w+|ROCR?_\w+|HIP_\w+|"
    r"PYTORCH_\w+|TORCH_\w+|OMP_WAIT_POLICY|GOMP_SPINCOUNT|(OMP|MKL|OPENBLAS|VECLIB|NUMEXPR)_NUM_THREADS|KMP_\w+"
)


class Malformed(Exception):
    """The runner wrote something that is not of its contract."""


def runner_environment(folder: Path, cache: Path) -> dict[str, str]:
    """What the runner needs to find Python, locale and accelerators; no credential and no address of ours."""
    kept = {name: value for name, value in os.environ.items() if KEPT_VARIABLES.fullmatch(name)}
    return {
        "LANG": "C.UTF-8",
        # How long OpenMP's threads spin before they sleep. A whole run of taming on 2 cores, alone / beside two busy
        # processes: 4-5 s / 14-15 s so; 8 s / 16 s if they never spin; 4-5 s / 26 s and more if they spin for longer.
        "GOMP_SPINCOUNT": "3000",
        **kept,
        "PYTHONPATH": str(ROOT),
        "PYTHONNOUSERSITE": "1",
        "HOME": str(folder / "tmp"),
        "TMPDIR": str(folder / "tmp"),
        "MPLCONFIGDIR": str(cache),
        "XDG_CACHE_HOME": str(cache),
    }


class RunnerProcess:
    """A started runner. ``next_message`` gives what it says; ``beat`` tells it that the lease holds.

    ``ahead`` is what its libraries are known by, which it loads while it waits for ``job.json``: see
    `worker.runner.__main__.load_ahead`.
    """

    def __init__(
        self, command: Sequence[str], folder: Path, *, environment: dict[str, str], ahead: Sequence[str] = ()
    ) -> None:
        self._process = subprocess.Popen(  # noqa: S603 our own module, no shell
            [*command, str(folder), *ahead],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        self._messages: queue.Queue[dict[str, Any] | Malformed | None] = queue.Queue(MAX_WAITING_MESSAGES)
        self._stderr: deque[str] = deque(maxlen=MAX_STDERR_LINES)
        self._gone = threading.Event()
        self._ended = False
        os.set_blocking(self._pipe(self._process.stdin).fileno(), False)
        self._readers = [
            threading.Thread(target=inheriting(self._read_stdout), name="runner-stdout", daemon=True),
            threading.Thread(target=inheriting(self._read_stderr), name="runner-stderr", daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        """The process id, which is also its group's."""
        return self._process.pid

    @property
    def ended(self) -> bool:
        """Whether its last message has been given out."""
        return self._ended

    def beat(self) -> None:
        """One byte into its standard input. A full pipe or a dead reader changes nothing."""
        try:
            os.write(self._pipe(self._process.stdin).fileno(), b".")
        except (BlockingIOError, BrokenPipeError, ValueError):
            return

    def next_message(self, timeout: float) -> dict[str, Any] | None:
        """The next message, or None after the timeout or at the end (``ended``).

        Raises:
            Malformed: a line is not a JSON object, or longer than 4 MiB.
        """
        if self._ended:
            return None
        try:
            item = self._messages.get(timeout=timeout)
        except queue.Empty:
            return None
        if item is None:
            self._ended = True
        if isinstance(item, Malformed):
            raise item
        return item

    def terminate(self) -> None:
        """SIGTERM to the runner alone: it stops at its next step."""
        if self._process.poll() is None:
            self._process.terminate()

    def kill(self) -> None:
        """SIGKILL to the whole group."""
        self._signal_group(signal.SIGKILL)

    def finish(self, timeout: float = 5.0) -> int:
        """Wait for the end of the process, sweep its group, and return the exit status (negative: a signal's number).

        A process that closed its standard output and lingers is killed after the timeout.
        """
        self._gone.set()
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self._process.wait()
        self.kill()  # what the runner started and left behind
        for reader in self._readers:
            reader.join(timeout)
        for stream in (self._process.stdin, self._process.stdout, self._process.stderr):
            pipe = self._pipe(stream)
            try:
                pipe.close()
            except (BrokenPipeError, BlockingIOError):
                continue
        return self._process.returncode

    def crash_note(self) -> str:
        """Where it broke, from standard error: our own frames and the exception's type, never its message."""
        return crash_note(self._stderr)

    def _signal_group(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):  # macOS says the latter for a group of zombies
            return

    def _read_stdout(self) -> None:
        stream = self._pipe(self._process.stdout)
        try:
            while line := stream.readline(MAX_LINE_BYTES):
                if not self._put(_parse(line)):
                    return
        except ValueError:  # closed under us by finish()
            return
        finally:
            self._put(None)

    def _put(self, item: dict[str, Any] | Malformed | None) -> bool:
        """Hand a message over, waiting for room; False when nobody will read any more."""
        while True:
            try:
                self._messages.put(item, timeout=0.2)
            except queue.Full:
                if self._gone.is_set():
                    return False
            else:
                return True

    def _read_stderr(self) -> None:
        stream = self._pipe(self._process.stderr)
        try:
            while line := stream.readline(MAX_STDERR_LINE_BYTES):
                self._stderr.append(line.decode("utf-8", "replace").rstrip())
        except ValueError:
            return

    @staticmethod
    def _pipe(stream: IO[bytes] | None) -> IO[bytes]:
        if stream is None:
            raise RuntimeError("the runner was started without pipes")
        return stream


def _parse(line: bytes) -> dict[str, Any] | Malformed:
    if not line.endswith(b"\n"):
        return Malformed("a line was cut off or is too long")
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return Malformed("a line is no JSON")
    if not isinstance(message, dict) or not isinstance(message.get("type"), str):
        return Malformed("a line is no message")
    return message


FRAME = re.compile(r'\s*File "[^"]*?((?:worker|unlearning|evidence|models)/[\w/]+\.py)", line (\d+)')
RAISED = re.compile(r"([A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning))(?::|$)")


def crash_note(lines: Sequence[str] | deque[str]) -> str:
    """A traceback without what may be personal: ``worker/runner/forget.py:12 > models/glow.py:80: ValueError``."""
    frames: list[str] = []
    raised = ""
    for line in lines:
        if line.startswith("Traceback"):
            frames = []
        if frame := FRAME.match(line):
            frames.append(f"{frame[1]}:{frame[2]}")
        elif name := RAISED.match(line):
            raised = name[1]
    return f"{' > '.join(frames[-6:]) or 'no frame of ours'}: {raised or 'no exception'}"
