"""Traces: nothing without a collector, bounded with one that is away, and what is sent to one that is there."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic import SecretStr

from services.settings import Settings
from services.tracing import TracingNotInstalled, open_tracing, well_formed
from tests.collector import Collector

ROOT = Path(__file__).resolve().parents[2]
PARENT = f"00-{'a' * 32}-{'b' * 16}-01"


def settings(endpoint: str | None) -> Settings:
    """Settings of a process that connects to nothing but a collector."""
    nothing = SecretStr("postgresql+psycopg://nobody:x@127.0.0.1:9/none")
    return Settings(database_url=nothing, broker_url=SecretStr("redis://127.0.0.1:9/0"), otlp_endpoint=endpoint)


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.mark.parametrize(
    ("header", "good"),
    [
        (PARENT, True),
        (PARENT.replace("-01", "-00"), True),
        (PARENT.upper(), False),
        (f"00-{'0' * 32}-{'b' * 16}-01", False),
        (f"00-{'a' * 32}-{'0' * 16}-01", False),
        (f"ff-{'a' * 32}-{'b' * 16}-01", False),
        (PARENT + "-x", False),
        ("", False),
    ],
)
def test_a_traceparent_is_taken_only_as_the_standard_writes_it(header: str, good: bool) -> None:
    assert well_formed(header) == good


def test_without_a_collector_a_callers_span_is_passed_on_and_nothing_is_loaded() -> None:
    code = (
        "import sys\nfrom tests.services.test_tracing import PARENT, settings\n"
        "from services.tracing import open_tracing\n"
        "span = open_tracing(settings(None), 'x', instance='y').begin('job', parent=PARENT)\n"
        "sys.exit(span.traceparent != PARENT or 'opentelemetry.sdk' in sys.modules)"
    )

    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)

    assert done.returncode == 0


def test_what_is_missing_for_traces_is_named_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)

    with pytest.raises(TracingNotInstalled, match=r'pip install "forgetd\[otel\]"'):
        open_tracing(settings("http://127.0.0.1:9"), "forgetd-worker", instance="one")


def test_an_attempt_is_part_of_its_callers_trace_and_its_phases_of_it(collector: Collector) -> None:
    tracing = open_tracing(settings(collector.url), "forgetd-worker", instance="one")
    span = tracing.begin("job", parent=PARENT)
    begun = time.time_ns()
    span.child("unlearning", begun, {"forgetd.phase": "unlearning"})
    told = span.traceparent
    span.end("job", {"forgetd.attempt": 2}, failed=True)

    tracing.close()

    spans = {sent.name: sent for sent in collector.spans}
    job, phase = spans["job"], spans["unlearning"]
    assert job.trace_id.hex() == phase.trace_id.hex() == "a" * 32
    assert job.parent_span_id.hex() == "b" * 16
    assert phase.parent_span_id == job.span_id
    assert told == f"00-{'a' * 32}-{job.span_id.hex()}-01"
    assert phase.start_time_unix_nano == begun <= phase.end_time_unix_nano
    assert collector.attributes(job) == {"forgetd.attempt": 2}
    assert job.status.code == 2  # ERROR
    assert collector.services == {"forgetd-worker"}


def test_a_caller_who_does_not_sample_is_not_recorded(collector: Collector) -> None:
    tracing = open_tracing(settings(collector.url), "forgetd-worker", instance="one")

    tracing.begin("job", parent=PARENT.replace("-01", "-00")).end("job", {})
    tracing.close()

    assert collector.spans == []


def test_a_collector_that_hangs_slows_nobody_and_holds_up_no_exit() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=1) as mute:  # takes connections and says nothing
        tracing = open_tracing(settings(f"http://127.0.0.1:{mute.getsockname()[1]}"), "forgetd-worker", instance="one")
        threads = threading.active_count()
        began = time.monotonic()
        for _ in range(10_000):
            tracing.begin("request").end("GET /healthz", {"http.response.status_code": 200})
        worked = time.monotonic() - began
        tracing.close()
        left = time.monotonic() - began - worked

    assert worked < 5
    assert left < 5
    assert threading.active_count() <= threads + 1
