"""Our processes as an operator runs them: each started again when it ends, each with a wall clock of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

__all__ = ["ROOT", "Clocks", "Kept", "on_small_disk"]

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCE = Path(__file__).with_name("clock.c")
AGAIN_SECONDS = 0.2


class Clocks:
    """Wall clocks that can be made to jump, one a process. Without a C compiler there are none."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library: Path | None = None
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler and sys.platform == "linux":
            library = folder / "clock.so"
            command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE), "-ldl"]
            if subprocess.run(command, check=False).returncode == 0:
                self._library = library

    @property
    def can_jump(self) -> bool:
        return self._library is not None

    def environment(self, name: str) -> dict[str, str]:
        """For the process of this name."""
        if self._library is None:
            return {}
        self.set(name, 0)
        return {"LD_PRELOAD": str(self._library), "CHAOS_CLOCK": str(self._folder / f"{name}.clock")}

    def set(self, name: str, seconds: int) -> None:
        """So far the clock of this process is off from now on."""
        path = self._folder / f"{name}.clock"
        if not path.exists():
            path.write_bytes(bytes(8))
        with path.open("r+b") as file:  # the page that is mapped, not another file
            file.write(struct.pack("=q", seconds))


def on_small_disk(command: Sequence[str], folder: Path, megabytes: int) -> list[str] | None:
    """The command with a small disk of its own at ``folder``; None where the system lets nobody mount one."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return None
    space = [unshare, "--mount"] if os.geteuid() == 0 else [unshare, "--user", "--map-root-user", "--mount"]
    mount = f'mount -t tmpfs -o size={megabytes}m,mode=700 scratch "$0" && exec "$@"'
    with tempfile.TemporaryDirectory() as trial:
        tried = subprocess.run([*space, "sh", "-c", mount, trial, "true"], check=False, capture_output=True)
    return None if tried.returncode else [*space, "sh", "-c", mount, str(folder), *command]


class Kept:
    """A process that is started again whenever it ends, as systemd or a container's restart policy would."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self.ends: dict[int, int] = {}  # exit statuses, by pid
        self._command, self._environment = list(command), dict(environment)
        self._leaving = threading.Event()
        self._process = self._start()
        self._keeper = threading.Thread(target=self._keep, name=f"keep-{name}", daemon=True)
        self._keeper.start()

    @property
    def pid(self) -> int:
        """Of the process that runs now, or ran last."""
        return self._process.pid

    def send(self, number: int) -> bool:
        """Signal the process; False when there is none at the moment."""
        if self._process.poll() is not None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, number)
        return True

    def runners(self) -> list[int]:
        """The processes that run its jobs: leaders of the sessions that it started."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return []
        return [child.pid for child in children if _runs_a_job(child)]

    def wait_end(self, pid: int, seconds: float) -> bool:
        """Whether the process of this pid has ended by then."""
        limit = time.monotonic() + seconds
        while self._process.pid == pid and self._process.poll() is None:
            if time.monotonic() > limit:
                return False
            time.sleep(0.02)
        return True

    def stop(self, seconds: float) -> None:
        """End it for good: SIGTERM, and SIGKILL after that time."""
        self._leaving.set()
        for number in (signal.SIGCONT, signal.SIGTERM):
            self.send(number)
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL)
        self._process.wait()
        self._keeper.join()

    def _start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return subprocess.Popen(
                self._command,
                env={**os.environ, **self._environment, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=ROOT,
                start_new_session=True,
            )

    def _keep(self) -> None:
        while True:
            self.ends[self._process.pid] = self._process.wait()
            if self._leaving.wait(AGAIN_SECONDS):
                return
            self._process = self._start()


def _runs_a_job(process: psutil.Process) -> bool:
    try:
        return any("runner" in part for part in process.cmdline()[1:5])
    except psutil.Error:
        return False
