"""The figures of workers and control loops, as a gateway shows them that has none of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import SecretStr
from sqlalchemy import text

from api.app import create_app
from services import dispatch
from services import jobs as job_rows
from services.database import Database
from services.metrics import Metrics
from services.settings import Settings
from services.storage import ObjectStorage
from services.tenancy import Caller
from services.tracing import Tracing
from tests.worker.helpers import LONG, PATIENCE_SECONDS, Jobs, Process, eventually
from worker import control
from worker.supervisor import Supervisor


@pytest.fixture
def app(settings: Settings) -> Iterator[FastAPI]:
    app = create_app(settings)
    yield app
    app.state.database.close()


@pytest.fixture
def shown(app: FastAPI) -> Callable[[str], float]:
    """A sample of a scrape; 0 where it is not there."""

    def ask(key: str) -> float:
        lines = TestClient(app).get("/metrics").text.splitlines()
        return float(dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#")).get(key, 0))

    return ask


ATTEMPTS = 'forgetd_attempts_total{queue="gpu.flow"}'
RAN = 'forgetd_phase_seconds_count{method="flow-taming",phase="unlearning"}'


def ended(status: str, reason: str = "") -> str:
    return f'forgetd_jobs_ended_total{{kind="forget",reason="{reason}",status="{status}"}}'


def outcome(name: str) -> str:
    return f'forgetd_attempts_ended_total{{outcome="{name}"}}'


@pytest.mark.parametrize("lease_ttl_seconds", [6.0])
def test_totals_outlive_a_killed_worker_and_count_its_successor(
    jobs: Jobs,
    shown: Callable[[str], float],
    start_worker: Callable[[], Process],
    start_control: Callable[[], Process],
) -> None:
    start_control()
    first = start_worker()
    assert jobs.end(jobs.queue(steps=2)).status == "succeeded"
    eventually(lambda: shown(ended("succeeded")) == 1, what="the first worker has told of its job")
    killed = jobs.queue(**{**LONG, "steps": 200, "hurry": True})
    eventually(jobs.has_state(killed))
    seen = [shown(ATTEMPTS)]

    first.kill()
    seen.append(shown(ATTEMPTS))
    second = start_worker()
    assert jobs.end(killed).status == "succeeded"
    second.send(15)
    second.wait()
    seen.append(shown(ATTEMPTS))

    assert seen == sorted(seen)
    assert shown(ended("succeeded")) == 2
    assert eventually(lambda: shown('forgetd_lease_losses_total{cause="expired"}')) == 1
    assert shown(outcome("expired")) == 1
    assert shown(outcome("succeeded")) == 2
    assert shown("forgetd_doorbells_total") >= 3
    assert shown(RAN) >= 2


@pytest.fixture
def counted(settings: Settings) -> Iterator[tuple[Metrics, Database]]:
    metrics = Metrics()
    database = Database(settings.database_url.get_secret_value(), counted=metrics)
    yield metrics, database
    database.close()


def test_every_attempt_of_a_worker_ends_once_in_the_figures(
    counted: tuple[Metrics, Database],
    make_supervisor: Callable[..., Supervisor],
    in_background: Callable[..., Future[str]],
    settings: Settings,
    jobs: Jobs,
) -> None:
    metrics, database = counted
    supervisor = make_supervisor(database=database, metrics=metrics)
    for job_id in (
        jobs.queue(steps=1),
        jobs.queue(steps=1, outcome="criteria_not_met"),
        jobs.queue(steps=2, die_at=1),
        jobs.queue(steps=2, out_of_memory_at=1, fits_at_divisor=2),
    ):
        supervisor.run(job_id)
    taken = jobs.queue(**LONG)
    done = in_background(supervisor, taken)
    eventually(jobs.at_step(taken, 1))
    with database.transaction() as session:
        session.execute(text("UPDATE jobs SET lease_until = now() - interval '1 minute' WHERE status = 'running'"))
    control.reap(database, budget=5)
    assert done.result(PATIENCE_SECONDS) == "lost"

    samples = metrics.samples()

    outcomes = {key: value for key, value in samples.items() if key.startswith("forgetd_attempts_ended_total")}
    expected = ("succeeded", "failed", "lost", "out_of_memory", "expired")
    assert {key for key, value in outcomes.items() if value} == {outcome(name) for name in expected}
    assert samples[ATTEMPTS] == sum(outcomes.values()) == len(expected)
    losses = {
        cause: samples[f'forgetd_lease_losses_total{{cause="{cause}"}}'] for cause in ("runner", "taken", "expired")
    }
    assert losses == {"runner": 1, "taken": 1, "expired": 1}
    assert (samples[ended("succeeded")], samples[ended("failed", "criteria_not_met")]) == (1, 1)


def test_a_cancelled_job_is_counted_where_it_ended(
    counted: tuple[Metrics, Database], make_supervisor: Callable[..., Supervisor], jobs: Jobs, caller: Caller
) -> None:
    metrics, database = counted
    job_id = jobs.queue()
    with database.transaction() as session:
        job_rows.cancel(session, caller, job_id)

    make_supervisor(database=database, metrics=metrics).run(job_id)

    samples = metrics.samples()
    assert samples[ended("cancelled")] == 1
    assert ATTEMPTS not in samples


def test_every_try_that_the_store_failed_is_counted(settings: Settings) -> None:
    metrics = Metrics()
    gone = settings.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:9"})
    storage = ObjectStorage(gone, counted=metrics)

    with pytest.raises(Exception, match="Could not connect"):
        storage.ping()

    [(key, tries)] = [item for item in metrics.samples().items() if item[0].startswith("forgetd_store_errors_total")]
    assert key == 'forgetd_store_errors_total{error="EndpointConnectionError",operation="HeadBucket"}'
    assert tries == 5  # the first and four more


def test_a_bell_that_the_broker_does_not_take_is_a_fault_of_the_loop_and_rings_no_more(
    settings: Settings, counted: tuple[Metrics, Database], storage: ObjectStorage, jobs: Jobs
) -> None:
    metrics, database = counted
    jobs.queue()
    with database.transaction() as session:
        dispatch.see_worker(session, "w", ["gpu.flow"], 1)
    stop = threading.Event()
    away = settings.model_copy(update={"broker_url": SecretStr("redis://127.0.0.1:9/0")})
    [ring, *_] = control.loops(away, database, storage, stop, metrics=metrics, tracing=Tracing())
    ring.start()

    eventually(lambda: metrics.samples()["forgetd_broker_errors_total"] > 0)

    stop.set()
    ring.join(PATIENCE_SECONDS)
    samples = metrics.samples()
    assert samples['forgetd_loop_faults_total{loop="dispatch"}'] == samples["forgetd_broker_errors_total"]
    assert samples["forgetd_doorbells_total"] == 0
