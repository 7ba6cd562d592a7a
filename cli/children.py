"""Child processes that are kept alive: started, watched, started again after a crash, stopped in order."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

__all__ = ["Child"]

ROOT = Path(__file__).resolve().parent.parent
BACKOFF_SECONDS = 0.25  # doubled with every crash
BACKOFF_MAX_SECONDS = 30.0
STEADY_SECONDS = 30.0  # a process that lived this long starts with a fresh backoff
LOG_MAX_BYTES = 16 * 2**20  # one older log is kept
TAIL_BYTES = 4096


class Child:
    """One of our processes. It preloads from ``start`` on and works from ``begin`` on.

    Args:
        name: What it is called in messages and logs.
        module: What it runs, with its arguments.
        arguments: The module's arguments.
        preload: Modules to load while the servers start.
        log: Where its output goes.
        tell: Called with a line when it crashed and when it is started again.
        pass_fds: File descriptors that it inherits.
    """

    def __init__(
        self,
        name: str,
        module: str,
        arguments: Sequence[str],
        *,
        preload: Sequence[str],
        log: Path,
        tell: Callable[[str], None],
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.log = log
        self.crashes = 0
        self._argv = [sys.executable, "-m", "cli.child", ",".join(preload), module, *arguments]
        self._pass_fds = tuple(pass_fds)
        self._tell = tell
        self._environment: Mapping[str, str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stopping = threading.Event()
        self._changed = threading.Lock()
        self._keeper: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """The running process; None between a crash and the next start."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def start(self) -> None:
        """Start the process; it loads its libraries and waits."""
        self.log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_MAX_BYTES:
            self.log.replace(self.log.with_suffix(".log.1"))
        self._spawn()

    def begin(self, environment: Mapping[str, str]) -> None:
        """Tell it where everything is, and keep it alive from now on."""
        self._environment = environment
        self._hand_over()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{self.name}", daemon=True)
        self._keeper.start()

    def terminate(self) -> None:
        """Ask it to end; it will not be started again."""
        self._stopping.set()
        self._signal(signal.SIGTERM)

    def join(self, seconds: float, hurry: threading.Event) -> bool:
        """Wait until it has ended; kill it when the time is over or ``hurry`` is set. Whether it ended by itself."""
        process = self._process
        if process is None:
            return True
        deadline = time.monotonic() + seconds
        while process.poll() is None and time.monotonic() < deadline and not hurry.is_set():
            time.sleep(0.02)
        orderly = process.poll() is not None
        if not orderly:
            self._signal(signal.SIGKILL)
            process.wait()
        if self._keeper is not None:
            self._keeper.join()
        if process.stdin is not None:
            process.stdin.close()
        return orderly

    def tail(self) -> str:
        """The end of its log."""
        try:
            with self.log.open("rb") as file:
                file.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                return file.read().decode(errors="replace").strip()
        except OSError:
            return ""

    def _spawn(self) -> None:
        environment = dict(os.environ)
        if ROOT.name != "site-packages":  # a checkout: found from any folder
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH")]))
        with open(os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab") as log:
            self._process = subprocess.Popen(  # noqa: S603 our own argument list
                self._argv,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=self._pass_fds,
                start_new_session=True,  # Ctrl-C at the terminal is for us: we stop them in order
            )

    def _hand_over(self) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(BrokenPipeError):  # it died; the keeper sees that
            self._process.stdin.write(json.dumps(dict(self._environment or {})).encode() + b"\n")
            self._process.stdin.flush()

    def _keep(self) -> None:
        pause = BACKOFF_SECONDS
        while not self._stopping.is_set():
            process, since = self._process, time.monotonic()
            if process is None:
                return
            code = process.wait()
            if self._stopping.is_set():
                return
            self.crashes += 1
            if time.monotonic() - since > STEADY_SECONDS:
                pause = BACKOFF_SECONDS
            self._tell(f"{self.name} ended unexpectedly ({_how(code)}); starting it again. Its log: {self.log}")
            if process.stdin is not None:
                process.stdin.close()
            self._stopping.wait(pause)
            pause = min(2 * pause, BACKOFF_MAX_SECONDS)
            with self._changed:
                if not self._stopping.is_set():
                    self._spawn()
                    self._hand_over()

    def _signal(self, number: signal.Signals) -> None:
        with self._changed:
            if self._process is not None and self._process.poll() is None:
                self._process.send_signal(number)


def _how(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
