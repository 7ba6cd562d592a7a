"""What a request leaves behind: an id, one line in the log, a count, and where traces are collected a span.

Routes are told by their template, callers not at all: no path, no query and no body gets into any of it.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import tracing
from services.logs import forget_about, set_about
from services.metrics import Metrics
from services.tracing import Tracing

__all__ = ["Observed"]

REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
NO_ROUTE = "none"
GONE = 499  # the caller left before an answer began

access = logging.getLogger("forgetd.access")


class Observed:
    """ASGI middleware around everything, the edge included."""

    def __init__(self, app: ASGIApp, metrics: Metrics, tracing: Tracing) -> None:
        self.app = app
        self._metrics, self._tracing = metrics, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(scope, send)
        span = self._tracing.begin("request", parent=request.parent, server=True)
        subject, current = set_about(request.fields), tracing.set_current(span.traceparent)
        began = time.perf_counter()
        try:
            await self.app(scope, receive, request.send)
        finally:
            seconds = time.perf_counter() - began
            method, route, status = scope["method"], request.route, request.status
            self._metrics.request(method, route, status, seconds)
            if access.isEnabledFor(logging.INFO):
                _write(method, route, status, round(1000 * seconds, 1))
            if self._tracing.recording:
                told = {"http.request.method": method, "http.route": route, "http.response.status_code": status}
                span.end(f"{method} {route}", told, failed=status >= 500)
            tracing.forget_current(current)
            forget_about(subject)


class _Request:
    """One request, as far as it may be told of."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope, self._send = scope, send
        self.status = GONE
        self.parent: str | None = None
        self.id = b""
        for name, value in scope["headers"]:
            if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
                self.id = value
            elif name == b"traceparent" and tracing.well_formed(told := value.decode("latin-1")):
                self.parent = told
        if not self.id:
            self.id = b"%016x" % random.getrandbits(64)  # no secret, and no call of the kernel

    @property
    def route(self) -> str:
        """The template, once the request is routed; ``none`` before, and for a path that is none of ours."""
        return getattr(self._scope.get("route"), "path", NO_ROUTE)

    def fields(self) -> Mapping[str, object]:
        """For the log."""
        return {"request": self.id.decode("ascii"), "route": self.route}

    async def send(self, message: Message) -> None:
        """Pass the answer on, with the request's id."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message = {**message, "headers": [*message["headers"], (b"x-request-id", self.id)]}
        await self._send(message)


def _write(method: str, route: str, status: int, ms: float) -> None:
    """The access line; without the search for the place in the code that it comes from, which is always this one."""
    record = logging.LogRecord(
        access.name, logging.INFO, __file__, 0, "%s %s %d %.1f ms", (method, route, status, ms), None
    )
    record.facts = {"method": method, "route": route, "status": status, "ms": ms}
    access.handle(record)
