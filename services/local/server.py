"""What every embedded server shares: a guarded process, its identity, its ports, and waiting until it answers."""

import contextlib
import json
import os
import pwd
import random
import select
import signal
import socket
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import psutil

from services.local import guardian

LOOPBACK = "127.0.0.1"
START_SECONDS = 60.0  # a very slow disk, not the normal case
POLL_SECONDS = 0.01
LOG_BYTES = 8 * 2**20  # an older log than this is moved aside at the next start
# Below the ranges that Linux (32768) and macOS (49152) give to outgoing connections: a recorded port stays ours.
_PORTS = range(20_000, 32_000)


class LocalServerError(RuntimeError):
    """An embedded server did not start; the message holds the end of its log."""


@dataclass(frozen=True)
class ProcessIdentity:
    """A process id with the moment its process started: after a reboot the id alone may be another process's."""

    pid: int
    mark: str

    @classmethod
    def of(cls, pid: int) -> "ProcessIdentity | None":
        """Return the identity of a live process, or None if there is none.

        A zombie does not count as alive, unless threads of it still run: they hold its ports and files.
        """
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError):
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1:
                return None
            return cls(pid, _start_mark(process))
        return None

    def alive(self) -> bool:
        """Whether this very process still runs."""
        return ProcessIdentity.of(self.pid) == self


@dataclass(frozen=True)
class Command:
    """How a server is run.

    `run_as` names the folders that an unprivileged user must reach, for a server that refuses to be root.
    """

    argv: list[str]
    cwd: Path
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signal: int = signal.SIGTERM
    death_signal: int = signal.SIGKILL
    grace_seconds: float = 10.0
    run_as: tuple[Path, ...] | None = None


class Server(ABC):
    """One embedded server in its own folder; the adapters say how it is set up, run and asked whether it is ready.

    `ports` holds its loopback ports by name from `start` on.
    """

    name: ClassVar[str]
    port_names: ClassVar[tuple[str, ...]]

    def __init__(self, home: Path, secrets: Mapping[str, str], *, durable: bool) -> None:
        self.home = home
        self.secrets = secrets
        self.durable = durable
        self.ports: Mapping[str, int] = {}
        self.identity: ProcessIdentity | None = None
        self._guardian: subprocess.Popen[str] | None = None

    @property
    def log(self) -> Path:
        """Where the server writes its log."""
        return self.home / "server.log"

    @abstractmethod
    def prepare(self) -> None:
        """Write what the server reads at its start; clear what an earlier process of ours left behind."""

    @abstractmethod
    def command(self) -> Command:
        """Return how to run it."""

    @abstractmethod
    def ready(self) -> bool:
        """Ask once whether it answers with our credentials, and finish its first-time set-up."""

    def usable(self, port: int) -> bool:
        """Whether this server could listen on the port."""
        return is_free(port)

    def start(self, ports: Mapping[str, int]) -> ProcessIdentity:
        """Run the server and return when it answers.

        Raises:
            LocalServerError: It ended, or gave no answer in time.
        """
        self.home.mkdir(mode=0o700, exist_ok=True)
        if self.log.exists() and self.log.stat().st_size > LOG_BYTES:
            self.log.replace(self.log.with_suffix(".log.old"))
        self.ports = ports
        self.prepare()
        self._guardian = spawn(self.command(), self.log)
        try:
            self.identity = _server_identity(self._guardian)
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise
        if self.identity is None:
            raise LocalServerError(self._failure("ended at once"))
        return self.identity

    def stop(self) -> None:
        """Stop it in order; nothing happens if it does not run."""
        if self._guardian is not None:
            self._guardian.terminate()
            self._guardian.wait()
        self._guardian = None
        self.identity = None

    def kill(self) -> None:
        """Kill it with SIGKILL, as a crash would."""
        if self.identity is not None and self.identity.alive():
            os.kill(self.identity.pid, signal.SIGKILL)
        if self._guardian is not None:
            self._guardian.wait()
        self._guardian = None
        self.identity = None

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        last: Exception | None = None
        while time.monotonic() < deadline:
            if self.identity is None or self._guardian is None or self._guardian.poll() is not None:
                raise LocalServerError(self._failure("ended while starting"))
            try:
                if self.ready():
                    return
            except (OSError, psutil.Error) as error:
                last = error
            time.sleep(POLL_SECONDS)
        raise LocalServerError(self._failure(f"gave no answer within {START_SECONDS:.0f} s")) from last

    def _failure(self, what: str) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-15:] if self.log.exists() else []
        return "\n  ".join([f"{self.name} {what}; the end of {self.log}:", *lines])


def spawn(command: Command, log: Path) -> "subprocess.Popen[str]":
    """Run a command under a guardian, in a session of its own so that Ctrl-C reaches forgetd alone."""
    user = unprivileged_user() if command.run_as is not None else None
    spec = {
        "argv": command.argv,
        "cwd": str(command.cwd),
        "env": {"PATH": os.defpath, "LC_ALL": "C", "HOME": str(command.cwd), **command.env},
        "log": str(log),
        "parent": os.getpid(),
        "stop_signal": int(command.stop_signal),
        "death_signal": int(command.death_signal),
        "grace_seconds": command.grace_seconds,
        "user": None
        if user is None
        else {"uid": user.pw_uid, "gid": user.pw_gid, "needs": [str(path) for path in command.run_as or ()]},
    }
    return subprocess.Popen(  # noqa: S603 - our own interpreter and script
        [sys.executable, "-I", "-S", guardian.__file__, json.dumps(spec)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        text=True,
    )


def unprivileged_user() -> pwd.struct_passwd | None:
    """Return the user that stands in where we are root, or None where we are not.

    Raises:
        LocalServerError: We are root on a machine that has no user `nobody`.
    """
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise LocalServerError(
            "PostgreSQL refuses to run as root and there is no user `nobody`; run as a user."
        ) from None


def pick_ports(server: Server, recorded: Mapping[str, int]) -> dict[str, int]:
    """Return a loopback port for each of the server's names: the recorded one unless it was taken, else a new one."""
    ports: dict[str, int] = {}
    others = {port for name, port in recorded.items() if name not in server.port_names}
    for name in server.port_names:
        port = recorded.get(name)
        while port is None or port in ports.values() or port in others or not server.usable(port):
            port = random.choice(_PORTS)  # noqa: S311 - not a secret
        ports[name] = port
    return ports


def is_free(port: int) -> bool:
    """Whether a server could listen on this loopback port now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: TIME_WAIT does not count
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def kill_and_wait(identities: Iterable[ProcessIdentity], seconds: float = 10.0) -> None:
    """Kill these very processes and wait until they are gone.

    Raises:
        LocalServerError: One of them is still there afterwards.
    """
    living = [identity for identity in identities if identity.alive()]
    for identity in living:
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, signal.SIGKILL)
    deadline = time.monotonic() + seconds
    while left := [identity for identity in living if identity.alive()]:
        if time.monotonic() > deadline:
            raise LocalServerError(f"A server of an earlier run cannot be ended: process {left[0].pid}.")
        time.sleep(POLL_SECONDS)


def _server_identity(process: "subprocess.Popen[str]") -> ProcessIdentity | None:
    """Read the server's process id from its guardian."""
    if process.stdout is None:
        return None
    with process.stdout as pipe:
        readable, _, _ = select.select([pipe], [], [], START_SECONDS)
        line = pipe.readline() if readable else ""
    return ProcessIdentity.of(int(line)) if line.strip() else None


def _start_mark(process: psutil.Process) -> str:
    """Return when the process started, in a form that a step of the wall clock does not change where possible."""
    if sys.platform == "linux":
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        return f"{boot}:{stat.rpartition(')')[2].split()[19]}"  # field 22: ticks since boot
    return f"{process.create_time():.2f}"
