"""The whole way with real processes: control loop, broker, worker, runner; and what each of them may suffer."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest
import redis

from services import dispatch, leases
from services.settings import Settings
from tests.conftest import Servers
from tests.worker.helpers import (
    QUEUE,
    Jobs,
    Process,
    alive,
    control_command,
    eventually,
    short_lease,
    worker_command,
)

# Outlives every wait of a test, until it is resumed: then it hurries.
LONG = {"steps": 2000, "step_seconds": 0.05, "state_every": 5, "hurry": True}

Start = Callable[[], Process]


def test_a_queued_job_is_rung_run_and_published(jobs: Jobs, start: Callable[[list[str]], Process]) -> None:
    controls = [start(control_command()), start(control_command())]
    worker = start(worker_command())
    job_id = jobs.queue()

    row = jobs.end(job_id)

    assert row.status == "succeeded"
    assert len(jobs.starts(job_id)) == 1
    for process in (*controls, worker):
        process.send(signal.SIGTERM)
    assert [process.wait() for process in (*controls, worker)] == [0, 0, 0]


def test_a_worker_that_is_told_to_go_drains_and_another_resumes(
    jobs: Jobs, start_worker: Start, start_control: Start
) -> None:
    start_control()
    first = start_worker()
    job_id = jobs.queue(**LONG)
    eventually(jobs.at_step(job_id, 12))

    first.send(signal.SIGTERM)

    assert first.wait() == 0
    stopped_at = max(line["step"] for line in jobs.trace(job_id))
    assert jobs.row(job_id).attempt == 0
    start_worker()
    assert jobs.end(job_id).status == "succeeded"
    assert [start["step"] for start in jobs.starts(job_id)] == [0, stopped_at]
    assert jobs.row(job_id).attempt == 1


@short_lease
def test_a_killed_worker_leaves_no_runner_and_its_job_is_resumed(
    jobs: Jobs, start_worker: Start, start_control: Start
) -> None:
    start_control()
    first = start_worker()
    job_id = jobs.queue(**LONG)
    eventually(jobs.has_state(job_id))
    runner = jobs.starts(job_id)[0]["pid"]

    first.kill()

    eventually(lambda: not alive(runner))
    start_worker()
    row = jobs.end(job_id)
    assert row.status == "succeeded"
    assert (row.attempt, row.infrastructure_losses) == (2, 1)
    assert jobs.starts(job_id)[1]["step"] >= 5


@short_lease
def test_a_worker_that_stands_still_past_its_lease_is_fenced_off(
    jobs: Jobs, start_worker: Start, start_control: Start
) -> None:
    start_control()
    first = start_worker()
    job_id = jobs.queue(**LONG)
    eventually(jobs.has_state(job_id))
    runner = jobs.starts(job_id)[0]["pid"]

    first.send(signal.SIGSTOP)

    eventually(lambda: not alive(runner))  # by itself: the worker stands still
    start_worker()
    assert jobs.end(job_id).status == "succeeded"
    first.send(signal.SIGCONT)
    eventually(lambda: "the lease is lost" in first.log.read_text() or ": lost" in first.log.read_text())
    row = jobs.row(job_id)
    assert row.attempt == 2
    eventually(
        lambda: {key.split("/")[1] for key in jobs.keys(job_id) if "attempts" in key} == {str(row.fencing_token)}
    )
    first.send(signal.SIGTERM)
    assert first.wait() == 0


def test_a_bell_that_the_broker_lost_is_rung_again(
    jobs: Jobs, settings: Settings, start_worker: Start, start_control: Start
) -> None:
    with jobs.database.transaction() as session:
        dispatch.see_worker(session, "not listening yet", [QUEUE], 1)
    start_control()
    job_id = jobs.queue()
    eventually(lambda: jobs.row(job_id).dispatched_at is not None)

    with redis.Redis.from_url(settings.broker_url.get_secret_value()) as broker:
        broker.flushall()

    start_worker()
    assert jobs.end(job_id).status == "succeeded"


def test_a_dead_broker_delays_jobs_and_stops_neither_worker_nor_reaper(
    jobs: Jobs, servers: Servers, settings: Settings, start_worker: Start, start_control: Start
) -> None:
    start_control()
    start_worker()
    jobs.end(jobs.queue(steps=1))
    silent = jobs.queue(queue="gpu.other")
    with jobs.database.transaction() as session:
        leases.claim(session, silent, worker="gone", ttl_seconds=1.0)

    servers.stack.kill_server("valkey")
    try:
        job_id = jobs.queue()
        eventually(jobs.status(silent, "queued"))
        assert jobs.row(job_id).status == "queued"
    finally:
        servers.stack.start_server("valkey")

    assert jobs.end(job_id).status == "succeeded"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_worker_leaves_while_its_broker_is_away(
    number: signal.Signals, servers: Servers, start_worker: Start
) -> None:
    servers.stack.kill_server("valkey")
    try:
        worker = start_worker()
        eventually(lambda: "Cannot connect" in worker.log.read_text())

        worker.send(number)

        worker.wait()
    finally:
        servers.stack.start_server("valkey")
