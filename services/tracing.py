"""Traces of requests, attempts and phases for an OpenTelemetry collector, where one is named; else nothing at all.

The trace of a POST is kept with its job, so that every attempt at it, on whichever host, belongs to its caller's trace.
Spans wait in a bounded queue and leave from a thread of their own: a collector that is away slows nothing and loses
spans, not jobs.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Protocol

from services.settings import Settings

if TYPE_CHECKING:
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as Recording
    from opentelemetry.trace import Tracer

__all__ = [
    "Span",
    "Tracing",
    "TracingNotInstalled",
    "current",
    "forget_current",
    "open_tracing",
    "set_current",
    "well_formed",
]

TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")
WAITING_SPANS = 2048
BATCH_SPANS = 512
SEND_SECONDS = 5.0
EVERY_MILLISECONDS = 2000
LEAVE_SECONDS = 3.0

Attributes = Mapping[str, str | int | float]

_current: ContextVar[str | None] = ContextVar("forgetd_traceparent", default=None)


class TracingNotInstalled(RuntimeError):
    """A collector is named, and what talks to it is not installed."""


class Span(Protocol):
    """Something that takes its time. ``traceparent`` names it to others (W3C Trace Context)."""

    @property
    def traceparent(self) -> str | None:
        """Its name, or that of the caller's span where nothing is recorded."""

    def child(self, name: str, begun: int, attributes: Attributes) -> None:
        """A part of it that is over: it began at ``begun`` (``time.time_ns``) and ends now."""

    def end(self, name: str, attributes: Attributes, *, failed: bool = False) -> None:
        """It is over, and this is what it turned out to be."""


class Tracing:
    """Records nothing: the traceparent of a caller is passed on as it came."""

    recording = False

    def begin(self, name: str, *, parent: str | None = None, server: bool = False) -> Span:
        """Something begins, on behalf of the span that the traceparent names."""
        del name, server
        return _Nothing(parent)

    def past(self, name: str, begun: int, attributes: Attributes) -> None:
        """Something of its own that is over: it began at ``begun`` (``time.time_ns``) and ends now."""

    def close(self) -> None:
        """Send what waits, within some seconds."""


class _Nothing:
    def __init__(self, traceparent: str | None) -> None:
        self._traceparent = traceparent

    @property
    def traceparent(self) -> str | None:
        return self._traceparent

    def child(self, name: str, begun: int, attributes: Attributes) -> None:
        del name, begun, attributes

    def end(self, name: str, attributes: Attributes, *, failed: bool = False) -> None:
        del name, attributes, failed


class _Recorded:
    def __init__(self, tracer: Tracer, span: Recording) -> None:
        self._tracer, self._span = tracer, span

    @property
    def traceparent(self) -> str | None:
        told = self._span.get_span_context()
        return f"00-{told.trace_id:032x}-{told.span_id:016x}-{told.trace_flags:02x}"

    def child(self, name: str, begun: int, attributes: Attributes) -> None:
        from opentelemetry.trace import set_span_in_context

        part = self._tracer.start_span(
            name, set_span_in_context(self._span), start_time=begun, attributes=dict(attributes)
        )
        part.end()

    def end(self, name: str, attributes: Attributes, *, failed: bool = False) -> None:
        from opentelemetry.trace import StatusCode

        self._span.update_name(name)
        self._span.set_attributes(dict(attributes))
        if failed:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class _Collected(Tracing):
    recording = True

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("forgetd")

    def begin(self, name: str, *, parent: str | None = None, server: bool = False) -> Span:
        from opentelemetry.trace import SpanKind

        kind = SpanKind.SERVER if server else SpanKind.INTERNAL
        return _Recorded(self._tracer, self._tracer.start_span(name, _context(parent), kind=kind))

    def past(self, name: str, begun: int, attributes: Attributes) -> None:
        span = self._tracer.start_span(name, _context(None), start_time=begun, attributes=dict(attributes))
        span.end()

    def close(self) -> None:
        # In a thread that may be left behind: what is being sent to a collector that hangs must not hold up an exit.
        leaving = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        leaving.start()
        leaving.join(LEAVE_SECONDS)


def _context(parent: str | None) -> Context:
    """What a span is part of: never anything that this process's own context says."""
    from opentelemetry.context import Context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    empty = Context()
    return empty if parent is None else TraceContextTextMapPropagator().extract({"traceparent": parent}, empty)


def open_tracing(settings: Settings, service: str, *, instance: str) -> Tracing:
    """Tracing to the collector of the settings; without one, nothing is loaded and nothing recorded.

    Args:
        settings: ``otlp_endpoint`` is the collector (OTLP over HTTP).
        service: what the process is called: ``forgetd-gateway``, ``forgetd-control``, ``forgetd-worker``.
        instance: which one it is.

    Raises:
        TracingNotInstalled: a collector is named, and the packages are not there.
    """
    if settings.otlp_endpoint is None:
        return Tracing()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        told = 'FORGETD_OTLP_ENDPOINT is set, and traces need: pip install "forgetd[otel]"'
        raise TracingNotInstalled(told) from error
    resource = Resource({"service.name": service, "service.instance.id": instance, "telemetry.sdk.language": "python"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    endpoint = f"{settings.otlp_endpoint.rstrip('/').removesuffix('/v1/traces')}/v1/traces"
    waiting: Any = BatchSpanProcessor(
        OTLPSpanExporter(endpoint=endpoint, timeout=SEND_SECONDS),
        max_queue_size=WAITING_SPANS,
        max_export_batch_size=BATCH_SPANS,
        schedule_delay_millis=EVERY_MILLISECONDS,
    )
    provider.add_span_processor(waiting)
    return _Collected(provider)


def well_formed(traceparent: str) -> bool:
    """Whether a header is a traceparent of W3C Trace Context, version 00."""
    return TRACEPARENT.fullmatch(traceparent) is not None


def current() -> str | None:
    """The span on whose behalf this code runs, where there is one."""
    return _current.get()


def set_current(traceparent: str | None) -> Token[str | None]:
    """From here on this code runs on behalf of that span."""
    return _current.set(traceparent)


def forget_current(token: Token[str | None]) -> None:
    """Back to the span before."""
    _current.reset(token)
