"""A TCP proxy in front of PostgreSQL that can lose the reply to a COMMIT: the worst moment for a connection to die."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress


class CommitLosingProxy:
    """Relays bytes. After ``lose_commit_after(mark)``, the first COMMIT of a connection whose statements contained the
    mark reaches the server, and its reply reaches nobody."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._mark: bytes | None = None
        self.lost = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_commit_after(self, mark: bytes) -> None:
        """Arm the trap."""
        self._mark = mark

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                trapped = threading.Event()
                for relay, ends in ((self._forward, (client, server)), (self._back, (server, client))):
                    threading.Thread(target=relay, args=(*ends, trapped), daemon=True).start()

    def _forward(self, client: socket.socket, server: socket.socket, trapped: threading.Event) -> None:
        seen = False
        with suppress(OSError):
            while data := client.recv(65536):
                seen = seen or (self._mark is not None and self._mark in data)
                if seen and b"COMMIT" in data:
                    self._mark, seen = None, False
                    trapped.set()
                server.sendall(data)
        _hang_up(client, server)

    def _back(self, server: socket.socket, client: socket.socket, trapped: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                if trapped.is_set():
                    break
                client.sendall(data)
        if trapped.is_set():
            self.lost.set()
        _hang_up(client, server)


def _hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
