"""A relay in front of the object store: it sees every request before the store does, and may answer in its place."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from urllib.parse import urlsplit

METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")


class StoreRelay:
    """Relays bytes. ``asked`` is called with the head of each request; what it returns is sent instead of an answer,
    and the connection ends."""

    def __init__(self, endpoint_url: str) -> None:
        parts = urlsplit(endpoint_url)
        self._target = (str(parts.hostname), int(parts.port or 80))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.asked: Callable[[bytes], bytes | None] = lambda _: None
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                store = socket.create_connection(self._target)
                for relay in (self._forward, self._back):
                    threading.Thread(target=relay, args=(client, store), daemon=True).start()

    def _forward(self, client: socket.socket, store: socket.socket) -> None:
        with suppress(OSError):
            while data := client.recv(65536):
                if data.startswith(METHODS) and (answer := self.asked(data)) is not None:
                    client.sendall(answer)
                    break
                store.sendall(data)
        _hang_up(client, store)

    def _back(self, client: socket.socket, store: socket.socket) -> None:
        with suppress(OSError):
            while data := store.recv(65536):
                client.sendall(data)
        _hang_up(client, store)


def _hang_up(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()
