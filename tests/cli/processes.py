"""The command as its users run it: in a process, with its own folder and environment."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 60.0
COMMAND = (sys.executable, "-m", "cli.main")
UNKNOWN_JOB = f"job_{'0' * 32}"


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The process's environment without any setting of ours."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FORGETD_")}
    return kept | {"PYTHONPATH": str(ROOT)} | dict(extra or {})


def forgetd(*arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> Result:
    """Run a command to its end."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=cwd, env=environment(env), capture_output=True, text=True, timeout=60, check=False
    )
    return Result(done.returncode, done.stdout, done.stderr)


def eventually(question: Callable[[], Any], within: float = 20.0) -> Any:
    """Ask until the answer is true. The one place that sleeps."""
    limit = time.monotonic() + within
    while not (answer := question()):
        if time.monotonic() > limit:
            raise AssertionError(f"still not after {within:.0f} s")
        time.sleep(0.05)
    return answer


class Up:
    """A ``forgetd up`` that runs in a folder."""

    def __init__(self, folder: Path, *arguments: str, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.output: list[str] = []
        self._process = subprocess.Popen(
            [*COMMAND, "up", "--port", "0", *arguments],
            cwd=folder,
            env=environment(env),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        eventually(lambda: self._process.poll() is not None or self.says("Ctrl-C stops it"), within=START_SECONDS)
        assert self._process.poll() is None, self.text

    @property
    def text(self) -> str:
        """All it has said."""
        return "".join(self.output)

    def says(self, words: str) -> bool:
        """Whether it has said this."""
        return words in self.text

    @property
    def profile(self) -> dict[str, Any]:
        """What it left for commands to find."""
        members: dict[str, Any] = json.loads((self.folder / ".forgetd" / "profile.json").read_text())
        return members

    def processes(self) -> list[psutil.Process]:
        """Itself and everything that it started, directly or not."""
        itself = psutil.Process(self._process.pid)
        return [itself, *itself.children(recursive=True)]

    def child(self, module: str) -> psutil.Process | None:
        """The child that runs a module; None between a crash and the next start."""
        for one in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                if {module, "cli.child"} <= set(one.cmdline()):
                    return one
        return None

    def send(self, number: signal.Signals) -> None:
        """A signal to the one process, as a terminal or a service manager would."""
        self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        code = self._process.wait(60)
        self._reader.join()
        return code

    def close(self) -> None:
        """End it, however it is."""
        if self._process.poll() is None:
            self.send(signal.SIGTERM)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                self._process.kill()
                self.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.output.append(line)
