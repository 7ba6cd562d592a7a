"""The outermost layer: bodies are counted as they come, defects are answered without a leak, defaults are set."""

from __future__ import annotations

import asyncio
import logging
import secrets
import traceback

import anyio
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.problems import ended, respond
from services.errors import Internal, TooLarge

__all__ = ["Edge", "PathOnly"]

STREAMED = frozenset(
    {("POST", "/checkpoints"), ("POST", "/classifiers"), ("POST", "/image-sets")}
)  # these count for themselves
# Of a body that was refused unread, so much is taken in before the answer: a close with bytes unread is a reset, which
# can destroy the answer on its way.
DRAIN_BYTES = 2**20
DRAIN_SECONDS = 1.0
DEFAULTS = ((b"x-content-type-options", b"nosniff"), (b"cache-control", b"no-store"))
logger = logging.getLogger("forgetd.api")


class Edge:
    """ASGI middleware around everything."""

    def __init__(self, app: ASGIApp, max_json_bytes: int) -> None:
        self.app = app
        self.max_json_bytes = max_json_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(scope, receive, send, self._limit(scope))
        if exchange.limit is not None and exchange.announced > exchange.limit:
            refusal = TooLarge(f"This path takes at most {exchange.limit} bytes.", limit=exchange.limit)
            await respond(refusal)(scope, receive, exchange.send)
            return
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:
            # The server ends, and has waited for this answer as long as it waits. By itself it would say 500.
            if not exchange.started:
                await ended(scope["method"])(scope, receive, exchange.send)
            raise
        except Exception as error:
            reference = secrets.token_hex(8)
            _log(reference, scope, error)
            if exchange.started:
                raise ConnectionAbortedError(f"the answer was cut short: reference {reference}") from None
            problem = Internal("The operator finds more in the log under this reference.", reference=reference)
            await respond(problem)(scope, receive, exchange.send)

    def _limit(self, scope: Scope) -> int | None:
        return None if (scope["method"], scope["path"]) in STREAMED else self.max_json_bytes


class _Exchange:
    """One request: how much came in, and whether an answer began."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int | None) -> None:
        self._receive, self._send = receive, send
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        self.announced = int(length) if length.isdigit() else 0
        self.limit = limit
        self.received = 0
        self.unread = self.announced > 0 or b"transfer-encoding" in headers
        self._withheld = b"expect" in headers  # the caller sends the body only if it is asked for
        self.started = False

    async def receive(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self.received += len(message.get("body", b""))
            self.unread = message.get("more_body", False)
            if self.limit is not None and self.received > self.limit:
                raise HTTPException(TooLarge.status)  # the one kind of error that passes FastAPI's body parsing
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            await self._drain()
            headers = list(message["headers"])
            said = {name for name, _ in headers}
            headers += [default for default in DEFAULTS if default[0] not in said]
            if self.unread:
                headers.append((b"connection", b"close"))  # else the server would go on reading what was refused
            message = {**message, "headers": headers}
        await self._send(message)

    async def _drain(self) -> None:
        if not self.unread or self._withheld or self.announced > DRAIN_BYTES:
            return
        taken = 0
        with anyio.move_on_after(DRAIN_SECONDS):
            while self.unread and taken <= DRAIN_BYTES:
                message = await self._receive()
                if message["type"] != "http.request":
                    return
                taken += len(message.get("body", b""))
                self.unread = message.get("more_body", False)


class PathOnly(logging.Filter):
    """Drops the query from the server's access lines: it may hold a name that a caller gave."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep the record, shortened."""
        if isinstance(record.args, tuple) and len(record.args) == 5:
            client, method, path, *rest = record.args
            record.args = (client, method, str(path).partition("?")[0], *rest)
        return True


def _log(reference: str, scope: Scope, error: BaseException) -> None:
    """Where it happened, never what it said: messages may quote what a caller sent."""
    route = getattr(scope.get("route"), "path", "unknown path")
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("reference %s: %s in %s %s\n%s", reference, type(error).__name__, scope["method"], route, frames)
