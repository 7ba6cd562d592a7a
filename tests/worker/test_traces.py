"""One trace from a caller's POST to the last phase of its job, across processes; and its ids in the log."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient

from api.app import create_app
from services.logs import JsonFormatter
from services.settings import Settings
from services.tenancy import NewKey
from services.tracing import open_tracing
from tests.collector import Collector
from tests.worker.helpers import Jobs
from worker.supervisor import Supervisor

PARENT = f"00-{'a' * 32}-{'b' * 16}-01"
CANARY = "Ada-Lovelace-51.5074N"


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture
def traced(settings: Settings, collector: Collector) -> Settings:
    return settings.model_copy(update={"otlp_endpoint": collector.url})


@pytest.fixture
def post(jobs: Jobs, api_key: NewKey) -> Callable[..., str]:
    """Posts a job to a gateway of these settings; gives its id."""

    def ask(settings: Settings, **headers: str) -> str:
        body = {
            "checkpoint": jobs.checkpoint_id,
            "target": {"images": jobs.image_set()},
            "metadata": {"subject": CANARY},
        }
        with TestClient(create_app(settings)) as client:
            key = {"Authorization": f"Bearer {api_key.secret}"}
            answer = client.post("/jobs/forget", json=body, headers=key | headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    return ask


def test_a_job_belongs_to_the_trace_of_its_post_to_the_last_phase(
    traced: Settings,
    collector: Collector,
    post: Callable[..., str],
    make_supervisor: Callable[..., Supervisor],
    jobs: Jobs,
) -> None:
    job_id = post(traced, traceparent=PARENT)
    tracing = open_tracing(traced, "forgetd-worker", instance="one")

    make_supervisor(tracing=tracing).run(job_id)
    tracing.close()

    spans = {span.name: span for span in collector.spans}
    request, attempt = spans["POST /jobs/forget"], spans["job"]
    assert {span.trace_id.hex() for span in spans.values()} == {"a" * 32}
    assert request.parent_span_id.hex() == "b" * 16
    assert attempt.parent_span_id == request.span_id
    phases = [span for span in collector.spans if span.parent_span_id == attempt.span_id]
    assert phases[0].name == "validating"
    assert all(attempt.start_time_unix_nano <= span.start_time_unix_nano for span in phases)
    facts = collector.attributes(attempt)
    row = jobs.row(job_id)
    assert facts == {
        "forgetd.job": job_id,
        "forgetd.attempt": 1,
        "forgetd.token": row.fencing_token,
        "forgetd.queue": "gpu.flow",
        "forgetd.kind": "forget",
        "forgetd.method": "flow-taming",
        "forgetd.outcome": facts["forgetd.outcome"],
    }
    assert collector.services == {"forgetd-gateway", "forgetd-worker"}
    assert not any(CANARY.encode() in request.SerializeToString() for request in collector.requests)
    assert not any(jobs.tenant_id.encode() in request.SerializeToString() for request in collector.requests)


@pytest.mark.parametrize("sent", [{}, {"traceparent": "odd"}, {"traceparent": PARENT}])
def test_without_a_collector_a_job_keeps_the_trace_that_its_caller_named(
    settings: Settings, post: Callable[..., str], jobs: Jobs, sent: dict[str, str]
) -> None:
    job_id = post(settings, **sent)

    assert jobs.row(job_id).traceparent == (PARENT if sent.get("traceparent") == PARENT else None)


def test_a_collector_that_is_away_costs_no_job(
    settings: Settings, make_supervisor: Callable[..., Supervisor], jobs: Jobs
) -> None:
    nobody = settings.model_copy(update={"otlp_endpoint": "http://127.0.0.1:9"})
    tracing = open_tracing(nobody, "forgetd-worker", instance="one")

    outcome = make_supervisor(tracing=tracing).run(jobs.queue(steps=2))
    tracing.close()

    assert outcome == "succeeded"


class Records(logging.Handler):
    """Formats records where they are made, as the handler of a process does."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.told: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(json.loads(self.format(record)))


@pytest.fixture
def records() -> Iterator[list[dict[str, Any]]]:
    handler, rooms = Records(), logging.getLogger("worker")
    level = rooms.level
    rooms.addHandler(handler)
    rooms.setLevel(logging.INFO)
    yield handler.told
    rooms.removeHandler(handler)
    rooms.setLevel(level)


def test_every_record_of_an_attempt_says_whose_it_is_in_its_threads_too(
    records: list[dict[str, Any]], supervisor: Supervisor, jobs: Jobs
) -> None:
    job_id = jobs.queue(steps=6, assets={"a": "1"}, odd_loss="\\u0000")

    supervisor.run(job_id)

    row = jobs.row(job_id)
    facts = {"job": job_id, "attempt": 1, "token": row.fencing_token, "worker": "worker-1"}
    loggers = {told["logger"] for told in records}
    assert [told for told in records if {name: told.get(name) for name in facts} != facts] == []
    assert loggers >= {"worker.supervisor", "worker.lease", "worker.assets"}
