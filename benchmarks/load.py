"""Callers that cost little: HTTP/1.1 over kept connections, as many at once as there are connections."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

__all__ = ["Load", "at_a_rate", "flood", "request"]

HEAD_END = b"\r\n\r\n"
PATIENCE_SECONDS = 60.0  # after the last request, for a server that stopped answering


def request(method: str, url: str, headers: dict[str, str] | None = None, body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    parts = urlsplit(url)
    lines = {"Host": parts.netloc, "Accept": "application/json", **(headers or {})}
    if body:
        lines |= {"Content-Type": "application/json", "Content-Length": str(len(body))}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"{method} {parts.path} HTTP/1.1\r\n{head}\r\n".encode() + body


@dataclass
class Load:
    """What callers saw: how many answers of each status in how long, and how long each took (seconds)."""

    seconds: float = 0.0
    statuses: Counter[int] = field(default_factory=Counter)
    latencies: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Answers a second."""
        return sum(self.statuses.values()) / self.seconds


class _Connection(asyncio.Protocol):
    """One connection: a request out, its answer read whole, then ``answered`` with its status."""

    def __init__(self, answered: Callable[[_Connection, int], None]) -> None:
        self._answered = answered
        self._buffer = b""
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Asyncio calls this."""
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def send(self, raw: bytes) -> None:
        """Send a request; the answer to the one before is there."""
        assert self._transport is not None
        if self._transport.is_closing():
            raise ConnectionError("the server hung up")
        self._transport.write(raw)

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Asyncio calls this."""
        self._buffer += data
        end = self._buffer.find(HEAD_END)
        if end < 0:
            return
        head = self._buffer[:end].lower()
        at = head.find(b"content-length:")
        length = int(head[at + 15 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
        if len(self._buffer) < end + len(HEAD_END) + length:
            return
        status = int(head[9:12])
        self._buffer = b""
        self._answered(self, status)


async def _connect(url: str, count: int, answered: Callable[[_Connection, int], None]) -> list[_Connection]:
    parts = urlsplit(url)
    loop = asyncio.get_running_loop()
    return [
        (await loop.create_connection(lambda: _Connection(answered), str(parts.hostname), parts.port or 80))[1]
        for _ in range(count)
    ]


async def flood(url: str, raw: bytes, *, callers: int, seconds: float) -> Load:
    """So many callers, each of which asks again as soon as it is answered.

    Raises:
        TimeoutError: A server stopped answering.
    """
    load = Load()
    over = asyncio.Event()
    began = time.perf_counter()

    def answered(connection: _Connection, status: int) -> None:
        load.statuses[status] += 1
        if time.perf_counter() - began < seconds:
            connection.send(raw)
        else:
            load.seconds = time.perf_counter() - began
            over.set()

    connections = await _connect(url, callers, answered)
    began = time.perf_counter()
    for connection in connections:
        connection.send(raw)
    try:
        await asyncio.wait_for(over.wait(), seconds + PATIENCE_SECONDS)
    finally:
        for connection in connections:
            connection.close()
    return load


async def at_a_rate(url: str, raws: Sequence[bytes], *, rate: float, callers: int) -> Load:
    """Send these requests at a fixed rate, whatever the answers take.

    A latency counts from when its request was due: one that had to wait for a free caller waited.

    Raises:
        TimeoutError: A server stopped answering.
        ConnectionError: It hung up.
    """
    load = Load()
    idle: asyncio.Queue[_Connection] = asyncio.Queue()  # in turn: a server hangs up on one that is long unused
    due_of: dict[_Connection, float] = {}
    over = asyncio.Event()

    def answered(connection: _Connection, status: int) -> None:
        load.statuses[status] += 1
        load.latencies.append(time.perf_counter() - due_of[connection])
        idle.put_nowait(connection)
        if len(load.latencies) == len(raws):
            over.set()

    connections = await _connect(url, callers, answered)
    for connection in connections:
        idle.put_nowait(connection)
    began = time.perf_counter()
    try:
        async with asyncio.timeout(len(raws) / rate + PATIENCE_SECONDS):
            for number, raw in enumerate(raws):
                due = began + number / rate
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
                connection = await idle.get()
                due_of[connection] = due
                connection.send(raw)
            await over.wait()
    finally:
        for connection in connections:
            connection.close()
    load.seconds = time.perf_counter() - began
    return load
