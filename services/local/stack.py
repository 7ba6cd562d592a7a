"""The three embedded servers as one thing: started together, stopped in reverse, surviving each other's crashes."""

import contextlib
import fcntl
import json
import os
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from services.local.postgres import Postgres
from services.local.seaweedfs import BUCKET, SeaweedFS
from services.local.server import LocalServerError, ProcessIdentity, Server, kill_and_wait, pick_ports
from services.local.valkey import Valkey

_SECRETS = (
    "broker",
    "database",
    "database_superuser",
    "s3_access_key",
    "s3_secret_key",
    "storage_admin",
    "storage_filer_read",
    "storage_filer_write",
    "storage_read",
    "storage_write",
)
_ATTEMPTS = 4  # another program may take a free port between our look and the server's bind


@dataclass(frozen=True)
class LocalUrls:
    """Where the started servers are; the fields of one that was not started are empty."""

    database_url: str = ""
    broker_url: str = ""
    s3_endpoint_url: str = ""
    s3_access_key: str = ""
    s3_secret_key: str = ""
    s3_bucket: str = BUCKET


class LocalStack:
    """The embedded servers under one private folder; a context manager that yields their URLs.

    Args:
        data_dir: The folder that holds everything: data, logs, credentials. Made with mode 0700.
        start_database: Whether to run PostgreSQL.
        start_broker: Whether to run Valkey.
        start_storage: Whether to run SeaweedFS.
        durable: False for tests, whose data is small and thrown away: what is written survives a crash of a server,
            but not one of the machine, and PostgreSQL runs no autovacuum.
    """

    def __init__(
        self,
        data_dir: Path,
        *,
        start_database: bool = True,
        start_broker: bool = True,
        start_storage: bool = True,
        durable: bool = True,
    ) -> None:
        self.data_dir = data_dir.expanduser().resolve()
        self._wanted: list[type[Server]] = [
            *([Postgres] if start_database else []),
            *([Valkey] if start_broker else []),
            *([SeaweedFS] if start_storage else []),
        ]
        self._durable = durable
        self._servers: dict[str, Server] = {}
        self._ports: dict[str, int] = {}
        self._processes: dict[str, ProcessIdentity] = {}
        self._secrets: Mapping[str, str] = {}
        self._lock: IO[str] | None = None
        self._recording = threading.Lock()

    def start(self) -> LocalUrls:
        """Start the servers beside each other and return when all answer.

        Raises:
            LocalServerError: One did not start, or another process uses this folder; none is left running.
        """
        self.data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.data_dir.chmod(0o700)
        self._take_lock()
        try:
            self._secrets = self._read_secrets()
            self._ports, left_over = self._read_state()
            kill_and_wait(left_over)
            self._servers = {
                kind.name: kind(self.data_dir / kind.name, self._secrets, durable=self._durable)
                for kind in self._wanted
            }
            with ThreadPoolExecutor(len(self._servers) or 1) as pool:
                for outcome in [pool.submit(self._start_server, name) for name in self._servers]:
                    outcome.result()
        except BaseException:
            self.stop()
            raise
        return self.urls

    def stop(self) -> None:
        """Stop the servers in reverse order; nothing happens if none runs."""
        for server in reversed(self._servers.values()):
            server.stop()
        if self._servers:
            self._processes.clear()
            self._record()
        self._servers = {}
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> LocalUrls:
        return self.start()

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def urls(self) -> LocalUrls:
        """Where the servers are."""
        fields: dict[str, str] = {}
        if isinstance(database := self._servers.get(Postgres.name), Postgres):
            fields["database_url"] = database.url()
        if isinstance(broker := self._servers.get(Valkey.name), Valkey):
            fields["broker_url"] = broker.url()
        if isinstance(storage := self._servers.get(SeaweedFS.name), SeaweedFS):
            fields["s3_endpoint_url"] = storage.url()
            fields["s3_access_key"] = self._secrets["s3_access_key"]
            fields["s3_secret_key"] = self._secrets["s3_secret_key"]
        return LocalUrls(**fields)

    @property
    def ports(self) -> Mapping[str, int]:
        """The loopback ports in use, by name."""
        return dict(self._ports)

    @property
    def pids(self) -> dict[str, int]:
        """The process ids of the running servers (`postgres`, `valkey`, `seaweedfs`), for fault tests."""
        return {name: identity.pid for name, identity in self._processes.items() if identity.alive()}

    def kill_server(self, name: str) -> None:
        """Kill one server with SIGKILL and leave it down; `start_server` brings it back."""
        self._servers[name].kill()

    def stop_server(self, name: str) -> None:
        """Stop one server in order and leave it down; `start_server` brings it back."""
        self._servers[name].stop()

    def start_server(self, name: str) -> None:
        """Start one stopped, killed or crashed server again, at the same URL."""
        self._servers[name].stop()  # reaps the guardian of a crashed one
        self._start_server(name, same_ports=True)

    def restart_postgres(self, *, kill: bool = False) -> None:
        """Restart PostgreSQL at the same URL; `kill` makes it a crash."""
        self._restart(Postgres.name, kill)

    def restart_valkey(self, *, kill: bool = False) -> None:
        """Restart Valkey at the same URL; `kill` makes it a crash."""
        self._restart(Valkey.name, kill)

    def restart_seaweedfs(self, *, kill: bool = False) -> None:
        """Restart SeaweedFS at the same URL; `kill` makes it a crash."""
        self._restart(SeaweedFS.name, kill)

    def _restart(self, name: str, kill: bool) -> None:
        if kill:
            self.kill_server(name)
        self.start_server(name)

    def _start_server(self, name: str, *, same_ports: bool = False) -> None:
        server = self._servers[name]
        for attempt in range(1, _ATTEMPTS + 1):
            with self._recording:
                if not same_ports:
                    self._ports |= pick_ports(server, self._ports)
            ports = {port_name: self._ports[port_name] for port_name in server.port_names}
            try:
                self._processes[name] = server.start(ports)
            except LocalServerError:
                if same_ports or attempt == _ATTEMPTS or all(server.usable(port) for port in ports.values()):
                    raise  # not for a port
            else:
                self._record()
                return

    def _take_lock(self) -> None:
        """Hold the folder: the kernel lets go of this lock however we end."""
        if self._lock is not None:
            raise LocalServerError("This stack is already started.")
        lock = open(os.open(self.data_dir / "lock", os.O_RDWR | os.O_CREAT, 0o600), "w")  # noqa: SIM115 - until stop
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise LocalServerError(f"Another forgetd is running in {self.data_dir}.") from None
        self._lock = lock

    def _read_secrets(self) -> Mapping[str, str]:
        """Return the credentials of this folder, made at its first start."""
        path = self.data_dir / "credentials.json"
        known: dict[str, str] = json.loads(path.read_text()) if path.exists() else {}
        missing = {name: secrets.token_hex(20) for name in _SECRETS if name not in known}
        if missing:
            _write_private(path, json.dumps(known | missing, indent=2))
        return known | missing

    def _read_state(self) -> tuple[dict[str, int], list[ProcessIdentity]]:
        """Return the recorded ports, and the processes of a run that was killed before it could stop them."""
        state: dict[str, Any] = {}
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            state = json.loads((self.data_dir / "state.json").read_text())
        processes = [ProcessIdentity(item["pid"], item["mark"]) for item in state.get("processes", {}).values()]
        return dict(state.get("ports", {})), processes

    def _record(self) -> None:
        with self._recording:
            processes = {name: {"pid": item.pid, "mark": item.mark} for name, item in self._processes.items()}
            _write_private(
                self.data_dir / "state.json", json.dumps({"ports": self._ports, "processes": processes}, indent=2)
            )


def _write_private(path: Path, text: str) -> None:
    """Replace the file in one step, readable by us alone."""
    fresh = path.with_name(f"{path.name}.new")
    with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    fresh.replace(path)
