"""Workers, control loops and gateways as processes: started by their command lines, or forked.

A forked one comes from a process that has loaded what it imports: its start costs milliseconds instead of a second or
two of a core. Else it is the same: its own environment, session, signals and end. That the command lines do what the
forked do is seen where they are run: `test_processes`, `test_many_hosts`, the tests of ``forgetd up`` and ``worker``.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

__all__ = ["HERE", "PATIENCE_SECONDS", "ROOT", "Forked", "Process", "control_loop", "gateway", "worker"]

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
PATIENCE_SECONDS = 60.0  # for conditions, on a machine that others load; only a failing test waits this long
FORKING = multiprocessing.get_context("forkserver")
FORKING.set_forkserver_preload([__name__, "worker.main", "worker.control", "api.app", "uvicorn"])


class Process:
    """A child in a session of its own, its output in a file."""

    def __init__(self, command: list[str], environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
                stdout=stream,
                stderr=stream,
                cwd=ROOT,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, number: int) -> None:
        self._process.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        return self._process.wait(PATIENCE_SECONDS)

    def running(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.running():
            self.send(signal.SIGCONT)
            self.kill()


class Forked(Process):
    """A forked one.

    Args:
        what: one of the functions below.
        arguments: its arguments.
        environment: beside the variables of this process.
        log: where its output goes.
    """

    def __init__(self, what: Callable[..., int], *arguments: Any, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        log.touch()
        own = {**os.environ, **environment, "PYTHONPATH": str(ROOT)}
        self._child = FORKING.Process(target=_be, args=(what, arguments, own, str(log)))
        with patch.dict(os.environ, {"PYTHONPATH": str(ROOT)}):  # for the process that forks, which the first starts
            self._child.start()
        assert self._child.pid is not None
        self._pid = self._child.pid

    @property
    def pid(self) -> int:
        return self._pid

    def send(self, number: int) -> None:
        if self.running():
            os.kill(self._pid, number)

    def wait(self) -> int:
        self._child.join(PATIENCE_SECONDS)
        if self._child.exitcode is None:
            raise TimeoutError(f"process {self._pid} has not ended")
        return self._child.exitcode

    def running(self) -> bool:
        return self._child.is_alive()


def _be(what: Callable[..., int], arguments: tuple[Any, ...], environment: dict[str, str], log: str) -> None:
    """What a forked child does."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for descriptor in (1, 2):
        os.dup2(stream, descriptor)
    os.close(stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    sys.exit(what(*arguments))


# Imports wait for the child: who only starts it needs none of them.


def worker(*queues: str) -> int:
    """As ``python worker_process.py QUEUES``."""
    from tests.worker.worker_process import main

    return main(queues)


def control_loop() -> int:
    """As ``python -m worker.control``."""
    from worker.control import main

    return main([])


def gateway(listener: socket.socket, grace_seconds: int) -> int:
    """As ``uvicorn api.app:app`` on the descriptor of a listening socket."""
    import uvicorn

    uvicorn.run("api.app:app", fd=listener.fileno(), access_log=False, timeout_graceful_shutdown=grace_seconds)
    return 0
