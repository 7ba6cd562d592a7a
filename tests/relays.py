"""TCP relays in front of the real servers, which lose what a network and a store lose. All in one thread.

A `Relay` passes bytes on until it is told to be a broken cable. The database's can lose a COMMIT or its reply, the
store's refuses, crawls, cuts answers short, or is gone, and another asks the test what to answer.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

__all__ = [
    "AskingRelay",
    "Connection",
    "DatabaseRelay",
    "LosingRelay",
    "Relay",
    "RelayThread",
    "StoreRelay",
    "Weather",
    "relaying",
]

CHUNK = 65536
Weather = Literal["fair", "refusing", "slow", "crawling", "truncating", "gone"]
Commit = Literal["commit lost", "reply lost"]
METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
UNAVAILABLE = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class RelayThread:
    """The event loop that all relays share; a context manager."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="relays", daemon=True)

    def __enter__(self) -> RelayThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.run(_end_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Do it in the loop and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    def call(self, work: Callable[[], object]) -> None:
        """Do it in the loop soon."""
        self.loop.call_soon_threadsafe(work)


async def _end_all() -> None:
    """Cancel what is still relaying."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


class Connection:
    """A client's connection and ours to the server behind it."""

    def __init__(self, near: asyncio.StreamWriter, far: asyncio.StreamWriter) -> None:
        self.near, self.far = near, far
        self.answering = True  # the last bytes came from the server: what a client sends next begins a request
        self.passed = 0  # bytes of the present answer
        self.marked = self.trapped = False

    def abort(self) -> None:
        """Reset both ends."""
        for writer in (self.near, self.far):
            writer.transport.abort()


class Relay:
    """Passes bytes both ways between ``port`` on loopback and a server's port."""

    def __init__(self, thread: RelayThread, target: int, *, host: str = "127.0.0.1", listen: str = "127.0.0.1") -> None:
        self._thread, self._host, self._target = thread, host, target
        self._connections: set[Connection] = set()
        self._mute = False
        self._whole = asyncio.Event()  # cleared: the cable is out, connections hang and nobody is told
        thread.call(self._whole.set)
        self._server: asyncio.Server = thread.run(asyncio.start_server(self._serve, listen, 0))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def instead_of(self, url: str) -> str:
        """The server's address, with the relay for the server."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    def cut(self) -> None:
        """Pull the cable: nothing passes, nothing is refused, nobody is told."""
        self._thread.call(self._whole.clear)

    def mend(self) -> None:
        """Put it back; connections that waited go on where they were."""
        self._thread.call(self._whole.set)

    def mute(self) -> None:
        """Take what clients send, and answer nothing any more: a peer that lives and does not do its work."""
        self._mute = True

    def close(self) -> None:
        """Take no more connections and reset those there are."""
        self._thread.call(self._server.close)
        self._thread.call(self.reset)

    def reset(self) -> None:
        """Reset every connection; in the loop's thread."""
        for connection in list(self._connections):
            connection.abort()

    async def _serve(self, reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            await self._whole.wait()
        if not (self._whole.is_set() and self.admits()):
            near.transport.abort()
            return
        try:
            behind, far = await asyncio.open_connection(self._host, self._target)
        except OSError:
            near.transport.abort()
            return
        connection = Connection(near, far)
        self._connections.add(connection)
        try:
            await asyncio.gather(
                self._pass(reader, far, connection, self.forward), self._pass(behind, near, connection, self.back)
            )
        except (OSError, asyncio.CancelledError):  # the latter at the end of the thread alone
            connection.abort()
        finally:
            self._connections.discard(connection)
            near.close()
            far.close()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        connection: Connection,
        through: Callable[[bytes, Connection], Coroutine[Any, Any, bytes | None]],
    ) -> None:
        while data := await reader.read(CHUNK):
            await self._whole.wait()
            if self._mute:
                continue
            passed = await through(data, connection)
            if passed is None:
                connection.abort()
                return
            writer.write(passed)
            await writer.drain()
        with suppress(OSError, RuntimeError):
            if writer.can_write_eof():
                writer.write_eof()

    # What the faults are made of.

    def admits(self) -> bool:
        """Whether a new connection is taken."""
        return True

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        """What of a client's bytes reaches the server; None: the connection is reset."""
        del connection
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        """What of a server's bytes reaches the client; None: the connection is reset."""
        del connection
        return data


class DatabaseRelay(Relay):
    """Can lose a COMMIT on its way there, or its reply on the way back, so that nobody knows what became of it."""

    _trap: tuple[Commit, Callable[[], object], bytes] | None = None

    def trap(self, kind: Commit, then: Callable[[], object] = lambda: None, *, after: bytes = b"") -> None:
        """Do it to the next COMMIT of anybody who has sent ``after`` before, once.

        ``then`` is called in the loop's thread as it happens.
        """
        self._trap = (kind, then, after)

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        if self._trap is None:
            return data
        connection.marked = connection.marked or self._trap[2] in data
        if connection.marked and b"COMMIT" in data:
            (kind, then, _), self._trap = self._trap, None
            then()
            if kind == "commit lost":
                return None
            connection.trapped = True
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        return None if connection.trapped else data


class StoreRelay(Relay):
    """Understands as much of HTTP as it takes to answer 503 for the store and to end answers early."""

    def __init__(self, thread: RelayThread, target: int, seed: int) -> None:
        super().__init__(thread, target)
        self._draw = random.Random(seed)
        self._weather: Weather = "fair"

    def turn(self, weather: Weather) -> None:
        """From now on."""
        self._weather = weather
        if weather == "gone":
            self._thread.call(self.reset)

    def admits(self) -> bool:
        return self._weather != "gone"

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        begins, connection.answering = connection.answering, False
        if begins and self._weather == "refusing" and self._draw.random() < 0.7:
            connection.near.write(UNAVAILABLE)
            with suppress(OSError):
                await connection.near.drain()
                await asyncio.sleep(0.05)  # so that the answer is read before the reset
            return None
        connection.passed = 0
        if self._weather == "slow":
            await asyncio.sleep(self._draw.uniform(0.1, 1.0))
        return data

    async def back(self, data: bytes, connection: Connection) -> bytes | None:
        connection.answering = True
        if self._weather == "crawling":
            await asyncio.sleep(0.1)  # for each of at most 64 KiB
        if self._weather == "truncating" and self._draw.random() < 0.5:
            connection.near.write(data[: self._draw.randrange(len(data))])
            with suppress(OSError):
                await connection.near.drain()
            return None
        return data


class AskingRelay(Relay):
    """Calls ``asked`` with the head of each request to an HTTP server; what it returns is the answer, and then the end.

    In the loop's thread: what it takes its time for, everybody waits for.
    """

    asked: Callable[[bytes], bytes | None] = staticmethod(lambda _: None)

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        if not data.startswith(METHODS) or (answer := self.asked(data)) is None:
            return data
        connection.near.write(answer)
        return None


class LosingRelay(Relay):
    """A proxy that takes what it is sent, after it lost the server behind it, and says so to nobody."""

    _lost: frozenset[Connection] = frozenset()
    silent = False  # all of it, new connections too

    def lose(self) -> None:
        """The server behind every connection that there is; new ones find another."""
        self._lost = frozenset(self._connections)

    async def forward(self, data: bytes, connection: Connection) -> bytes | None:
        return b"" if self.silent or connection in self._lost else data


AnyRelay = TypeVar("AnyRelay", bound=Relay)


@contextmanager
def relaying(kind: type[AnyRelay], url: str, **more: Any) -> Iterator[AnyRelay]:
    """A relay of this kind before the server at that address, in a thread of its own; all of it ends with the block."""
    with RelayThread() as thread:
        relay = kind(thread, urlsplit(url).port or 0, **more)
        try:
            yield relay
        finally:
            relay.close()
